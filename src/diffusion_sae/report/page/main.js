// Opens the report, and shows the view that the address names.
import { render } from "preact";
import { html } from "htm/preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import "./style.css";
import { ClassPage, Classes } from "./classes.js";
import { load, openSae } from "./data.js";
import { ImagePage } from "./image.js";
import { Images } from "./images.js";
import { Latent } from "./latent.js";
import { Latents } from "./latents.js";
import { Layers } from "./layers.js";
import { Overview } from "./overview.js";
import { fetchNames } from "./names.js";
import { link, replace, useRoute } from "./route.js";
import { live } from "./server.js";
import { Try } from "./try.js";
import { Loading, Text } from "./widgets.js";

const VIEWS = { latents: "Latents", images: "Images", classes: "Classes", layers: "Layers × timesteps", ...(live && { try: "Your image" }), overview: "Overview" };

/** Where each address was scrolled to, so that going back does not lose the place. */
const scrolled = new Map();

function Page({ report, images, saes }) {
  const { view, rest, query } = useRoute();
  const sae = saes.find(({ key }) => key === query.sae) ?? saes[0];
  const orders = useRef(new Map());
  if (!orders.current.has(sae.key)) orders.current.set(sae.key, { current: null });
  const order = orders.current.get(sae.key);
  const place = [view, ...rest].join("/");
  useLayoutEffect(() => {
    scrollTo(0, scrolled.get(place) ?? 0);
    const keep = () => scrolled.set(place, scrollY);
    addEventListener("scroll", keep, { passive: true });
    return () => removeEventListener("scroll", keep);
  }, [place]);
  useEffect(() => {
    document.title = `${VIEWS[view] ?? "Not found"}${rest.length ? ` ${rest.join(" ")}` : ""} · ${report.title}`;
  }, [place]);
  const shared = { report, images, sae, saes, query, order };
  return html`
    <a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); document.getElementById("main").focus(); }}>To the content</a>
    <header class="top"><div>
      <p class="title"><${Text} of=${report.title} /></p>
      <nav aria-label="Views">${Object.entries(VIEWS).map(([key, text]) => html`<a href=${link(key, [], { sae: query.sae })} aria-current=${view === key ? "page" : undefined}>${text}</a>`)}</nav>
      ${saes.length > 1 && html`<label class="saes">SAE <select value=${sae.key} onChange=${(e) => replace(link(view, view === "latents" ? [] : rest, { ...query, sae: e.target.value }))}>
        ${saes.map(({ key, name }) => html`<option value=${key}>${name}</option>`)}</select></label>`}
    </div></header>
    <main id="main" tabindex="-1"><${View} ...${{ view, rest, shared }} /></main>`;
}

function View({ view, rest, shared }) {
  const [number, other] = [0, 1].map((i) => (rest[i] === undefined ? undefined : Number(rest[i])));
  if (view === "images") return number === undefined ? html`<${Images} ...${shared} />` : html`<${ImagePage} ...${shared} image=${number} />`;
  if (view === "classes") return number === undefined ? html`<${Classes} ...${shared} />` : html`<${ClassPage} ...${shared} one=${number} other=${other} />`;
  if (view === "try") return html`<${Try} ...${shared} />`;
  if (view === "layers") return html`<${Layers} ...${shared} />`;
  if (view === "latents") return number === undefined ? html`<${Latents} ...${shared} />` : html`<${Latent} ...${shared} latent=${number} />`;
  if (view === "overview") return html`<${Overview} ...${shared} />`;
  return html`<h1>Not found</h1><p>This report has no view of that name. <a href=${link("latents")}>Latents</a></p>`;
}

async function open() {
  const target = document.getElementById("page");
  render(html`<main><${Loading} /></main>`, target);
  try {
    const [{ text: report }, images] = await Promise.all([load("report"), load("images")]);
    const saes = await Promise.all(report.saes.map((about) => openSae({ ...about, classes: report.classes })));
    await Promise.all(saes.map(fetchNames));
    performance.mark("report-loaded");
    render(html`<${Page} ...${{ report, images, saes }} />`, target);
  } catch (error) {
    render(html`<main><h1>The report cannot be shown</h1><p role="alert">${error.message}</p></main>`, target);
    throw error;
  }
}

open();
