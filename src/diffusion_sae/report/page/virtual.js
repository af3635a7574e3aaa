// A grid of which only what is on the screen exists: it scrolls with the page, however many cells there are.
import { html } from "htm/preact";
import { useLayoutEffect, useRef, useState } from "preact/hooks";

const AHEAD = 2; // rows beyond each edge of the screen, so that the keyboard always finds a next one

export function VirtualGrid({ count, least, height, gap = 16, cell, label }) {
  const box = useRef();
  const [place, setPlace] = useState({ columns: 1, from: 0, to: 12 });
  useLayoutEffect(() => {
    let frame = 0;
    const measure = () => {
      frame = 0;
      if (!box.current) return;
      const { top, width } = box.current.getBoundingClientRect();
      const columns = Math.max(1, Math.floor((width + gap) / (least + gap)));
      const from = Math.max(0, Math.floor(-top / (height + gap)) - AHEAD);
      const to = Math.ceil((innerHeight - top) / (height + gap)) + AHEAD;
      setPlace((old) => (old.columns === columns && old.from === from && old.to === to ? old : { columns, from, to }));
    };
    const soon = () => (frame ||= requestAnimationFrame(measure));
    measure();
    const watcher = new ResizeObserver(soon);
    watcher.observe(box.current);
    addEventListener("scroll", soon, { passive: true });
    addEventListener("resize", soon);
    return () => {
      cancelAnimationFrame(frame);
      watcher.disconnect();
      removeEventListener("scroll", soon);
      removeEventListener("resize", soon);
    };
  }, [count, least, height, gap]);

  const { columns, from, to } = place;
  const rows = Math.ceil(count / columns);
  const first = Math.min(from, Math.max(0, rows - 1)) * columns;
  const last = Math.min(count, Math.max(to, 0) * columns);
  const cells = [];
  for (let n = first; n < last; n++) {
    const [key, content] = cell(n);
    const style = {
      top: `${Math.floor(n / columns) * (height + gap)}px`,
      left: `calc((100% + ${gap}px) / ${columns} * ${n % columns})`,
      width: `calc((100% + ${gap}px) / ${columns} - ${gap}px)`,
      height: `${height}px`,
    };
    cells.push(html`<li key=${key} style=${style} aria-posinset=${n + 1} aria-setsize=${count} data-n=${n}>${content}</li>`);
  }
  const move = (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const here = event.target.closest("li[data-n]");
    if (!steps || !here || event.target.tagName === "INPUT") return;
    const next = box.current.querySelector(`li[data-n="${Number(here.dataset.n) + steps}"] a`);
    if (!next) return;
    event.preventDefault();
    next.focus();
  };
  return html`<ul class="virtual" role="list" aria-label=${label} ref=${box} onKeyDown=${move}
    style=${{ height: `${Math.max(0, rows * (height + gap) - gap)}px` }}>${cells}</ul>`;
}
