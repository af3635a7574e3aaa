"""Features of images at two layers and two timesteps.

python examples/01_features.py
"""

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.extraction.sources import open_images

source = open_images("fashion-mnist-mini", "test")
extractor = DiffusionFeatureExtractor.from_pretrained("tiny-sd", layers=["bottleneck", "up_ft1"], timesteps=[25, 400])
features = extractor([source.read(i) for i in range(4)])
for (layer, timestep), values in features.items():
    print(f"{layer} at t = {timestep}: {tuple(values.shape)}")
