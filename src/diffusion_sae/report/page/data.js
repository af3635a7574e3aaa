// The report's files. A page opened from the disk may run scripts but not fetch, so each file is a script that calls
// `report(name, header, packed)`; see packing.py.

const base = new URL(".", document.currentScript.src).href + "data/";
const TYPES = { u1: Uint8Array, u2: Uint16Array, i4: Int32Array, f4: Float32Array };
const KEPT = 300;
const waiting = new Map();
const cache = new Map();

export const address = (file) => base + file;

globalThis.report = (name, header, packed) => {
  const { resolve, reject } = waiting.get(name);
  waiting.delete(name);
  unpack(header, packed).then(resolve, reject);
};

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack({ text, arrays }, packed) {
  const content = { text, shape: {} };
  if (!packed) return content;
  const stream = new Blob([bytesOf(packed)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  let offset = 0;
  for (const [name, type, shape] of arrays) {
    const length = shape.reduce((a, b) => a * b, 1);
    content[name] = new TYPES[type](buffer, offset, length);
    content.shape[name] = shape;
    offset += Math.ceil((length * TYPES[type].BYTES_PER_ELEMENT) / 4) * 4;
  }
  return content;
}

/** Row i of an array of several dimensions. */
export function row(content, name, i) {
  const width = content.shape[name].slice(1).reduce((a, b) => a * b, 1);
  return content[name].subarray(i * width, (i + 1) * width);
}

function request(name) {
  return new Promise((resolve, reject) => {
    waiting.set(name, { resolve, reject });
    const script = document.createElement("script");
    script.src = `${address(name)}.js`;
    script.onload = () => script.remove();
    script.onerror = () => reject(new Error(`The report lacks its file ${name}.js. Make it anew.`));
    document.head.append(script);
  });
}

/** A file's content; the ones that were last used are kept. */
export function load(name) {
  const found = cache.get(name) ?? request(name);
  cache.delete(name);
  cache.set(name, found);
  if (cache.size > KEPT) cache.delete(cache.keys().next().value);
  return found;
}

const number4 = (n) => String(n).padStart(4, "0");

/** Opens one SAE of the report: its table of latents, and what leads from there to the blocks. */
export async function openSae(about) {
  const { key, sizes } = about;
  const table = await load(`${key}/latents`);
  const position = new Map();
  table.index.forEach((latent, i) => position.set(latent, i));
  return {
    ...about,
    table,
    /** Place of a latent in the table; undefined for one that fires nowhere. */
    position,
    latentBlock: async (i) => ({ block: await load(`${key}/latents-${number4(Math.floor(i / sizes.block))}`), at: i % sizes.block }),
    imageBlock: async (i) => ({ block: await load(`${key}/images-${number4(Math.floor(i / sizes.block))}`), at: i % sizes.block }),
    classBlock: async (c) => ({ block: await load(`${key}/classes-${number4(Math.floor(c / sizes.classes))}`), at: c % sizes.classes }),
    allClasses: () => load(`${key}/classes-all`),
  };
}
