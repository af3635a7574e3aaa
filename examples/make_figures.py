"""The figures of docs/figures.md, of the embedded model and artifacts alone.

    python examples/make_figures.py [--out docs/figures] [--quick]

Extracts what they show from the packaged images, trains two small SAEs, and draws; with the versions of constraints.txt
the files are the same bytes on one machine. Progress goes to stderr.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_sae import (
    DiffusionFeatureExtractor,
    FeatureStore,
    KSparseAutoencoder,
    KSparseAutoencoderConfig,
    SAETrainer,
    SAETrainingArguments,
)
from diffusion_sae.analysis.maps import colour_maps, image_map
from diffusion_sae.analysis.probing import best_cell, layer_timestep_scores
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.report.figures.curves import Curve, curves, training_curves
from diffusion_sae.report.figures.densities import density_histogram
from diffusion_sae.report.figures.grids import heat_map
from diffusion_sae.report.figures.maps import colour_map_figure, image_map_figure
from diffusion_sae.report.figures.sheets import firing_sheet
from diffusion_sae.report.figures.style import save_figure
from diffusion_sae.sae.encoding import encode_features
from diffusion_sae.zoo import IMAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, SAE = "tiny-sd", "tiny-sd-up1-t50"
LAYERS = ("down_ft1", "down_ft2", "bottleneck", "up_ft0", "up_ft1", "up_ft2")
TIMESTEPS = (1, 50, 200, 500, 900)
DPI, COLOURS = 110, 128  # a page's column at 990 pixels; files of some ten kilobytes


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def extract(folder: Path, split: str, limit: int | None, model: str = MODEL, **settings: object) -> FeatureStore:
    extractor = DiffusionFeatureExtractor.from_pretrained(model, **settings)
    return extractor.extract(IMAGES, folder, split=split, batch_size=100, limit=limit, progress=False)


def layers_and_timesteps(work: Path, limit: int | None) -> dict[str, "Figure"]:
    """Validation accuracy of linear probes on mean-pooled features."""
    cells = {"layers": LAYERS, "timesteps": TIMESTEPS}
    stores = [extract(work / split, split, limit, **cells) for split in ("train", "validation")]
    scores = layer_timestep_scores(*stores)
    table = [[scores[layer, t].validation for t in TIMESTEPS] for layer in LAYERS]
    best = best_cell(scores)
    title = f"{MODEL}, linear probe on mean-pooled features, 10 classes of clothes"
    lines = {layer: Curve(TIMESTEPS, [100 * value for value in row]) for layer, row in zip(LAYERS, table, strict=True)}
    axes = {"x_label": "timestep", "y_label": "validation accuracy (%)", "x_scale": "even"}
    return {
        "layers-timesteps": heat_map(table, LAYERS, TIMESTEPS, title=title, chosen=best, label="validation accuracy"),
        "layer-curves": curves(lines, title=title, **axes),
    }


def latents(work: Path, limit: int | None) -> dict[str, "Figure"]:
    """Of the embedded SAE: its sheet, and a map of the images by their features."""
    sae, store = KSparseAutoencoder.from_pretrained(SAE), extract(work / "tokens", "validation", limit, model=SAE)
    source, features = open_images(IMAGES, "validation").first(limit), store.select(*_cell(store))
    found = image_map(features, "pca")
    labels = features.image_labels
    title = f"{SAE}: images by two principal components of their features"
    return {
        "latents": firing_sheet(sae, features, source, count=6, title=f"{SAE}: latents of the purest labels"),
        "images": image_map_figure(
            found, None if labels is None else labels.numpy(), features.class_names, title=title
        ),
    }


def _cell(store: FeatureStore) -> tuple[str, int]:
    return store.layers[0], store.timesteps[0]


def trainings(work: Path, limit: int | None, *, steps: int) -> dict[str, "Figure"]:
    """Two SAEs of another k on the features of the embedded one."""
    train = extract(work / "train-tokens", "train", limit, model=SAE)
    held = extract(work / "tokens", "validation", limit, model=SAE)
    features, validation = train.select(*_cell(train)), held.select(*_cell(held))
    histories, densities = {}, {}
    for k in (8, 32):
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=features.d_in, expansion_factor=16, k=k))
        args = SAETrainingArguments(
            output_dir=str(work / f"k{k}"),
            max_steps=steps,
            batch_size=1024,
            logging_steps=max(1, steps // 40),
            eval_steps=steps // 5,
        )
        histories[f"k = {k}"] = SAETrainer(sae, features, args).train(progress=False).history
        encoded = encode_features(sae, validation, work / f"codes{k}", progress=False)
        densities[f"k = {k}"] = encoded.density()
        say(f"trained k = {k}")
    metrics = ["loss", "fvu", "dead_latents"]
    return {
        "training": training_curves(histories, metrics=metrics, title="two SAEs on the features of up_ft1 at t = 50"),
        "density": density_histogram(densities, title="two SAEs, on validation images", of="positions"),
    }


def positions(work: Path, limit: int | None) -> dict[str, "Figure"]:
    """Four images of other classes at the finest layers."""
    cells = {"layers": ("up_ft1", "up_ft2"), "timesteps": (1, 200, 500), "pooling": "tokens"}
    store = extract(work / "positions", "validation", limit, **cells)
    labels = store.select(*_cell(store)).image_labels
    assert labels is not None
    chosen = [int((labels == label).nonzero()[0]) for label in (1, 3, 8, 9)]
    source = open_images(IMAGES, "validation")
    pictures = [source.read(image) for image in chosen]
    title = f"{MODEL}: three principal components of the positions, as colour"
    return {"positions": colour_map_figure(colour_maps(store, chosen), pictures, title=title)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the PNG files")
    parser.add_argument("--quick", action="store_true", help="100 images a split, 20 steps: the same path, for tests")
    args = parser.parse_args()
    limit, steps = (100, 20) if args.quick else (None, 600)
    with tempfile.TemporaryDirectory() as name:
        for make in (layers_and_timesteps, latents, partial(trainings, steps=steps), positions):
            for file, figure in make(Path(name), limit).items():
                say(str(save_figure(figure, args.out / f"{file}.png", dpi=DPI, colours=COLOURS)))


if __name__ == "__main__":
    main()
