// Bundles this folder into ../static, and records what it was made of: a test compares that with the sources.
import { createHash } from "node:crypto";
import { copyFileSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const out = new URL("../static/", import.meta.url).pathname;
const here = new URL("./", import.meta.url).pathname;
const notice = ["preact", "htm"]
  .map((name) => `${name} ${JSON.parse(readFileSync(`${here}node_modules/${name}/package.json`)).version}`)
  .join(", ");

await build({
  absWorkingDir: here,
  entryPoints: { browser: "main.js" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  charset: "ascii",
  legalComments: "none",
  banner: { js: `/* With ${notice}; licences in LICENSES.txt. */` },
});
copyFileSync(`${here}index.html`, `${out}index.html`);
const licences = ["preact", "htm"].map((name) => `${name}\n\n${readFileSync(`${here}node_modules/${name}/LICENSE`, "utf8")}`);
writeFileSync(`${out}LICENSES.txt`, `${licences.join("\n\n").replace(/[ \t]+$/gm, "").trimEnd()}\n`);

const hash = (path) => createHash("sha256").update(readFileSync(path)).digest("hex");
const sources = readdirSync(here).filter((name) => /\.(js|mjs|css|html|json)$/.test(name)).sort();
const made = ["LICENSES.txt", "browser.css", "browser.js", "index.html"];
const record = {
  sources: Object.fromEntries(sources.map((name) => [name, hash(here + name)])),
  made: Object.fromEntries(made.map((name) => [name, hash(out + name)])),
};
writeFileSync(`${out}hashes.json`, `${JSON.stringify(record, null, 2)}\n`);
