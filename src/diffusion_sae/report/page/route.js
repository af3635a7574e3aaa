// The address after # says all of what is shown, so that back, forward, reload and links work:
// #/latents/12?sae=sae0&sort=purity
import { useEffect, useState } from "preact/hooks";

export function parse(hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split("?");
  const [view = "", ...rest] = path.split("/").map(decodeURIComponent);
  return { view: view || "latents", rest, query: Object.fromEntries(new URLSearchParams(query ?? "")) };
}

export function link(view, rest = [], query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== undefined && value !== "" && value !== null);
  const text = new URLSearchParams(kept).toString();
  return `#/${[view, ...rest].map((part) => encodeURIComponent(part)).join("/")}${text ? `?${text}` : ""}`;
}

/** Changes the address without a step in the history: for what changes with each key. */
export function replace(hash) {
  history.replaceState(null, "", hash);
  dispatchEvent(new HashChangeEvent("hashchange"));
}

export function useRoute() {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const changed = () => setHash(location.hash);
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return parse(hash);
}
