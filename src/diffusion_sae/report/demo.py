"""The main job on the embedded model: images → features → k-SAE and probe → a page."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..analysis.maps import colour_maps, image_map
from ..analysis.probing import class_config, fit_linear, latent_features, layer_timestep_scores, pixel_features
from ..extraction.extractor import DiffusionFeatureExtractor
from ..extraction.sources import open_images
from ..features import FeatureSet, FeatureStore
from ..probes.configuration import DiffusionProbeConfig
from ..probes.modeling import DiffusionProbe
from ..probes.trainer import ProbeTrainer
from ..probes.training_args import ProbeTrainingArguments
from ..sae.configuration import KSparseAutoencoderConfig
from ..sae.modeling import KSparseAutoencoder
from ..sae.trainer import SAETrainer
from ..sae.training_args import SAETrainingArguments
from ..zoo import IMAGES
from .build import Bar, to_bytes
from .grids import Grid
from .sae import Trained, report_saes

MODEL, LAYER, TIMESTEP = "tiny-sd", "up_ft1", 50
GRID_LAYERS = ("down_ft2", "bottleneck", "up_ft0", "up_ft1", "up_ft2")
GRID_TIMESTEPS = (25, 50, 200, 500)
COLOUR_LAYERS = ("up_ft0", "up_ft1", "up_ft2")
"""Of the grid's, those with several positions an image."""
COLOUR_IMAGES = 40


@dataclass(frozen=True)
class DemoSize:
    """How much of the data and training the demo uses."""

    images: int | None = None
    """Images of each split; None: all."""
    epochs: float = 12.0
    grid_layers: tuple[str, ...] = GRID_LAYERS
    grid_timesteps: tuple[int, ...] = GRID_TIMESTEPS


QUICK = DemoSize(images=100, epochs=2.0, grid_layers=("bottleneck", LAYER), grid_timesteps=(TIMESTEP, 500))


@contextmanager
def _stage(bar: tqdm, name: str) -> Iterator[None]:
    bar.set_description(name)
    yield
    bar.update()


def run_demo(output_dir: str | Path, size: DemoSize | None = None) -> dict[str, Any]:
    """Everything from packaged images to a page; stores and the SAE's training resume after a kill.

    The layer and timestep are those of the embedded artifacts; the grid shows what a choice on validation would see.
    """
    size, folder = size or DemoSize(), Path(output_dir)
    with tqdm(total=6, unit="stage") as bar:
        with _stage(bar, "features of every layer and timestep"):
            grid = _extract(folder / "grid", size, ("train", "validation"), size.grid_layers, size.grid_timesteps)
        with _stage(bar, "probes over layers and timesteps"):
            scores = layer_timestep_scores(grid["train"], grid["validation"])
        with _stage(bar, "k-SAE"):
            sae, tokens = _train_sae(folder, size)
        with _stage(bar, "probe"):
            probe, accuracy, validation = _train_probe(folder, size)
        with _stage(bar, "baselines"):
            baselines = _baselines(folder, size)
        with _stage(bar, "page"):
            own = Trained(MODEL, sae, tokens, folder / "encoded", str(folder / "sae"))
            page = report_saes(
                folder,
                f"{MODEL}: what {LAYER} sees at t = {TIMESTEP}",
                [own],
                _images("validation", size),
                bars=[
                    Bar(f"{LAYER}, t = {TIMESTEP}", accuracy, "linear probe, mean-pooled", highlight=True),
                    *(Bar(name, value) for name, value in baselines.items()),
                ],
                grids=[_grid(size, scores)],
                maps=_maps(validation),
                colours=_colours(folder, size),
                predictions=probe.predict(validation[:]).softmax(1).numpy(),
                commands=["diffusion-sae demo"],
            )
    return {
        "figures": page["figures"],
        "label_purity": page["purity"],
        "label_purity_shuffled": page["shuffled_purity"],
        "probe_accuracy": accuracy,
        "baselines": baselines,
        "sae": str(folder / "sae"),
        "probe": str(folder / "probe"),
        "page": page["page"],
    }


def _maps(pooled: FeatureSet) -> dict[str, np.ndarray]:
    """By UMAP as well, where it is installed: `pip install 'diffusion-sae[maps]'`."""
    maps = {"PCA of the pooled features": image_map(pooled, "pca").points}
    if importlib.util.find_spec("umap") is not None:
        maps = {"UMAP of the pooled features": image_map(pooled, "umap").points, **maps}
    return maps


def _colours(folder: Path, size: DemoSize) -> dict[tuple[str, int], np.ndarray]:
    """Principal components of the positions of some images at each layer and timestep, in 0…255."""
    store = _extract(folder / "colours", size, ("validation",), COLOUR_LAYERS, size.grid_timesteps, pooling="tokens")[
        "validation"
    ]
    images = range(min(COLOUR_IMAGES, len(store)))
    return {cell: to_bytes(maps.rgb) for cell, maps in colour_maps(store, images).items()}


def _grid(size: DemoSize, scores: Any) -> Grid:
    return Grid(
        "linear probe",
        size.grid_layers,
        size.grid_timesteps,
        [[scores[layer, t].validation for t in size.grid_timesteps] for layer in size.grid_layers],
        (LAYER, TIMESTEP),
        "Validation accuracy of a linear probe on mean-pooled features.",
    )


def _images(split: str, size: DemoSize) -> Any:
    return open_images(IMAGES, split).first(size.images)


def _extract(
    folder: Path,
    size: DemoSize,
    splits: tuple[str, ...],
    layers: tuple[str, ...],
    timesteps: tuple[int, ...],
    **settings: Any,
) -> dict[str, FeatureStore]:
    extractor = DiffusionFeatureExtractor.from_pretrained(MODEL, layers=layers, timesteps=timesteps, **settings)
    return {
        split: extractor.extract(IMAGES, folder / split, split=split, batch_size=100, limit=size.images)
        for split in splits
    }


def _train_sae(folder: Path, size: DemoSize) -> tuple[KSparseAutoencoder, FeatureSet]:
    stores = _extract(folder / "tokens", size, ("train", "validation"), (LAYER,), (TIMESTEP,), pooling="tokens")
    train, validation = (stores[s].select(LAYER, TIMESTEP) for s in ("train", "validation"))
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=train.d_in, expansion_factor=16, k=16))
    args = SAETrainingArguments(
        output_dir=str(folder / "sae"),
        learning_rate=1e-3,
        warmup_steps=50,
        batch_size=1024,
        num_train_epochs=size.epochs,
        dead_after_rows=100_000,
        save_steps=200,
    )
    SAETrainer(sae, train, args, eval_features=validation).train()
    return sae, validation


def _train_probe(folder: Path, size: DemoSize) -> tuple[DiffusionProbe, float, FeatureSet]:
    sets = _one_cell(folder, size)
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=sets["train"].d_in, **class_config(sets["train"])))
    args = ProbeTrainingArguments(output_dir=str(folder / "probe"))
    trainer = ProbeTrainer(probe, sets["train"], args, validation_features=sets["validation"])
    trainer.train(progress=False)
    accuracy = trainer.evaluate(sets["test"]).accuracy
    trainer.save()
    return probe, accuracy, sets["validation"]


def _one_cell(folder: Path, size: DemoSize, **settings: Any) -> dict[str, FeatureSet]:
    """Mean-pooled features of the page's layer and timestep in all splits."""
    name = "random" if settings else "pooled"
    stores = _extract(folder / name, size, ("train", "validation", "test"), (LAYER,), (TIMESTEP,), **settings)
    return {split: store.select(LAYER, TIMESTEP) for split, store in stores.items()}


def _baselines(folder: Path, size: DemoSize) -> dict[str, float]:
    """Test accuracy of the same probe on less: pixels, VAE latents, the same network with random weights."""
    splits = ("train", "validation", "test")
    extractor = DiffusionFeatureExtractor.from_pretrained(MODEL, layers=(LAYER,), timesteps=(TIMESTEP,))
    sides = extractor.backbone.image_size
    sets = {
        "raw pixels": [pixel_features(_images(s, size), sides) for s in splits],
        "VAE latents": [latent_features(extractor, _images(s, size)) for s in splits],
        "random weights": list(_one_cell(folder, size, random_weights=True).values()),
    }
    return {name: fit_linear(*three).test_accuracy for name, three in sets.items()}
