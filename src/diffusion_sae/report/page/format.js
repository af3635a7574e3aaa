export const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)}%`;

/** A share with three significant digits. */
export function share(x) {
  if (x === 0) return "0%";
  if (x < 1e-5) return "<0.001%";
  return `${Number((100 * x).toPrecision(3))}%`;
}

export function number(x) {
  const size = Math.abs(x);
  if (size >= 1000) return Math.round(x).toLocaleString("en");
  if (size >= 0.01 || size === 0) return x.toFixed(2);
  return x.toPrecision(2);
}

export const count = (n) => n.toLocaleString("en");
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
