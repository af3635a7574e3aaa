// The grid of all living latents.
import { html } from "htm/preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { LatentCard } from "./card.js";
import { count, plural } from "./format.js";
import { download, nameOf, ownNames, upload, useNames } from "./names.js";
import { RANGES, SORTS, chosen, defaultSort, descends } from "./order.js";
import { link, replace } from "./route.js";
import { abilities, searchText } from "./server.js";
import { HeatSwitch, Text } from "./widgets.js";
import { VirtualGrid } from "./virtual.js";

export function Latents({ report, sae, query, order }) {
  useNames();
  const set = (changes) => {
    replace(link("latents", [], { ...query, ...changes }));
  };
  const sort = SORTS[query.sort] ? query.sort : defaultSort(sae);
  const rows = useMemo(() => chosen(sae, query), [sae, JSON.stringify(query), Object.keys(ownNames(sae)).length]);
  order.current = rows;
  const height = 148;
  return html`
    <h1>Latents</h1>
    <p class="lead">Each card is one latent of the autoencoder, with the images in which it fires most.</p>
    <form class="tools" role="search" aria-label="Latents" onSubmit=${(event) => event.preventDefault()}>
      <label class="grow">Name, class or number
        <input type="search" value=${query.q ?? ""} onInput=${(e) => set({ q: e.target.value })} placeholder="sandal, or 42" />
      </label>
      ${report.classes && html`<label>Class
        <select value=${query.class ?? ""} onChange=${(e) => set({ class: e.target.value })}>
          <option value="">all</option>
          ${report.classes.map((name, i) => html`<option value=${i}>${name || "(no name)"}</option>`)}
        </select></label>`}
      <label>Sort by
        <select value=${sort} onChange=${(e) => set({ sort: e.target.value, dir: undefined })}>
          ${Object.entries(SORTS).filter(([key]) => report.classes || !["purity", "class"].includes(key))
            .map(([key, text]) => html`<option value=${key}>${text}</option>`)}
        </select></label>
      <button type="button" onClick=${() => set({ dir: descends(sort, query) ? "up" : "down" })}
        aria-label=${descends(sort, query) ? "Largest first; change to smallest first" : "Smallest first; change to largest first"}>
        ${descends(sort, query) ? "↓" : "↑"}</button>
      <${HeatSwitch} sae=${sae} on=${query.heat} change=${(heat) => set({ heat })} />
    </form>
    <details class="more" open=${Object.keys(RANGES).some((key) => query[`${key}From`] || query[`${key}To`]) || Boolean(query.own)}>
      <summary>Ranges and own names</summary>
      <${Ranges} report=${report} query=${query} set=${set} />
      <${OwnNames} sae=${sae} query=${query} set=${set} />
    </details>
    <${TextSearch} sae=${sae} query=${query} />
    <p class="count" aria-live="polite">${count(rows.length)} of ${plural(sae.living, "living latent")}${
      sae.living < sae.latents ? `; ${plural(sae.latents - sae.living, "other")} fired in no image` : ""}.</p>
    ${rows.length === 0 && html`<p class="empty">No latent fits. <button type="button" onClick=${() =>
      replace(link("latents", [], { sae: query.sae, heat: query.heat }))}>Show all</button></p>`}
    <${VirtualGrid} count=${rows.length} least=${300} height=${height} label="Latents"
      cell=${(n) => [rows[n], html`<${LatentCard} report=${report} sae=${sae} at=${rows[n]} heat=${Boolean(query.heat)} query=${query} />`]} />`;
}

function Ranges({ report, query, set }) {
  const shown = Object.entries(RANGES).filter(([key]) => report.classes || key !== "purity");
  return html`<div class="ranges">${shown.map(([key, { label, unit }]) => html`
    <fieldset><legend>${label}${unit && `, ${unit}`}</legend>
      ${[["From", "at least"], ["To", "at most"]].map(([end, text]) => html`
        <label>${text} <input type="number" min="0" step="any" inputmode="decimal" value=${query[key + end] ?? ""}
          onInput=${(e) => set({ [key + end]: e.target.value })} /></label>`)}
    </fieldset>`)}</div>`;
}

function OwnNames({ sae, query, set }) {
  const [message, setMessage] = useState("");
  const named = Object.keys(ownNames(sae)).length;
  const take = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    setMessage(await upload(sae, file).then((where) => `Names saved ${where}.`, (error) => error.message));
  };
  return html`<div class="tools own">
    <label class="check"><input type="checkbox" checked=${Boolean(query.own)} onChange=${(e) => set({ own: e.target.checked ? 1 : undefined })} />
      Only latents with a name of mine (${count(named)})</label>
    <button type="button" disabled=${named === 0} onClick=${() => download(sae)}>Download names</button>
    <label class="file">Load names <input type="file" accept="application/json,.json" onChange=${take} /></label>
    <span role="status">${message}</span>
  </div>`;
}

/** Where the report is served with a model of text and images: latents whose images a text describes. */
function TextSearch({ sae, query }) {
  const [able, setAble] = useState(false);
  const [found, setFound] = useState(null);
  const [message, setMessage] = useState("");
  useEffect(() => {
    abilities(sae).then(({ text }) => setAble(text), (error) => setMessage(error.message));
  }, [sae]);
  if (!able) return message && html`<p role="alert">${message}</p>`;
  const search = async (event) => {
    event.preventDefault();
    const text = event.target.elements.text.value.trim();
    if (!text) return setFound(null);
    return searchText(sae, text).then((answer) => { setFound(answer.latents); setMessage(""); }, (error) => setMessage(error.message));
  };
  return html`<form class="tools" role="search" aria-label="Latents by a description" onSubmit=${search}>
    <label class="grow">Latents by a description <input type="search" name="text" placeholder="a round handle" /></label>
    <button>Search</button><span role="status">${message}</span></form>
    ${found && html`<ol class="found">${found.map(({ latent, score }) => {
      const { text } = nameOf(sae, sae.position.get(latent));
      return html`<li><a href=${link("latents", [latent], query)}>${latent}</a> <${Text} of=${text} none="no name" /> <span class="muted">${score.toFixed(2)}</span></li>`;
    })}</ol>`}`;
}
