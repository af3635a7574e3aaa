"""Runs every family of diffusion models through the extractor and writes the table of docs/families.md.

    python benchmarks/families.py --out docs/families.md

Each is built small from the real classes with random weights (tests/tiny_pipelines.py); the table says what was found
in running it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.extraction.backbone import DiffusionBackbone
from diffusion_sae.extraction.families import FAMILIES
from diffusion_sae.provenance import ExtractorConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the small pipelines

HEAD = """# Families of diffusion models

Written by `python benchmarks/families.py --out docs/families.md`, which builds each family small from its real classes
(random weights, 32 px) and runs it. *Told* is how the pipeline tells its denoiser the time, *line* whether the family
needs one in `extraction/families.py`. *Batch* is the largest difference between an image's features alone and in a
batch of three, *exit* between a layer asked for alone and with all others, both relative to the largest feature, in
fp32. Layers are given as width @ stride in pixels of the small model.

Stable Diffusion 1.5, 2.1, SDXL and DiT-XL/2 are built at their true size in `tests/extraction/test_published_sizes.py`.

| family | pipeline | denoiser | noise | told | line | layers | batch | exit |
|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
Any module can be named by its dotted path beside these (attention and MLP outputs, blocks within U-Nets), and `:diff`
behind a name gives what the module adds to its input.

Vision encoders of transformers (DINOv2, DINOv3, CLIP, SigLIP, ViT) serve as baselines through the same call, with
`timesteps=(0,)`; `tests/extraction/test_encoders.py` runs them.
"""


def within(difference: float) -> str:
    """The bound that the difference keeps: its digits differ from machine to machine."""
    if difference == 0:
        return "0"
    return next((f"≤ {bound:.0e}" for bound in (1e-5, 1e-4) if difference <= bound), f"{difference:.0e}")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def row(family: str, pipeline: Any, size: int) -> str:
    backbone = DiffusionBackbone(pipeline, image_size=size)
    infos = backbone.available_layers()
    names = tuple(info.name for info in infos)

    def features(layers: tuple[str, ...], images: list[Image.Image]) -> Any:
        config = ExtractorConfig(model=family, layers=layers, timesteps=(25,), image_size=size)
        return DiffusionFeatureExtractor(pipeline, config)(images)

    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    together, alone = features(names, images), features(names, images[1:2])
    batch = max(relative(alone[name, 25][0], together[name, 25][1]) for name in names)
    early = max(relative(features((name,), images)[name, 25], together[name, 25]) for name in names)
    layers = ", ".join(f"{info.name} {info.channels} @ {info.stride}" for info in infos)
    cells = (
        family,
        type(pipeline).__name__,
        type(backbone.denoiser).__name__,
        {"vp": "variance-preserving", "flow": "flow matching", "edm": "EDM"}[backbone.schedule.kind],
        backbone.conditioning("").time_form,
        "yes" if type(backbone.denoiser).__name__ in FAMILIES else "no",
        layers,
        within(batch),
        within(early),
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    from tiny_pipelines import BUILDERS, SIZE, build_seeded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for family, builder in BUILDERS.items():
        rows.append(row(family, build_seeded(builder), SIZE))
        print(rows[-1], flush=True)
    args.out.write_text(HEAD + "\n".join(rows) + "\n" + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main()
