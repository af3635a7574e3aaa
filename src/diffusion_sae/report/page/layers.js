// Layers × timesteps: what a probe knows at each, and what one image looks like at each.
import { html } from "htm/preact";
import { percent } from "./format.js";
import { PcaTable } from "./pca.js";
import { Strip } from "./pictures.js";
import { link, replace } from "./route.js";
import { Text } from "./widgets.js";

// From light to dark; on dark paper the other way round. The ink on each is the better of black and white.
const RAMPS = {
  light: [[234, 241, 245], [194, 216, 230], [136, 180, 208], [68, 132, 174], [26, 90, 134], [11, 52, 84]],
  dark: [[29, 42, 53], [34, 67, 92], [43, 100, 141], [77, 144, 189], [144, 193, 223], [220, 237, 247]],
};

function colours(position) {
  const ramp = RAMPS[matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"];
  const at = Math.min(Math.floor(position * (ramp.length - 1)), ramp.length - 2);
  const weight = position * (ramp.length - 1) - at;
  const rgb = ramp[at].map((a, j) => Math.round(a + (ramp[at + 1][j] - a) * weight));
  const [r, g, b] = rgb.map((c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return { background: `rgb(${rgb.join(" ")})`, color: 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff" };
}

export function Layers({ report, images, saes, query }) {
  const { grids, pca } = report;
  const number = Math.min(Number(query.grid ?? 0), grids.length - 1);
  return html`<h1>Layers × timesteps</h1>
    ${grids.length === 0 && !pca && html`<p>This report holds no results of layers and timesteps.</p>`}
    ${grids.length > 0 && html`<section aria-labelledby="heat"><h2 id="heat">What a probe knows</h2>
      ${grids.length > 1 && html`<form class="tools"><label>Results <select value=${number} onChange=${(e) => replace(link("layers", [], { ...query, grid: e.target.value }))}>${grids.map(({ name }, i) => html`<option value=${i}>${name}</option>`)}</select></label></form>`}
      <${Heat} grid=${grids[number]} ...${{ saes, query }} /></section>`}
    ${pca && html`<section aria-labelledby="pca"><h2 id="pca">One image at all of them</h2><${OneImage} ...${{ report, images, query }} /></section>`}`;
}

function Heat({ grid, saes, query }) {
  const { layers, timesteps, accuracy, chosen, caption } = grid;
  const measured = accuracy.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...measured), Math.max(...measured)];
  const saeAt = (layer, t) => saes.find((sae) => sae.layer === layer && sae.timesteps.includes(t));
  const cell = (layer, t, value) => {
    if (value === null) return html`<td class="missing"><span aria-label="not measured">–</span></td>`;
    const [sae, style] = [saeAt(layer, t), colours((value - low) / (high - low || 1))];
    const kind = chosen && chosen[0] === layer && chosen[1] === t ? "chosen" : "";
    const text = percent(value);
    return html`<td class=${kind} style=${style}>${sae ? html`<a style=${{ color: style.color }} href=${link("latents", [], { sae: sae.key })} title="Open the SAE of this cell">${text}</a>` : text}</td>`;
  };
  return html`${caption && html`<p class="note"><${Text} of=${caption} /> Outlined: chosen. Underlined: opens its SAE.</p>`}
    <div class="scroller" tabindex="0" role="region" aria-label="Accuracy by layer and timestep"><table class="heat"><thead>
      <tr><th scope="col">layer</th>${timesteps.map((t) => html`<th scope="col">t = ${t}</th>`)}</tr></thead>
      <tbody>${layers.map((layer, i) => html`<tr><th scope="row"><${Text} of=${layer} /></th>${timesteps.map((t, j) => cell(layer, t, accuracy[i][j]))}</tr>`)}</tbody></table></div>
    ${measured.length > 0 && html`<p class="legend scale">${percent(low)} <span class="ramp" aria-hidden="true" /> ${percent(high)}</p>`}`;
}

function OneImage({ report, images, query }) {
  const { images: choices } = report.pca;
  const image = choices.includes(Number(query.image)) ? Number(query.image) : choices[0];
  return html`<ul class="choices" role="list" aria-label="Images to choose from">${choices.map((i) => html`<li key=${i}><a href=${link("layers", [], { ...query, image: i })} aria-current=${i === image ? "true" : undefined}
      aria-label=${`Image ${i}${images.label ? `, ${report.classes[images.label[i]]}` : ""}`}><${Strip} sheets=${report.sheets} images=${[i]} side=${48} /></a></li>`)}</ul>
    <p class="note">Shown: <a href=${link("images", [image], { sae: query.sae })}>image ${image}</a>${images.label && html`, <${Text} of=${report.classes[images.label[image]]} />`}.</p>
    <${PcaTable} ...${{ report, image }} />`;
}
