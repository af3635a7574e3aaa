// One latent in a list: what it is called, its numbers, its strongest images.
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { row } from "./data.js";
import { number, percent, share } from "./format.js";
import { nameOf } from "./names.js";
import { Strip } from "./pictures.js";
import { link } from "./route.js";
import { Text } from "./widgets.js";

/** Heat maps of a latent's samples; undefined until they are there, or where they are not wanted. */
export function useLatentMaps(sae, at, wanted) {
  const [maps, setMaps] = useState();
  useEffect(() => {
    if (!wanted || !sae.grid) return setMaps(undefined);
    let current = true;
    sae.latentBlock(at).then(({ block, at: place }) => current && setMaps(row(block, "maps", place)));
    return () => { current = false; };
  }, [sae, at, wanted]);
  return wanted ? maps : undefined;
}

export function LatentCard({ report, sae, at, heat, query = {}, note }) {
  const { table } = sae;
  const latent = table.index[at];
  const name = nameOf(sae, at);
  const maps = useLatentMaps(sae, at, heat);
  return html`<a class="card" href=${link("latents", [latent], query)}>
    <span class="head"><${Text} of=${name.text} none="no name" class=${`name ${name.by}`} /><span class="index">${latent}</span></span>
    <${Strip} sheets=${report.sheets} images=${row(table, "top", at)} side=${56} maps=${maps} grid=${sae.grid} />
    <span class="facts">
      ${note ?? html`
        <span><i>density</i> ${share(table.density[at])}</span>
        <span><i>max</i> ${number(table.max[at])}</span>
        ${report.classes && html`<span><i>purity</i> ${Number.isNaN(table.purity[at]) ? "–" : percent(table.purity[at], 0)}</span>`}`}
    </span>
  </a>`;
}
