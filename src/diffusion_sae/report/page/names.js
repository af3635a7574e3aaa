// Names that a person gives to latents. They are kept by the browser, for the SAE with these very weights; served by
// `diffusion-sae browse` they are also written beside the SAE.
import { useEffect, useState } from "preact/hooks";
import { live, savedNames, saveNames } from "./server.js";

const LONGEST = 200;
const listeners = new Set();
const kept = new Map();
const keyOf = (sae) => `diffusion-sae names ${sae.fingerprint}`;

function read(sae) {
  try {
    const content = JSON.parse(localStorage.getItem(keyOf(sae)) ?? "{}");
    return Object.fromEntries(Object.entries(content).filter(([i, name]) => /^\d+$/.test(i) && typeof name === "string"));
  } catch (error) {
    // storage that is switched off, or holds what something else wrote: names then last as long as the page
    if (error instanceof DOMException || error instanceof SyntaxError) return {};
    throw error;
  }
}

export function ownNames(sae) {
  if (!kept.has(sae.fingerprint)) kept.set(sae.fingerprint, read(sae));
  return kept.get(sae.fingerprint);
}

/** Where there is a server, the names that it keeps are the names. */
export async function fetchNames(sae) {
  if (live) kept.set(sae.fingerprint, await savedNames(sae));
}

/** What a latent is called, by whom, how well the name does, and what else it might be called. */
export function nameOf(sae, i) {
  const { table, classes } = sae;
  const latent = table.index[i];
  const own = ownNames(sae)[latent];
  if (own) return { text: own, by: "you" };
  const text = table.text?.names?.[i];
  if (text) {
    const { scores, runnersUp, chances, unit } = table.text;
    return { text, by: "report", score: scores[i], unit, runnerUp: runnersUp[i], chance: chances[i] };
  }
  if (table.label[i] >= 0) return { text: classes[table.label[i]], by: "class" };
  return { text: "", by: "" };
}

/** Sets a name, or with an empty text takes it back; resolves to where it was saved. */
export async function setNames(sae, changes) {
  const names = ownNames(sae);
  for (const [latent, text] of Object.entries(changes)) {
    const name = text.trim().slice(0, LONGEST);
    if (name) names[latent] = name;
    else delete names[latent];
  }
  let where = "in this browser";
  try {
    localStorage.setItem(keyOf(sae), JSON.stringify(names));
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    where = "until the page is closed: this browser keeps nothing";
  }
  listeners.forEach((listener) => listener({}));
  const saved = await saveNames(sae, changes);
  return saved ?? where;
}

/** Renders again whenever a name changes. */
export function useNames() {
  const [, again] = useState({});
  useEffect(() => {
    listeners.add(again);
    return () => listeners.delete(again);
  }, []);
}

export function download(sae) {
  const content = { sae: sae.name, weights: sae.fingerprint, names: ownNames(sae) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  const anchor = Object.assign(document.createElement("a"), { href: url, download: "names.json" });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Takes the names of a downloaded file; the error says what is wrong with one that is of something else. */
export async function upload(sae, file) {
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch (error) {
    if (error instanceof SyntaxError) throw new Error("This file is no JSON.");
    throw error;
  }
  if (typeof content?.names !== "object") throw new Error("This file holds no names.");
  if (content.weights !== sae.fingerprint) throw new Error("These names are of an SAE with other weights.");
  const good = Object.entries(content.names).filter(([i, name]) => sae.position.has(Number(i)) && typeof name === "string");
  return setNames(sae, Object.fromEntries(good));
}
