// The first three principal components of a layer's features as colours, for one image at each layer and timestep.
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { load, row } from "./data.js";
import { Loading, Text } from "./widgets.js";

const SIDE = 92;

export function PcaTable({ report, image }) {
  const { layers, timesteps, images, block: size } = report.pca;
  const place = images.indexOf(image);
  const [loaded, setLoaded] = useState();
  useEffect(() => {
    let current = true;
    load(`pca-${String(Math.floor(place / size)).padStart(4, "0")}`).then((block) => current && setLoaded({ block, place }));
    return () => { current = false; };
  }, [place]);
  if (loaded?.place !== place) return html`<${Loading} />`;
  return html`<p class="note">The first three principal components of the features at each layer and timestep as red, green and blue: within one picture, like colours are like features.</p>
    <div class="scroller" tabindex="0" role="region" aria-label="Principal components by layer and timestep"><table class="pca"><thead><tr><th scope="col">layer</th>${timesteps.map((t) => html`<th scope="col">t = ${t}</th>`)}</tr></thead>
      <tbody>${layers.map((layer, l) => html`<tr><th scope="row"><${Text} of=${layer} /></th>${timesteps.map((t, k) => html`<td>
        <${Colours} pixels=${row(loaded.block, `l${l}t${k}`, place % size)} side=${loaded.block.shape[`l${l}t${k}`][1]} label=${`${layer}, t = ${t}`} /></td>`)}</tr>`)}</tbody></table></div>`;
}

function Colours({ pixels, side, label }) {
  const canvas = useRef();
  useEffect(() => {
    const image = new ImageData(side, side);
    for (let i = 0; i < side * side; i++) image.data.set([pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2], 255], 4 * i);
    canvas.current.getContext("2d").putImageData(image, 0, 0);
  });
  return html`<canvas ref=${canvas} class="colours" width=${side} height=${side} style=${{ width: `${SIDE}px`, height: `${SIDE}px` }} role="img" aria-label=${label} />`;
}
