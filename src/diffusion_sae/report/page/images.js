// The images: a map of the whole set, and a list of those that are chosen.
import { html } from "htm/preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { LatentCard } from "./card.js";
import { Shares } from "./charts.js";
import { row } from "./data.js";
import { count, percent, plural } from "./format.js";
import { classShares } from "./latent.js";
import { Strip } from "./pictures.js";
import { link, replace } from "./route.js";
import { Scatter, colourOf } from "./scatter.js";
import { VirtualGrid } from "./virtual.js";
import { Text } from "./widgets.js";

const MOST_READ = 512; // images of a lasso whose latents are counted
const kept = { lasso: null }; // the lasso outlives a look at an image

export const wrong = (images, i) => images.guesses && images.label && images.guesses[3 * i] !== images.label[i];

function fitting(report, images, query) {
  const words = (query.q ?? "").trim().toLowerCase();
  return (i) => (query.class === undefined || images.label?.[i] === Number(query.class))
    && (!query.wrong || wrong(images, i))
    && (!words || images.text.names[i].toLowerCase().includes(words));
}

export function Images({ report, sae, images, query }) {
  const [lasso, setLasso] = useState(kept.lasso);
  const [hovered, setHovered] = useState(-1);
  kept.lasso = lasso;
  const set = (changes) => replace(link("images", [], { ...query, ...changes }));
  const { shown, list } = useMemo(() => {
    const fits = fitting(report, images, query);
    const flags = Uint8Array.from({ length: report.sheets.count }, (_, i) => fits(i));
    const from = lasso ?? Array.from(flags.keys());
    return { shown: (i) => flags[i] === 1, list: from.filter((i) => flags[i]) };
  }, [JSON.stringify(query), lasso]);
  const classes = report.classes?.length ?? 0;
  const number = Math.min(Number(query.map ?? 0), report.maps.length - 1);
  const colour = (i) => (images.label ? colourOf(images.label[i], classes) : colourOf(0, 1));
  return html`
    <h1>Images</h1>
    <p class="lead">${report.maps.length > 0 ? html`Each point is an image; near ones are alike in the ${report.maps[number]}. ` : ""}An image's page shows which latents fire in it, and where.</p>
    <form class="tools" role="search" aria-label="Images" onSubmit=${(e) => e.preventDefault()}>
      <label class="grow">File name <input type="search" value=${query.q ?? ""} onInput=${(e) => set({ q: e.target.value })} /></label>
      ${classes > 0 && html`<label>Class <select value=${query.class ?? ""} onChange=${(e) => set({ class: e.target.value })}>
        <option value="">all</option>${report.classes.map((name, i) => html`<option value=${i}>${name || "(no name)"}</option>`)}</select></label>`}
      ${report.maps.length > 1 && html`<label>Map <select value=${number} onChange=${(e) => set({ map: e.target.value })}>${report.maps.map((name, i) => html`<option value=${i}>${name}</option>`)}</select></label>`}
      ${report.predictions && classes > 0 && html`<label class="check"><input type="checkbox" checked=${Boolean(query.wrong)} onChange=${(e) => set({ wrong: e.target.checked ? 1 : undefined })} />Only wrong guesses of the probe</label>`}
    </form>
    ${report.maps.length > 0 && html`<div class="map-row"><div>
      <${Scatter} about=${report.sheets} places=${images[`map${number}`]} shown=${shown} colour=${colour} selected=${lasso}
        hover=${setHovered} open=${(i) => { location.hash = link("images", [i], { sae: query.sae }); }} select=${setLasso}
        label=${`Map of ${plural(report.sheets.count, "image")}: ${report.maps[number]}`} />
      ${classes > 0 && classes <= 24 && html`<ul class="legend">${report.classes.map((name, c) => html`<li>
        <button type="button" aria-pressed=${query.class === String(c)} onClick=${() => set({ class: query.class === String(c) ? undefined : c })}>
          <span class="dot" style=${{ background: colourOf(c, classes) }} /><${Text} of=${name} /></button></li>`)}</ul>`}</div>
      <${Pointed} ...${{ report, images, hovered }} /></div>`}
    ${lasso && html`<${Lasso} ...${{ report, sae, images, lasso, query }} clear=${() => setLasso(null)} />`}
    <p class="count" aria-live="polite">${count(list.length)} of ${plural(report.sheets.count, "image")}${lasso ? " lie in the lasso and fit" : ""}.</p>
    <${VirtualGrid} count=${list.length} least=${84} height=${132} gap=${12} label="Images"
      cell=${(n) => [list[n], html`<${ImageTile} ...${{ report, images, query }} i=${list[n]} />`]} />`;
}

function ImageTile({ report, images, query, i }) {
  const label = images.label ? report.classes[images.label[i]] : images.text.names[i];
  return html`<a class="tile" href=${link("images", [i], { sae: query.sae })} title=${images.text.names[i]}>
    <${Strip} sheets=${report.sheets} images=${[i]} side=${84} />
    <${Text} of=${label} class="label" />${wrong(images, i) ? html`<span class="act wrong">✗ <bdi>${report.classes[images.guesses[3 * i]]}</bdi></span>` : html`<span class="act">${count(i)}</span>`}</a>`;
}

/** What the pointer is on. */
function Pointed({ report, images, hovered }) {
  return html`<div class="pointed" aria-live="off">${hovered < 0 ? html`<p class="muted">Point at the map to see an image, click to open it. Drag to move, scroll to zoom, and draw a lasso to choose several.</p>` : html`
    <${Strip} sheets=${report.sheets} images=${[hovered]} side=${160} />
    <p>${images.label && html`<b><${Text} of=${report.classes[images.label[hovered]]} /></b><br />`}<span class="muted"><${Text} of=${images.text.names[hovered]} /></span></p>`}</div>`;
}

function Lasso({ report, sae, images, lasso, query, clear }) {
  const base = report.classes ? classShares(report, images) : [];
  const within = new Array(base.length).fill(0);
  if (images.label) lasso.forEach((i) => { within[images.label[i]] += 1 / lasso.length; });
  const rows = within.map((share, c) => ({ name: report.classes[c], share, base: base[c], href: link("classes", [c], { sae: query.sae }) }))
    .filter(({ share }) => share > 0).sort((a, b) => b.share - a.share).slice(0, 6);
  return html`<section class="lasso" aria-labelledby="lasso"><h2 id="lasso">${plural(lasso.length, "image")} in the lasso</h2>
    <button type="button" onClick=${clear}>Let go</button>
    ${lasso.length > 0 && html`<div class="charts">${rows.length > 0 && html`<div><h3>Classes; the mark is the share of all images</h3><${Shares} rows=${rows} mark="of all images" /></div>`}
      <div><h3>Latents that are strong in them more often than elsewhere</h3><${LassoLatents} ...${{ report, sae, lasso, query }} /></div></div>`}</section>`;
}

/** By the share of these images in which it is among the strongest, less the share of all in which it fires at all. */
function LassoLatents({ report, sae, lasso, query }) {
  const [found, setFound] = useState();
  useEffect(() => {
    let current = true;
    const every = Math.ceil(lasso.length / MOST_READ);
    const read = lasso.filter((_, n) => n % every === 0);
    Promise.all(read.map((i) => sae.imageBlock(i))).then((blocks) => {
      if (!current) return;
      const counts = new Map();
      for (const { block, at } of blocks) for (const latent of row(block, "latents", at)) if (latent >= 0) counts.set(latent, (counts.get(latent) ?? 0) + 1);
      const rated = [...counts].map(([latent, n]) => {
        const at = sae.position.get(latent);
        return { at, share: n / read.length, excess: n / read.length - sae.table.density[at] };
      });
      setFound(rated.filter(({ excess }) => excess > 0).sort((a, b) => b.excess - a.excess).slice(0, 4));
    });
    return () => { current = false; };
  }, [lasso, sae]);
  if (!found) return html`<p class="muted">Counting…</p>`;
  if (!found.length) return html`<p class="muted">none</p>`;
  return html`<ul class="cards" role="list">${found.map(({ at, share }) => html`<li key=${at}><${LatentCard} ...${{ report, sae, at }} query=${{ sae: query.sae }}
    note=${html`<span>strong in ${percent(share, 0)} <i>of these; fires in ${percent(sae.table.density[at], 0)} of all</i></span>`} /></li>`)}</ul>`;
}
