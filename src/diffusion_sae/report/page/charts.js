// Charts as SVG or plain elements; each says in words what it shows.
import { html } from "htm/preact";
import { number, percent } from "./format.js";

const WIDTH = 320;
const HEIGHT = 150;
const LEFT = 38;
const BOTTOM = 24;

/** How many images lie in each bin between 0 and `max`; heights grow with the logarithm, as few fire strongly. */
export function Histogram({ bins, max, of }) {
  const most = Math.max(...bins);
  const high = (n) => (n ? ((HEIGHT - BOTTOM - 8) * Math.log1p(n)) / Math.log1p(most) : 0);
  const wide = (WIDTH - LEFT) / bins.length;
  const ticks = [...new Set([1, 10 ** Math.floor(Math.log10(most) / 2), most])].filter((n) => n >= 1);
  const shown = ticks.filter((n, i) => i === ticks.length - 1 || high(ticks[i + 1]) - high(n) > 12);
  return html`<svg class="chart" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img"
    aria-label=${`Histogram of ${of}: from 0 to ${number(max)}, at most ${most} images a bin`}>
    ${shown.map((n) => html`<g class="tick"><line x1=${LEFT} x2=${WIDTH} y1=${HEIGHT - BOTTOM - high(n)} y2=${HEIGHT - BOTTOM - high(n)} />
      <text x=${LEFT - 5} y=${HEIGHT - BOTTOM - high(n) + 4} text-anchor="end">${n}</text></g>`)}
    ${Array.from(bins, (n, i) => html`<rect class="bar" x=${LEFT + i * wide + 0.5} width=${wide - 1} y=${HEIGHT - BOTTOM - high(n)} height=${high(n)}>
      <title>${number((max * i) / bins.length)} to ${number((max * (i + 1)) / bins.length)}: ${n} images</title></rect>`)}
    <line class="axis" x1=${LEFT} x2=${WIDTH} y1=${HEIGHT - BOTTOM} y2=${HEIGHT - BOTTOM} />
    ${[0, 0.5, 1].map((t) => html`<text x=${LEFT + t * (WIDTH - LEFT)} y=${HEIGHT - 7} text-anchor=${["start", "middle", "end"][2 * t]}>${number(t * max)}</text>`)}
  </svg>`;
}

/** Values over timesteps, from noise-free on the left. */
export function TimestepLine({ timesteps, values, format, of }) {
  const top = Math.max(...values) || 1;
  const order = timesteps.map((_, i) => i).sort((a, b) => timesteps[a] - timesteps[b]);
  const x = (n) => LEFT + 12 + (n * (WIDTH - LEFT - 30)) / Math.max(1, order.length - 1);
  const y = (v) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - 14) * v) / top;
  return html`<svg class="chart" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img"
    aria-label=${`${of}: ${order.map((i) => `${format(values[i])} at t = ${timesteps[i]}`).join(", ")}`}>
    ${[0, 0.5, 1].map((t) => html`<g class="tick"><line x1=${LEFT} x2=${WIDTH} y1=${y(t * top)} y2=${y(t * top)} />
      <text x=${LEFT - 5} y=${y(t * top) + 4} text-anchor="end">${format(t * top)}</text></g>`)}
    <polyline class="line" points=${order.map((i, n) => `${x(n)},${y(values[i])}`).join(" ")} />
    ${order.map((i, n) => html`<circle class="dot" cx=${x(n)} cy=${y(values[i])} r="3.5"><title>t = ${timesteps[i]}: ${format(values[i])}</title></circle>
      <text x=${x(n)} y=${HEIGHT - 7} text-anchor="middle">${timesteps[i]}</text>`)}
  </svg>`;
}

/** Shares as bars, each with a mark where another share lies, such as of all images. */
export function Shares({ rows, mark }) {
  const most = Math.max(...rows.map((row) => Math.max(row.share, row.base ?? 0)), 1e-9);
  return html`<ul class="shares">${rows.map(({ name, share, base, href }) => html`<li>
    <span class="head">${href ? html`<a href=${href}><bdi>${name}</bdi></a>` : html`<bdi>${name}</bdi>`}<span>${percent(share)}</span></span>
    <span class="track"><span class="fill" style=${{ width: `${(100 * share) / most}%` }} />
      ${base !== undefined && html`<span class="mark" title=${`${mark}: ${percent(base)}`} style=${{ left: `${(100 * base) / most}%` }} />`}</span>
  </li>`)}</ul>`;
}
