"""What layers know: linear probes over layers and timesteps, and the baselines beside them."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..extraction.extractor import DiffusionFeatureExtractor
from ..extraction.images import preprocess
from ..extraction.sources import ImageSource, open_images
from ..features import FeatureSet, FeatureStore
from ..probes.configuration import DiffusionProbeConfig
from ..probes.modeling import DiffusionProbe
from ..probes.trainer import ProbeTrainer
from ..probes.training_args import ProbeTrainingArguments

BASELINE_BATCH = 250


def class_config(features: FeatureSet) -> dict[str, Any]:
    """`id2label` and `label2id` of a feature set, for a probe's config."""
    if features.image_labels is None:
        raise ValueError(
            "A probe needs labels, and these features have none. Extract from class folders or labelled data."
        )
    names = features.class_names or [str(i) for i in range(int(features.image_labels.max()) + 1)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@dataclass(frozen=True)
class ProbeScore:
    validation: float
    """Accuracy that choices are made by."""
    test: float | None
    """Accuracy on test rows, where they were given."""
    l2: float
    """The strength chosen on validation."""

    @property
    def test_accuracy(self) -> float:
        if self.test is None:
            raise ValueError("No test rows were given to this probe.")
        return self.test


def fit_linear(train: FeatureSet, validation: FeatureSet, test: FeatureSet | None = None, **args: Any) -> ProbeScore:
    """A linear probe with the L2 strength chosen on validation; `test` is measured once, after that."""
    with tempfile.TemporaryDirectory() as folder:
        probe = DiffusionProbe(DiffusionProbeConfig(d_in=train.d_in, **class_config(train)))
        trainer = ProbeTrainer(
            probe, train, ProbeTrainingArguments(output_dir=folder, **args), validation_features=validation
        )
        result = trainer.fit(progress=False)
    accuracy = None if test is None else trainer.evaluate(test).accuracy
    return ProbeScore(result.validation.accuracy, accuracy, result.chosen["l2"])


def layer_timestep_scores(
    train: FeatureStore, validation: FeatureStore, on_cell: Callable[[], object] = lambda: None
) -> dict[tuple[str, int], ProbeScore]:
    """Validation accuracy of a linear probe at every layer and timestep of two stores of one extraction."""
    scores = {}
    for layer in train.layers:
        for t in train.timesteps:
            scores[layer, t] = fit_linear(train.select(layer, t), validation.select(layer, t))
            on_cell()
    return scores


def best_cell(scores: Mapping[tuple[str, int], ProbeScore]) -> tuple[str, int]:
    """The layer and timestep with the highest validation accuracy; the first of equals."""
    return max(scores, key=lambda cell: scores[cell].validation)


def _labelled(source: ImageSource, rows: list[Tensor]) -> FeatureSet:
    features = torch.cat(rows)
    return FeatureSet([features], labels=torch.tensor(source.labels), class_names=source.class_names)


def _pixel_batches(source: ImageSource, size: int) -> list[Tensor]:
    pixels = [preprocess(source.read(i), size) for i in range(len(source))]
    return list(torch.stack(pixels).split(BASELINE_BATCH))


def pixel_features(dataset: Any, size: int, split: str = "train") -> FeatureSet:
    """Baseline: the preprocessed pixels themselves, flattened; one channel where all three are equal."""
    source = open_images(dataset, split)
    batches = _pixel_batches(source, size)
    grey = all(torch.equal(batch, batch[:, :1].expand_as(batch)) for batch in batches)
    return _labelled(source, [(batch[:, :1] if grey else batch).flatten(1) for batch in batches])


def latent_features(extractor: DiffusionFeatureExtractor, dataset: Any, split: str = "train") -> FeatureSet:
    """Baseline: the VAE's latents without noise, flattened; all that the denoiser is given."""
    source = open_images(dataset, split)
    batches = _pixel_batches(source, extractor.backbone.image_size)
    return _labelled(source, [extractor.backbone.encode(batch).float().cpu().flatten(1) for batch in batches])
