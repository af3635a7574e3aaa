// What the report is about: key figures, accuracies, where the features come from.
import { html } from "htm/preact";
import { count, percent, plural } from "./format.js";
import { Text } from "./widgets.js";

export function Overview({ report, sae }) {
  return html`
    <h1><${Text} of=${report.title} /></h1>
    <p class="lead">A diffusion model was given real images with some noise added, and what an inner layer made of them was recorded. A sparse
      autoencoder took these features apart into latents, of which few fire at a time. Each latent can be looked at with the images
      in which it fires.</p>
    <section aria-labelledby="numbers"><h2 id="numbers"><${Text} of=${sae.name} /></h2><${Numbers} ...${{ report, sae }} /></section>
    ${report.bars.length > 0 && html`<section aria-labelledby="accuracy"><h2 id="accuracy">What the features know</h2>
      <p class="note">Accuracy of the same kind of probe on different features, on test images.</p><${Bars} bars=${report.bars} /></section>`}
    <section aria-labelledby="origin"><h2 id="origin">Where the features come from</h2>
      ${Object.keys(sae.provenance).length === 0 && html`<p>The features do not say which extraction made them.</p>`}
      <dl class="provenance">${Object.entries(sae.provenance).map(([key, value]) => html`<dt>${key.replaceAll("_", " ")}</dt><dd><bdi>${value}</bdi></dd>`)}
        ${report.commands.length > 0 && html`<dt>made with</dt><dd>${report.commands.map((text) => html`<code>${text}</code> `)}</dd>`}</dl></section>`;
}

function Numbers({ report, sae }) {
  const rows = `on ${plural(sae.rows, "row")} of ${plural(report.sheets.count, "image")}`;
  const figures = [
    ["Latents", count(sae.latents), `${count(sae.living)} fire in some image; at most ${sae.k} a row when it was trained`],
    ["L0", sae.l0.toFixed(1), "active latents a row"],
    ["Dead latents", percent(sae.dead), `active in no row, ${rows}`],
  ];
  if (sae.fvu !== null) figures.unshift(["FVU", sae.fvu.toFixed(3), `fraction of variance unexplained ${rows}; 0 is perfect`]);
  if (sae.purity !== null) {
    figures.push(["Label purity", sae.purity.toFixed(2), `of the ${sae.sizes.purity} top images, mean of ${plural(sae.measured, "latent")}; shuffled labels ${sae.shuffledPurity.toFixed(2)}`]);
  }
  return html`<dl class="figures">${figures.map(([name, value, note]) => html`<div><dt>${name}</dt><dd>${value}</dd><dd class="explain">${note}</dd></div>`)}</dl>`;
}

const Bars = ({ bars }) => html`<ul class="shares bars">${bars.map(({ name, accuracy, note, highlight }) => html`<li class=${highlight ? "mine" : ""}>
  <span class="head"><bdi>${name}${note && ` · ${note}`}</bdi><span>${percent(accuracy)}</span></span>
  <span class="track"><span class="fill" style=${{ width: `${100 * accuracy}%` }} /></span></li>`)}</ul>`;
