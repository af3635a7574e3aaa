// What `diffusion-sae browse` adds. A page opened from the disk has no server, and asks for nothing.

const token = document.querySelector('meta[name="diffusion-sae-browse"]')?.content;

/** Whether the page is served by `diffusion-sae browse`. */
export const live = token !== undefined;

async function ask(path, options = {}) {
  const response = await fetch(`/api/${path}`, { ...options, headers: { "X-Diffusion-Sae": token, ...options.headers } });
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

/** Resolves to what is said of where the names are; to undefined where there is no server. */
export async function saveNames(sae, names) {
  if (!live) return undefined;
  const { saved } = await ask(`names/${sae.key}`, { method: "POST", body: JSON.stringify(names) });
  return saved;
}

/** Names by latent, of those that people named. */
export const savedNames = (sae) => ask(`names/${sae.key}`);

/** Which latents fire in an image, and where. */
export const encode = (sae, file) => ask(`encode/${sae.key}`, { method: "POST", body: file });

/** What the server can do with an SAE: encode images, search by text. */
export const abilities = (sae) => (live ? ask(`abilities/${sae.key}`) : Promise.resolve({ encode: false, text: false }));

export const searchText = (sae, text) => ask(`search/${sae.key}`, { method: "POST", body: JSON.stringify({ text }) });
