// Which latents tell a class from all others, and one class from another.
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { LatentCard } from "./card.js";
import { row } from "./data.js";
import { plural } from "./format.js";
import { useNames } from "./names.js";
import { link } from "./route.js";
import { HeatSwitch, Loading, Text } from "./widgets.js";
import { VirtualGrid } from "./virtual.js";
import { replace } from "./route.js";

const MANY = 24;

/** Mean, mean square and number of images, for each latent, of one class or of all that are not in it. */
async function moments(sae, counts, of) {
  const { block, at } = await sae.classBlock(of);
  const own = spread(row(block, "mean", at), row(block, "std", at));
  return { ...own, n: counts[of] };
}

async function others(sae, counts, of) {
  const all = await sae.allClasses();
  const [whole, own] = [spread(row(all, "mean", 0), row(all, "std", 0)), await moments(sae, counts, of)];
  const total = counts.reduce((a, b) => a + b, 0);
  const n = Math.max(1, total - own.n);
  return { mean: whole.mean.map((m, i) => (total * m - own.n * own.mean[i]) / n), square: whole.square.map((s, i) => (total * s - own.n * own.square[i]) / n), n };
}

function spread(mean, std) {
  const means = Float64Array.from(mean, (m) => m / 65535);
  return { mean: means, square: Float64Array.from(std, (s, i) => (s / 65535) ** 2 + means[i] ** 2) };
}

/** Cohen's d of each latent's activation: the difference of the means in standard deviations. */
export function differences(a, b) {
  const variance = (x, i) => Math.max(0, x.square[i] - x.mean[i] ** 2);
  return Float64Array.from(a.mean, (m, i) => (m - b.mean[i]) / Math.sqrt((variance(a, i) + variance(b, i)) / 2 + 1e-6));
}

function best(values, n, sign = 1) {
  return Array.from(values.keys()).filter((i) => sign * values[i] > 0).sort((a, b) => sign * (values[b] - values[a])).slice(0, n).map((at) => ({ at, d: Math.abs(values[at]) }));
}

function useDifferences(sae, images, classes, one, other) {
  const [found, setFound] = useState();
  const key = `${sae.key} ${one} ${other}`;
  useEffect(() => {
    let current = true;
    const counts = new Array(classes).fill(0);
    images.label.forEach((c) => { counts[c]++; });
    Promise.all([moments(sae, counts, one), other === undefined ? others(sae, counts, one) : moments(sae, counts, other)])
      .then(([a, b]) => current && setFound({ key, values: differences(a, b), n: [a.n, b.n] }));
    return () => { current = false; };
  }, [key]);
  return found?.key === key ? found : undefined;
}

export function Classes({ report, sae, images, query }) {
  if (!report.classes) return html`<h1>Classes</h1><p>The images of this report have no labels.</p>`;
  return html`<h1>Classes</h1>
    <p class="lead">For each class the latents that tell it from all others, by the difference of their mean activation in standard deviations (Cohen's d).</p>
    <form class="tools"><${HeatSwitch} sae=${sae} on=${query.heat} change=${(heat) => replace(link("classes", [], { ...query, heat }))} /></form>
    <p class="count">${plural(report.classes.length, "class", "classes")}.</p>
    <${VirtualGrid} count=${report.classes.length} least=${600} height=${190} label="Classes" cell=${(c) => [c, html`<${ClassRow} ...${{ report, sae, images, query }} c=${c} />`]} />`;
}

function ClassRow({ report, sae, images, query, c }) {
  const found = useDifferences(sae, images, report.classes.length, c);
  useNames();
  return html`<article class="class-row"><h2><a href=${link("classes", [c], query)}><${Text} of=${report.classes[c]} /></a> ${found && html`<span class="index">${plural(found.n[0], "image")}</span>`}</h2>
    ${found ? html`<ul class="cards few" role="list">${best(found.values, 2).map(({ at, d }) => html`<li key=${at}><${Told} ...${{ report, sae, at, d, query }} /></li>`)}</ul>` : html`<${Loading} />`}</article>`;
}

const Told = ({ report, sae, at, d, query }) => html`<${LatentCard} ...${{ report, sae, at }} heat=${Boolean(query.heat)} query=${query} note=${html`<span><i>d</i> ${d.toFixed(2)}</span>`} />`;

export function ClassPage({ report, sae, images, query, one, other }) {
  const { classes } = report;
  const there = (c) => c === undefined || (Number.isInteger(c) && c >= 0 && c < (classes?.length ?? 0));
  if (!there(one) || !there(other)) return html`<h1>Not found</h1><p>This report has no such class. <a href=${link("classes")}>All classes</a></p>`;
  return html`
    <nav class="steps" aria-label="Classes"><a href=${link("classes", [], query)}>All classes</a><a href=${link("latents", [], { sae: query.sae, class: one })}>Latents named after it</a><a href=${link("images", [], { sae: query.sae, class: one })}>Its images</a></nav>
    <h1><${Text} of=${classes[one]} />${other !== undefined && html`<span class="against"> against </span><${Text} of=${classes[other]} />`}</h1>
    <form class="tools"><label>Compared with <select value=${other ?? ""} onChange=${(e) => { location.hash = link("classes", e.target.value === "" ? [one] : [one, e.target.value], query); }}>
      <option value="">all others</option>${classes.map((name, c) => c !== one && html`<option value=${c}>${name || "(no name)"}</option>`)}</select></label>
      <${HeatSwitch} sae=${sae} on=${query.heat} change=${(heat) => replace(link("classes", other === undefined ? [one] : [one, other], { ...query, heat }))} /></form>
    <${Telling} key=${`${sae.key} ${one} ${other}`} ...${{ report, sae, images, query, one, other }} />`;
}

function Telling({ report, sae, images, query, one, other }) {
  const found = useDifferences(sae, images, report.classes.length, one, other);
  useNames();
  if (!found) return html`<${Loading} />`;
  const side = (id, sign, title) => html`<section aria-labelledby=${id}><h2 id=${id}>${title}</h2>
    <ul class="cards" role="list">${best(found.values, other === undefined ? MANY : MANY / 2, sign).map(({ at, d }) => html`<li key=${at}><${Told} ...${{ report, sae, at, d, query }} /></li>`)}</ul></section>`;
  const name = (c) => html`<${Text} of=${report.classes[c]} />`;
  return html`<p class="note">d: the difference of the mean activations (${plural(found.n[0], "image")} against ${found.n[1].toLocaleString("en")}), in standard deviations.</p>
    ${side("more", 1, html`Stronger in ${name(one)}`)}
    ${other !== undefined && side("less", -1, html`Stronger in ${name(other)}`)}
    ${other === undefined && html`<section aria-labelledby="pairs"><h2 id="pairs">Against one class</h2><ul class="links">${report.classes.map((text, c) => c !== one && html`<li><a href=${link("classes", [one, c], query)}><${Text} of=${text} /></a></li>`)}</ul></section>`}`;
}
