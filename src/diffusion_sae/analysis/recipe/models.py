"""What a recipe does differently for SAEs and for probes."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..._files import write_atomically
from ...extraction.sources import open_images
from ...features import FeatureSet, FeatureStore
from ...probes.configuration import DiffusionProbeConfig
from ...probes.modeling import DiffusionProbe
from ...probes.trainer import ProbeTrainer
from ...sae.evaluation import evaluate_sae
from ...sae.latent_table import LATENTS_NAME, SHEET_NAME, LatentTable
from ...sae.modeling import KSparseAutoencoder
from ...sae.training_args import SAETrainingArguments
from ..latent_sheet import latent_sheet
from ..latent_table import table_of
from ..latents import label_purity, latent_statistics, shuffled_labels
from ..probing import class_config
from ..training import train_sae
from .config import Recipe

Features = Mapping[str, FeatureSet]


class _Model:
    def __init__(self, recipe: Recipe, folder: Path, device: str) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.training = recipe.training_arguments(str(folder / "trained"))


class SAEModel(_Model):
    """A k-sparse autoencoder, with the table of its latents."""

    training: SAETrainingArguments

    def train(self, features: Features) -> None:
        train_sae(features["train"], self.recipe.model, self.training, device=self.device)

    def measure(self, features: Features, store: FeatureStore) -> dict[str, Any]:
        """Metrics on the test images; the table of latents and its picture go into files."""
        described = features[self.recipe.described]
        sae = KSparseAutoencoder.from_pretrained(self.folder / "trained").to(self.device)
        measured: dict[str, Any] = {}
        if self.recipe.described == "test":
            measured["test"] = dataclasses.asdict(evaluate_sae(sae, described))
        statistics = latent_statistics(sae, described, self.recipe.latents.images_per_latent)
        data = self.recipe.data
        split = self.recipe.splits[self.recipe.described]
        table = table_of(statistics, described, dataset=data.dataset, split=split, labels=data.labels)
        table.save(self.folder / LATENTS_NAME)
        self._draw(table, store, split)
        of_latents: dict[str, Any] = {"active": (table.density > 0).float().mean().item()}
        if described.image_labels is not None:
            labels = described.image_labels
            found = label_purity(statistics, labels)
            shuffled = label_purity(statistics, shuffled_labels(labels))
            of_latents |= {"label_purity": found.mean, "label_purity_shuffled": shuffled.mean}
            of_latents["latents_with_purity"] = len(found.latents)
        return measured | {"latents": {k: v for k, v in of_latents.items() if v is not None}}

    def _draw(self, table: LatentTable, store: FeatureStore, split: str) -> None:
        if table.most_interpretable(1):
            sheet = latent_sheet(table, images_by_id(store, self.recipe.data.dataset, split, self.recipe.data.limit))
            write_atomically(self.folder / SHEET_NAME, lambda path: path.write_bytes(sheet))

    def finished(self) -> KSparseAutoencoder:
        """The trained SAE with what is known of its latents."""
        sae = KSparseAutoencoder.from_pretrained(self.folder / "trained")
        sae.latents = LatentTable.load(self.folder / LATENTS_NAME, sae.config.num_latents)
        sheet = self.folder / SHEET_NAME
        sae.latent_sheet = sheet.read_bytes() if sheet.exists() else None
        return sae


class ProbeModel(_Model):
    """A probe, tested once on images that no choice was made on."""

    def train(self, features: Features) -> None:
        config = {**class_config(features["train"]), **self.recipe.model}
        probe = DiffusionProbe(DiffusionProbeConfig(d_in=features["train"].d_in, **config))
        self._trainer(probe, features).train()

    def _trainer(self, probe: DiffusionProbe, features: Features) -> ProbeTrainer:
        given = features["train"], self.training
        return ProbeTrainer(probe.to(self.device), *given, validation_features=features.get("validation"))  # type: ignore[arg-type]

    def measure(self, features: Features, store: FeatureStore) -> dict[str, Any]:  # noqa: ARG002
        if "test" not in features:
            return {}
        return {"test": self._trainer(self.finished(), features).evaluate(features["test"]).record()}

    def finished(self) -> DiffusionProbe:
        return DiffusionProbe.from_pretrained(self.folder / "trained")


MODELS: dict[str, type[SAEModel] | type[ProbeModel]] = {"sae": SAEModel, "probe": ProbeModel}


def images_by_id(
    store: FeatureStore, dataset: str, split: str, limit: int | None = None
) -> Callable[[str], Image.Image]:
    """What reads an image of the data set that a store was made of, by the image's id."""
    source = open_images(dataset, split).first(limit)
    rows = {name: row for row, name in enumerate(source.names)}
    sources = dict(zip(store.image_ids, store.sources, strict=True))
    return lambda image_id: source.read(rows[sources[image_id]])
