// An image of one's own: which latents fire in it, and where. Only where the report is served by `browse`.
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { number } from "./format.js";
import { nameOf, useNames } from "./names.js";
import { drawHeat } from "./pictures.js";
import { link } from "./route.js";
import { abilities, encode, live } from "./server.js";
import { HeatNote, Text } from "./widgets.js";

const SIDE = 240;

export function Try({ sae, query }) {
  const [able, setAble] = useState();
  const [state, setState] = useState({});
  const [over, setOver] = useState(-1);
  useNames();
  useEffect(() => {
    abilities(sae).then((found) => setAble(found.encode), (error) => setState({ message: error.message }));
  }, [sae]);
  const take = async (file) => {
    if (!file) return;
    setState({ message: "Encoding…" });
    try {
      const picture = await squared(file); // first, so that a file that is no image is told of here, and not sent
      setState({ picture, found: await encode(sae, file), name: file.name });
    } catch (error) {
      setState({ message: error.message });
    }
  };
  if (!live) return html`<h1>Your image</h1><p>This needs a server: <code>diffusion-sae browse</code> with the folder of this report.</p>`;
  const drop = (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  };
  return html`<h1>Your image</h1>
    <p class="lead">It goes through the same extraction as the images of this report, on this computer.</p>
    <div class="drop" onDragOver=${(e) => e.preventDefault()} onDrop=${drop}>
      <label class="file">Drop an image here, or choose one <input type="file" accept="image/*" disabled=${able === false} onChange=${(e) => take(e.target.files[0])} /></label>
      ${able === false && html`<p class="muted">The report does not say where its SAE is kept.</p>`}
    </div>
    <p role="status" class="note">${state.message}</p>
    ${state.found && html`<div class="large"><${Square} picture=${state.picture} side=${SIDE} grid=${state.found.grid} map=${state.found.latents[over]?.map} label=${state.name} /></div>
      <section aria-labelledby="latents"><h2 id="latents">Latents that fire most in it</h2>${state.found.grid && html`<${HeatNote} />`}
      <ul class="tiles" role="list">${state.found.latents.map(({ latent, activation, map }, n) => {
        const at = sae.position.get(latent);
        return html`<li key=${latent}><a class="tile" href=${link("latents", [latent], { sae: query.sae })} onMouseEnter=${() => setOver(n)} onMouseLeave=${() => setOver(-1)} onFocus=${() => setOver(n)} onBlur=${() => setOver(-1)}>
          <${Square} picture=${state.picture} side=${84} grid=${state.found.grid} map=${map} />
          <${Text} of=${at === undefined ? "" : nameOf(sae, at).text} none="no name" class="label" /><span class="act">${latent} · ${number(activation)}</span></a></li>`;
      })}</ul>
      ${state.found.latents.length === 0 && html`<p>No latent fires in it.</p>`}</section>`}`;
}

/** The middle of an image, as the model sees it. */
async function squared(file) {
  const whole = await createImageBitmap(file).catch(() => { throw new Error("This file is no image that the browser can show."); });
  const side = Math.min(whole.width, whole.height);
  return createImageBitmap(whole, (whole.width - side) / 2, (whole.height - side) / 2, side, side);
}

function Square({ picture, side, grid, map, label }) {
  const canvas = useRef();
  useEffect(() => {
    const context = canvas.current.getContext("2d");
    context.imageSmoothingEnabled = picture.width > 2 * side || picture.width > 64;
    context.drawImage(picture, 0, 0, 2 * side, 2 * side);
    if (map) drawHeat(context, map, grid, 0, 0, 2 * side);
    canvas.current.dataset.drawn = map ? "heat" : "plain";
  });
  return html`<canvas ref=${canvas} class="strip" width=${2 * side} height=${2 * side} role=${label ? "img" : undefined} aria-label=${label} aria-hidden=${label ? undefined : "true"} />`;
}
