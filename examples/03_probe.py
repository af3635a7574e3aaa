"""Labels from the embedded probe.

python examples/03_probe.py
"""

from transformers import pipeline

import diffusion_sae  # noqa: F401  registers the pipeline
from diffusion_sae.extraction.sources import open_images

source = open_images("fashion-mnist-mini", "test")
classify = pipeline("diffusion-probe")
for i in range(3):
    best = classify(source.read(i))[0]
    print(f"{source.class_names[source.labels[i]]}: {best['label']} ({best['score']:.2f})")
