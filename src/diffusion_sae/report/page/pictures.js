// Thumbnails from their sheets, with heat maps over them.
import { html } from "htm/preact";
import { useEffect, useRef } from "preact/hooks";
import { address } from "./data.js";

const KEPT = 48;
const sheets = new Map();
const ready = new Map();

/** A sheet, decoded off the main thread; the ones that were last used are kept. */
function sheet(number) {
  const found = sheets.get(number) ?? decode(address(`sheet-${String(number).padStart(4, "0")}.webp`));
  sheets.delete(number);
  sheets.set(number, found);
  if (sheets.size > KEPT) {
    const oldest = sheets.keys().next().value;
    sheets.delete(oldest); // its memory goes with the last drawing that holds it
    ready.delete(oldest);
  }
  return found;
}

/** A sheet that is there already; where it is not, it is fetched, and `then` is called. */
export function sheetNow(number, then) {
  if (!ready.has(number)) {
    ready.set(number, null);
    sheet(number).then((bitmap) => { ready.set(number, bitmap); then(); });
  }
  return ready.get(number);
}

async function decode(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return createImageBitmap(image);
}

/** Draws image i of the report into a square of a canvas. */
export async function drawImage(context, about, i, x, y, side) {
  const { across, side: own, crisp } = about;
  const bitmap = await sheet(Math.floor(i / across ** 2));
  const place = i % across ** 2;
  context.imageSmoothingEnabled = !(crisp && side > own);
  context.drawImage(bitmap, (place % across) * own, Math.floor(place / across) * own, own, own, x, y, side, side);
}

// From dark red over orange to pale yellow: lightness rises all the way, for any colour vision.
const HEAT = Array.from({ length: 256 }, (_, v) => {
  const t = v / 255;
  return [Math.min(255, 90 + 330 * t), Math.min(255, 20 + 225 * t ** 1.4), 30 + 150 * Math.max(0, t - 0.6) / 0.4];
});
const small = document.createElement("canvas");

/** Darkens a square and lights up where the latent fires; `map` has bytes row by row. */
export function drawHeat(context, map, [height, width], x, y, side) {
  small.width = width;
  small.height = height;
  const pixels = new ImageData(width, height);
  for (let i = 0; i < map.length; i++) {
    const [r, g, b] = HEAT[map[i]];
    pixels.data.set([r, g, b, map[i] ? 70 + 0.55 * map[i] : 0], 4 * i);
  }
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.fillStyle = "rgb(0 0 0 / 42%)";
  context.fillRect(x, y, side, side);
  context.imageSmoothingEnabled = true;
  context.drawImage(small, x, y, side, side);
}

/**
 * A row of images as one canvas. `maps`: their heat maps, one behind the other, or undefined for none.
 * Where a later drawing has begun, the earlier one stops.
 */
export function Strip({ sheets: about, images, side, gap = 2, maps, grid, label }) {
  const canvas = useRef();
  const drawing = useRef(0);
  const dense = Math.min(2, devicePixelRatio || 1);
  const width = images.length * side + (images.length - 1) * gap;
  useEffect(() => {
    const own = ++drawing.current;
    const element = canvas.current; // the reference is empty as soon as the view is left, which is before this effect ends
    const context = element.getContext("2d");
    (async () => {
      for (let n = 0; n < images.length; n++) {
        if (images[n] < 0) continue;
        const x = n * (side + gap) * dense;
        await drawImage(context, about, images[n], x, 0, side * dense);
        if (own !== drawing.current) return;
        if (maps) drawHeat(context, maps.subarray(n * grid[0] * grid[1], (n + 1) * grid[0] * grid[1]), grid, x, 0, side * dense);
      }
      element.dataset.drawn = maps ? "heat" : "plain";
    })();
    return () => drawing.current++;
  });
  const size = { width: Math.round(width * dense), height: Math.round(side * dense), style: { aspectRatio: `${width} / ${side}` } };
  return label
    ? html`<canvas ref=${canvas} class="strip" ...${size} role="img" aria-label=${label} />`
    : html`<canvas ref=${canvas} class="strip" ...${size} aria-hidden="true" />`;
}
