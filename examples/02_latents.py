"""Which latents of the embedded SAE fire on an image, and where.

python examples/02_latents.py
"""

from diffusion_sae import DiffusionFeatureExtractor, KSparseAutoencoder
from diffusion_sae.extraction.sources import open_images

NAME = "tiny-sd-up1-t50"
sae = KSparseAutoencoder.from_pretrained(NAME)
extractor = DiffusionFeatureExtractor.from_pretrained(NAME)
(features,) = extractor(open_images("fashion-mnist-mini", "test").read(0)).values()  # (1, 16, 96)
acts = sae.encode(features[0]).to_dense(sae.config.num_latents)  # (16, num_latents)
for latent in acts.amax(0).topk(3).indices.tolist():
    print(f"latent {latent}: strongest at position {acts[:, latent].argmax().item()} of the 4 × 4 grid")
