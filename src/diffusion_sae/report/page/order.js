// Which latents are shown, and in what order.
import { nameOf } from "./names.js";

export const SORTS = {
  purity: "purity of the top images",
  max: "largest activation",
  density: "density",
  class: "class",
  name: "name",
  index: "number",
};
export const RANGES = {
  density: { label: "Density", unit: "%", scale: 100 },
  max: { label: "Largest activation", unit: "", scale: 1 },
  purity: { label: "Purity", unit: "%", scale: 100 },
};
const DESCENDING = new Set(["purity", "max", "density"]);

export const defaultSort = (sae) => (sae.measured ? "purity" : "max");
export const descends = (sort, query) => (query.dir ? query.dir === "down" : DESCENDING.has(sort));

/** Rows of the table that fit the query, as the page lists them. */
export function chosen(sae, query) {
  const { table } = sae;
  const sort = SORTS[query.sort] ? query.sort : defaultSort(sae);
  const words = (query.q ?? "").trim().toLowerCase();
  const limits = Object.entries(RANGES).flatMap(([key, { scale }]) => [
    [table[key], 1, query[`${key}From`], scale],
    [table[key], -1, query[`${key}To`], scale],
  ]).filter(([, , limit]) => limit !== undefined && limit !== "" && Number.isFinite(Number(limit)));
  const names = words || sort === "name" ? Array.from(table.index, (_, i) => nameOf(sae, i)) : null;
  const rows = [];
  for (let i = 0; i < table.index.length; i++) {
    if (query.class !== undefined && table.label[i] !== Number(query.class)) continue;
    if (query.own && nameOf(sae, i).by !== "you") continue;
    // a latent without a purity (NaN) lies in no range of purities
    if (!limits.every(([values, sign, limit, scale]) => sign * values[i] * scale >= sign * Number(limit) - 1e-9)) continue;
    if (words && !fits(words, sae, i, names[i])) continue;
    rows.push(i);
  }
  return rows.sort(comparison(sae, sort, descends(sort, query), names));
}

function fits(words, sae, i, name) {
  const { table, classes } = sae;
  if (/^#?\d+$/.test(words)) return table.index[i] === Number(words.replace("#", ""));
  const label = table.label[i] >= 0 ? classes[table.label[i]] : "";
  return [name.text, name.runnerUp ?? "", label].some((text) => text.toLowerCase().includes(words));
}

function comparison(sae, sort, down, names) {
  const { table, classes } = sae;
  const sign = down ? -1 : 1;
  const rest = (a, b) => table.max[b] - table.max[a] || a - b;
  if (sort === "index") return (a, b) => sign * (a - b);
  if (sort === "name" || sort === "class") {
    const text = sort === "name" ? (i) => names[i].text : (i) => (table.label[i] >= 0 ? classes[table.label[i]] : "");
    const collator = new Intl.Collator("en", { numeric: true });
    return (a, b) => {
      const [left, right] = [text(a), text(b)];
      if (!left !== !right) return left ? -1 : 1; // without a name: last, whatever the direction
      return sign * collator.compare(left, right) || rest(a, b);
    };
  }
  const values = table[sort];
  return (a, b) => {
    const missing = Number.isNaN(values[a]) - Number.isNaN(values[b]);
    return missing || (Number.isNaN(values[a]) ? 0 : sign * (values[a] - values[b])) || rest(a, b);
  };
}
