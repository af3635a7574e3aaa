// One latent's page.
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { LatentCard } from "./card.js";
import { Histogram, Shares, TimestepLine } from "./charts.js";
import { row } from "./data.js";
import { count, number, percent, plural, share } from "./format.js";
import { nameOf, ownNames, setNames, useNames } from "./names.js";
import { Strip } from "./pictures.js";
import { link } from "./route.js";
import { HeatNote, HeatSwitch, Loading, Text } from "./widgets.js";
import { replace } from "./route.js";

export function Latent({ report, sae, latent, query, order, images }) {
  useNames();
  const at = sae.position.get(latent);
  const [loaded, setLoaded] = useState();
  useEffect(() => {
    if (at === undefined) return undefined;
    let current = true;
    sae.latentBlock(at).then(({ block, at: place }) => current && setLoaded({ block, place, at }));
    return () => { current = false; };
  }, [sae, at]);
  if (at === undefined) {
    return html`<h1>Latent ${latent}</h1><p>It fires in no image of this report. <a href=${link("latents", [], query)}>All living latents</a></p>`;
  }
  const { table } = sae;
  const name = nameOf(sae, at);
  const heat = query.heat !== "0" && Boolean(sae.grid);
  return html`
    <${Steps} sae=${sae} at=${at} query=${query} order=${order} />
    <h1><${Text} of=${name.text} none="no name" /> <span class="index">latent ${latent}</span></h1>
    <${Naming} key=${latent} sae=${sae} at=${at} name=${name} />
    <dl class="figures">
      <div><dt>Density</dt><dd>${share(table.density[at])}</dd><dd class="explain">of the images, ${count(Math.round(table.density[at] * report.sheets.count))}</dd></div>
      <div><dt>Largest activation</dt><dd>${number(table.max[at])}</dd></div>
      ${report.classes && html`<div><dt>Purity</dt><dd>${Number.isNaN(table.purity[at]) ? "–" : percent(table.purity[at], 0)}</dd>
        <dd class="explain">${table.label[at] < 0 ? `fires in fewer than ${sae.sizes.purity} images` : html`of the ${sae.sizes.purity} top images are of the class <${Text} of=${report.classes[table.label[at]]} />`}</dd></div>`}
    </dl>
    ${loaded?.at === at ? html`<${Samples} ...${{ report, sae, loaded, query, heat, images }} />
      <${Charts} ...${{ report, sae, loaded, query, images }} /><${Related} ...${{ report, sae, loaded, query }} />` : html`<${Loading} />`}`;
}

/** To the latents before and after it in the list that it was opened from. */
function Steps({ sae, at, query, order }) {
  const rows = order.current ?? Array.from(sae.table.index, (_, i) => i);
  const place = rows.indexOf(at);
  const to = (n, text) => rows[n] !== undefined && place >= 0 && html`<a rel=${text} href=${link("latents", [sae.table.index[rows[n]]], query)}>${text === "prev" ? "← previous" : "next →"}</a>`;
  return html`<nav class="steps" aria-label="Latents in order"><a href=${link("latents", [], query)}>All latents</a>${to(place - 1, "prev")}${to(place + 1, "next")}</nav>`;
}

function Naming({ sae, at, name }) {
  const latent = sae.table.index[at];
  const [draft, setDraft] = useState(); // what is typed and not saved: drawing the page again must not take it away
  const [message, setMessage] = useState("");
  const text = draft ?? ownNames(sae)[latent] ?? "";
  const save = async (event) => {
    event.preventDefault();
    const where = await setNames(sae, { [latent]: text }).then((saved) => `Saved ${saved}.`, (error) => `Not saved on the server: ${error.message}`);
    setDraft((now) => (now === text ? undefined : now));
    setMessage(text.trim() ? where : `Your name is taken back. ${where}`);
  };
  const origin = { you: "named by you", report: "named by the report", class: "its top images' class" }[name.by] ?? "";
  return html`<form class="tools naming" onSubmit=${save}>
    <label class="grow">Name <input type="text" maxlength="200" value=${text} onInput=${(e) => setDraft(e.target.value)}
      placeholder=${name.by === "you" ? "" : name.text} autocomplete="off" /></label>
    <button>Save name</button>
    <span role="status">${message || html`${origin}${told(name)}${name.runnerUp ? html`; runner-up <${Text} of=${name.runnerUp} />` : ""}`}</span>
  </form>`;
}

/** How well a name does, and how often random images do as well. */
function told({ score, unit, chance }) {
  if (score === undefined || score === null) return "";
  const by = chance === null || chance === undefined ? "" : `, as random images have in ${percent(chance)} of draws`;
  return `: ${score.toFixed(2)} ${unit}${by}`;
}

function Samples({ report, sae, loaded, query, heat, images }) {
  const { block, place } = loaded;
  const [own, acts] = [row(block, "images", place), row(block, "acts", place)];
  const maps = heat ? row(block, "maps", place) : undefined;
  const { top, random } = sae.sizes;
  const quarter = (own.length - top - random) / 4;
  const tiles = (from, to) => html`<${Tiles} ...${{ report, sae, query, images, maps }} own=${own} acts=${acts} from=${from} to=${to} />`;
  const quarters = ["strongest quarter", "second", "third", "weakest quarter"];
  return html`
    <section aria-labelledby="top"><h2 id="top">Strongest images</h2>
      <form class="tools"><${HeatSwitch} sae=${sae} on=${heat} change=${(on) => replace(link("latents", [sae.table.index[loaded.at]], { ...query, heat: on ?? "0" }))} /></form>
      ${heat && html`<${HeatNote} />`}${tiles(0, top)}</section>
    <section aria-labelledby="quarters"><h2 id="quarters">From strong to weak</h2>
      <p class="note">The images in which it fires, by activation in four equal parts; some of each, drawn at random.</p>
      <div class="quarters">${quarters.map((text, i) => html`<div><h3>${text}</h3>${tiles(top + i * quarter, top + (i + 1) * quarter)}</div>`)}</div></section>
    <section aria-labelledby="random"><h2 id="random">Any images in which it fires</h2>
      <p class="note">Drawn at random from all of them: the strongest alone can mislead.</p>${tiles(own.length - random, own.length)}</section>`;
}

export function Tiles({ report, sae, query, images, maps, own, acts, from, to }) {
  const cells = sae.grid ? sae.grid[0] * sae.grid[1] : 0;
  const tiles = [];
  for (let n = from; n < to; n++) {
    if (own[n] < 0) continue;
    const label = report.classes ? report.classes[images.label[own[n]]] : images.text.names[own[n]];
    tiles.push(html`<li key=${`${n}-${own[n]}`}><a class="tile" href=${link("images", [own[n]], { sae: query.sae })} title=${images.text.names[own[n]]}>
      <${Strip} sheets=${report.sheets} images=${[own[n]]} side=${84} maps=${maps?.subarray(n * cells, (n + 1) * cells)} grid=${sae.grid} />
      <${Text} of=${label} class="label" /><span class="act">${number(acts[n])}</span></a></li>`);
  }
  return tiles.length ? html`<ul class="tiles" role="list">${tiles}</ul>` : html`<p class="muted">none</p>`;
}

function Charts({ report, sae, loaded, query, images }) {
  const { block, place, at } = loaded;
  const { table, timesteps } = sae;
  const fires = Math.round(table.density[at] * report.sheets.count);
  const own = report.classes ? row(block, "classes", place) : [];
  const base = report.classes ? classShares(report, images) : [];
  const rows = Array.from(own, (n, c) => ({ name: report.classes[c], share: n / fires, base: base[c], href: link("classes", [c], { sae: query.sae }) }))
    .sort((a, b) => b.share - a.share).slice(0, 10);
  return html`<div class="charts">
    <section aria-labelledby="activations"><h2 id="activations">Activations</h2>
      <p class="note">Of the ${plural(fires, "image")} in which it fires; heights on a logarithmic scale.</p>
      <${Histogram} bins=${row(block, "histogram", place)} max=${table.max[at]} of="activations" /></section>
    ${report.classes && html`<section aria-labelledby="classes"><h2 id="classes">Classes</h2>
      <p class="note">Of the images in which it fires; the mark is the class's share of all images.</p><${Shares} rows=${rows} mark="of all images" /></section>`}
    ${timesteps.length > 1 && html`<section aria-labelledby="timesteps"><h2 id="timesteps">Over timesteps</h2>
      <p class="note">Share of the images in which it fires at each timestep, and mean activation over all images.</p>
      <${TimestepLine} timesteps=${timesteps} values=${Array.from(row(block, "rate", place))} format=${(x) => percent(x, x < 0.1 ? 1 : 0)} of="Share of images" />
      <${TimestepLine} timesteps=${timesteps} values=${Array.from(row(block, "mean", place))} format=${number} of="Mean activation" /></section>`}
  </div>`;
}

/** Share of each class among all images. */
export function classShares(report, images) {
  const shares = new Array(report.classes.length).fill(0);
  images.label.forEach((c) => { shares[c] += 1 / images.label.length; });
  return shares;
}

function Related({ report, sae, loaded, query }) {
  const { block, place } = loaded;
  const list = (latents, values, note) => {
    const cards = Array.from(row(block, latents, place), (latent, n) => {
      const at = sae.position.get(latent);
      return at !== undefined && html`<li key=${latent}><${LatentCard} ...${{ report, sae, at }} query=${query} heat=${query.heat === "1"} note=${note(row(block, values, place)[n])} /></li>`;
    }).filter(Boolean);
    return cards.length ? html`<ul class="cards" role="list">${cards}</ul>` : html`<p class="muted">none</p>`;
  };
  return html`
    <section aria-labelledby="similar"><h2 id="similar">Most similar latents</h2>
      <p class="note">By the cosine of their decoder directions.</p>${list("similar", "cosines", (x) => html`<span><i>cosine</i> ${x.toFixed(2)}</span>`)}</section>
    <section aria-labelledby="together"><h2 id="together">Latents that fire with it</h2>
      <p class="note">By the images in which both fire, of those in which either does.</p>${list("together", "overlaps", (x) => html`<span><i>overlap</i> ${percent(x)}</span>`)}</section>`;
}
