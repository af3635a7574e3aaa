// Images as points in the plane: zoom, move, point at, and draw a lasso around.
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { sheetNow } from "./pictures.js";

const MARGIN = 0.04;
const PICTURES = 350; // from so few points on the screen on, they are drawn as pictures
const NEAR = 14; // pixels between the pointer and what it points at
// Okabe and Ito's colours, which differ for any colour vision, and further hues where there are more classes.
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#a99f14", "#7a5195", "#8c564b", "#7f7f7f"];

export const colourOf = (c, classes) => (classes <= PALETTE.length ? PALETTE[c] : `hsl(${(c * 137.5) % 360} 60% 50%)`);

/** Points scaled into the unit square, y upwards. */
function scaled(places) {
  const n = places.length / 2;
  const [low, high] = [[Infinity, Infinity], [-Infinity, -Infinity]];
  for (let i = 0; i < 2 * n; i++) {
    low[i % 2] = Math.min(low[i % 2], places[i]);
    high[i % 2] = Math.max(high[i % 2], places[i]);
  }
  const span = Math.max(high[0] - low[0], high[1] - low[1]) || 1;
  const unit = new Float32Array(2 * n);
  for (let i = 0; i < n; i++) {
    unit[2 * i] = 0.5 + ((places[2 * i] - (low[0] + high[0]) / 2) / span) * (1 - 2 * MARGIN);
    unit[2 * i + 1] = 0.5 - ((places[2 * i + 1] - (low[1] + high[1]) / 2) / span) * (1 - 2 * MARGIN);
  }
  return unit;
}

function within(polygon, x, y) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[xi, yi], [xj, yj]] = [polygon[i], polygon[j]];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
  }
  return inside;
}

/** What is drawn and where, apart from the page: screen = (unit · zoom + shift) · size. */
class Plot {
  constructor(canvas, about, redraw) {
    Object.assign(this, { canvas, about, redraw, zoom: 1, shift: [0, 0], lasso: [], hovered: -1, pointers: new Map() });
  }

  /** The unit square lies in the middle of the canvas. */
  screen(i) {
    const { unit, zoom, shift, canvas } = this;
    const side = Math.min(canvas.clientWidth, canvas.clientHeight);
    return [
      (unit[2 * i] * zoom + shift[0]) * side + (canvas.clientWidth - side) / 2,
      (unit[2 * i + 1] * zoom + shift[1]) * side + (canvas.clientHeight - side) / 2,
    ];
  }

  zoomAt(x, y, factor) {
    const side = Math.min(this.canvas.clientWidth, this.canvas.clientHeight);
    const at = [(x - (this.canvas.clientWidth - side) / 2) / side, (y - (this.canvas.clientHeight - side) / 2) / side];
    const zoom = Math.min(200, Math.max(0.7, this.zoom * factor));
    this.shift = this.shift.map((s, d) => at[d] - ((at[d] - s) / this.zoom) * zoom);
    this.zoom = zoom;
    this.redraw();
  }

  move(dx, dy) {
    const side = Math.min(this.canvas.clientWidth, this.canvas.clientHeight);
    this.shift = [this.shift[0] + dx / side, this.shift[1] + dy / side];
    this.redraw();
  }

  nearest(x, y) {
    let [best, distance] = [-1, NEAR ** 2];
    for (let i = 0; i < this.unit.length / 2; i++) {
      if (!this.shown(i)) continue;
      const [px, py] = this.screen(i);
      const d = (px - x) ** 2 + (py - y) ** 2;
      if (d < distance) [best, distance] = [i, d];
    }
    return best;
  }

  chosen() {
    const found = [];
    for (let i = 0; i < this.unit.length / 2; i++) if (this.shown(i) && within(this.lasso, ...this.screen(i))) found.push(i);
    return found;
  }

  draw() {
    const { canvas, unit } = this;
    const dense = Math.min(2, devicePixelRatio || 1);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(width * dense)) canvas.width = Math.round(width * dense);
    if (canvas.height !== Math.round(height * dense)) canvas.height = Math.round(height * dense);
    const context = canvas.getContext("2d");
    context.setTransform(dense, 0, 0, dense, 0, 0);
    context.clearRect(0, 0, width, height);
    const seen = [];
    for (let i = 0; i < unit.length / 2; i++) {
      const [x, y] = this.screen(i);
      if (x > -40 && y > -40 && x < width + 40 && y < height + 40) seen.push([i, x, y]);
    }
    const pictures = seen.length <= PICTURES;
    const radius = Math.min(5, 1.6 + 60 / Math.sqrt(unit.length) + Math.log2(Math.max(1, this.zoom)) / 2);
    for (const [i, x, y] of seen.sort((a, b) => this.shown(a[0]) - this.shown(b[0]))) {
      const on = this.shown(i) && (!this.selected || this.selected.has(i));
      context.globalAlpha = on ? 1 : 0.12;
      context.fillStyle = this.colour(i);
      if (pictures && on && this.drawPicture(context, i, x, y)) continue;
      context.beginPath();
      context.arc(x, y, radius, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
    this.drawMarks(context);
  }

  drawPicture(context, i, x, y) {
    const { across, side: own } = this.about;
    const bitmap = sheetNow(Math.floor(i / across ** 2), this.redraw);
    if (!bitmap) return false;
    const place = i % across ** 2;
    const half = 15;
    context.fillRect(x - half - 2, y - half - 2, 2 * half + 4, 2 * half + 4);
    context.drawImage(bitmap, (place % across) * own, Math.floor(place / across) * own, own, own, x - half, y - half, 2 * half, 2 * half);
    return true;
  }

  drawMarks(context) {
    const ink = getComputedStyle(this.canvas).color;
    context.strokeStyle = ink;
    context.lineWidth = 2;
    if (this.hovered >= 0) {
      const [x, y] = this.screen(this.hovered);
      context.beginPath();
      context.arc(x, y, 9, 0, 7);
      context.stroke();
    }
    if (this.lasso.length > 1) {
      context.beginPath();
      this.lasso.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.setLineDash([5, 4]);
      context.stroke();
      context.setLineDash([]);
    }
  }
}

/**
 * `shown(i)`: whether image i fits the filters; `selected`: what the lasso holds, or null; `hover` and `open` are told
 * of image i; `select` of what a lasso was drawn around.
 */
export function Scatter({ about, places, shown, colour, selected, hover, open, select, label }) {
  const canvas = useRef();
  const plot = useRef();
  const [mode, setMode] = useState("move");
  const frame = useRef(0);
  const redraw = () => { frame.current ||= requestAnimationFrame(() => { frame.current = 0; if (canvas.current) plot.current.draw(); }); };
  plot.current ??= new Plot(null, about, redraw);
  useEffect(() => {
    plot.current.canvas = canvas.current;
    const watcher = new ResizeObserver(redraw);
    watcher.observe(canvas.current);
    const wheel = (event) => {
      event.preventDefault();
      plot.current.zoomAt(event.offsetX, event.offsetY, Math.exp(-event.deltaY / 300));
    };
    canvas.current.addEventListener("wheel", wheel, { passive: false });
    return () => watcher.disconnect();
  }, []);
  useEffect(() => {
    Object.assign(plot.current, { unit: scaled(places), shown, colour, selected: selected && new Set(selected) });
    redraw();
  });
  const point = (i) => {
    if (plot.current.hovered === i) return;
    plot.current.hovered = i;
    hover(i);
    redraw();
  };
  const gestures = useGestures({ plot, mode, redraw, point, open, select });
  const step = (factor) => plot.current.zoomAt(canvas.current.clientWidth / 2, canvas.current.clientHeight / 2, factor);
  const reset = () => { Object.assign(plot.current, { zoom: 1, shift: [0, 0] }); redraw(); };
  const key = (event) => {
    const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (moves) plot.current.move(...moves);
    else if (event.key === "+") step(1.4);
    else if (event.key === "-") step(1 / 1.4);
    else if (event.key === "0") reset();
    else return;
    event.preventDefault();
  };
  return html`<div class="scatter">
    <div class="tools" role="group" aria-label="Map">
      <button type="button" aria-pressed=${mode === "lasso"} onClick=${() => setMode(mode === "lasso" ? "move" : "lasso")}>Lasso</button>
      <button type="button" aria-label="Zoom in" onClick=${() => step(1.6)}>+</button>
      <button type="button" aria-label="Zoom out" onClick=${() => step(1 / 1.6)}>−</button>
      <button type="button" onClick=${reset}>Whole map</button>
    </div>
    <canvas ref=${canvas} class=${`map ${mode}`} tabindex="0" role="img" aria-label=${`${label}. Arrow keys move it, plus and minus zoom; the images are listed below.`}
      onKeyDown=${key} ...${gestures}></canvas></div>`;
}

/** Pointers: one moves the map or draws the lasso, two zoom, one that hardly moved opens what it points at. */
function useGestures({ plot, mode, redraw, point, open, select }) {
  const at = (event) => [event.offsetX, event.offsetY];
  const gesture = useRef(null);
  return {
    onPointerDown: (event) => {
      const own = plot.current;
      event.currentTarget.setPointerCapture(event.pointerId);
      own.pointers.set(event.pointerId, at(event));
      const lasso = mode === "lasso" || event.shiftKey;
      gesture.current = { start: at(event), lasso, moved: false };
      own.lasso = lasso ? [at(event)] : [];
    },
    onPointerMove: (event) => {
      const own = plot.current;
      const before = own.pointers.get(event.pointerId);
      if (!before) return point(own.nearest(...at(event)));
      const [x, y] = at(event);
      if (Math.hypot(x - gesture.current.start[0], y - gesture.current.start[1]) > 4) gesture.current.moved = true;
      if (own.pointers.size === 2) {
        const other = [...own.pointers].find(([id]) => id !== event.pointerId)[1];
        const spread = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
        own.zoomAt((x + other[0]) / 2, (y + other[1]) / 2, spread([x, y]) / spread(before));
      } else if (gesture.current.lasso) {
        own.lasso.push([x, y]);
        redraw();
      } else if (gesture.current.moved) own.move(x - before[0], y - before[1]);
      own.pointers.set(event.pointerId, [x, y]);
      return undefined;
    },
    onPointerUp: (event) => {
      const own = plot.current;
      own.pointers.delete(event.pointerId);
      const { lasso, moved } = gesture.current ?? {};
      if (lasso && moved) {
        select(own.chosen());
        own.lasso = [];
        redraw();
      } else if (!moved && own.pointers.size === 0) {
        const found = own.nearest(...at(event));
        if (found >= 0) open(found);
      }
    },
    onPointerCancel: (event) => { plot.current.pointers.delete(event.pointerId); },
    onPointerLeave: () => point(-1),
  };
}
