// One image's page.
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { Shares } from "./charts.js";
import { row } from "./data.js";
import { number } from "./format.js";
import { wrong } from "./images.js";
import { nameOf, useNames } from "./names.js";
import { PcaTable } from "./pca.js";
import { Strip } from "./pictures.js";
import { link } from "./route.js";
import { HeatNote, Loading, Text } from "./widgets.js";

export function ImagePage({ report, sae, images, image, query }) {
  const [loaded, setLoaded] = useState();
  const [over, setOver] = useState(-1);
  useNames();
  const there = Number.isInteger(image) && image >= 0 && image < report.sheets.count;
  useEffect(() => {
    if (!there) return undefined;
    let current = true;
    sae.imageBlock(image).then(({ block, at }) => current && setLoaded({ block, at, image, sae }));
    return () => { current = false; };
  }, [sae, image]);
  if (!there) return html`<h1>Image ${image}</h1><p>This report has no such image. <a href=${link("images")}>All images</a></p>`;
  const ready = loaded?.image === image && loaded.sae === sae ? loaded : undefined;
  const cells = sae.grid ? sae.grid[0] * sae.grid[1] : 0;
  const maps = ready && sae.grid ? row(ready.block, "maps", ready.at) : undefined;
  const to = (i, text) => i >= 0 && i < report.sheets.count && html`<a href=${link("images", [i], { sae: query.sae })}>${text}</a>`;
  return html`
    <nav class="steps" aria-label="Images in order"><a href=${link("images", [], { sae: query.sae })}>All images</a>${to(image - 1, "← previous")}${to(image + 1, "next →")}</nav>
    <h1>${images.label ? html`<${Text} of=${report.classes[images.label[image]]} />` : "Image"} <span class="index">image ${image}</span></h1>
    <div class="image-row"><div class="large"><${Strip} sheets=${report.sheets} images=${[image]} side=${240} grid=${sae.grid}
        maps=${maps && over >= 0 ? maps.subarray(over * cells, (over + 1) * cells) : undefined} label=${`Image ${image}`} /></div>
      <div><p class="muted"><${Text} of=${images.text.names[image]} /></p>
        ${report.predictions && html`<${Guesses} ...${{ report, images, image }} />`}</div></div>
    <section aria-labelledby="latents"><h2 id="latents">Latents that fire most in it</h2>
      ${sae.grid && html`<${HeatNote} />`}
      ${ready ? html`<${Strongest} ...${{ report, sae, ready, maps, cells, query, image, setOver }} />` : html`<${Loading} />`}</section>
    ${report.pca && report.pca.images.includes(image) && html`<section aria-labelledby="pca"><h2 id="pca">Layers and timesteps</h2><${PcaTable} ...${{ report, image }} /></section>`}`;
}

function Guesses({ report, images, image }) {
  const rows = [0, 1, 2].filter((n) => n < report.classes.length).map((n) => ({ name: report.classes[images.guesses[3 * image + n]], share: images.chances[3 * image + n] }));
  return html`<h2 class="small">What the probe says</h2><${Shares} rows=${rows} />
    <p class="note">${wrong(images, image) ? "✗ wrong" : "✓ right"}</p>`;
}

function Strongest({ report, sae, ready, maps, cells, query, image, setOver }) {
  const [latents, acts] = [row(ready.block, "latents", ready.at), row(ready.block, "acts", ready.at)];
  return html`<ul class="tiles wide" role="list">${Array.from(latents, (latent, n) => {
    if (latent < 0) return null;
    const { text } = nameOf(sae, sae.position.get(latent));
    return html`<li key=${latent}><a class="tile" href=${link("latents", [latent], { sae: query.sae })} onMouseEnter=${() => setOver(n)} onMouseLeave=${() => setOver(-1)} onFocus=${() => setOver(n)} onBlur=${() => setOver(-1)}>
      <${Strip} sheets=${report.sheets} images=${[image]} side=${84} grid=${sae.grid} maps=${maps?.subarray(n * cells, (n + 1) * cells)} />
      <${Text} of=${text} none="no name" class="label" /><span class="act">${latent} · ${number(acts[n])}</span></a></li>`;
  })}</ul>`;
}
