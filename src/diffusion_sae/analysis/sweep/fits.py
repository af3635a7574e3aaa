"""The probes of one cell, one a seed, by the head that its entry names."""

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...features import FeatureSet
from ...probes.configuration import DiffusionProbeConfig
from ...probes.heads import HEADS
from ...probes.modeling import DiffusionProbe
from ...probes.results import ProbeMetrics
from ...probes.run import measure
from ...probes.subsets import fit_subsets
from ...probes.tasks import SingleLabel
from ...probes.trainer import ProbeTrainer, optimizer_of
from ...probes.training_args import ProbeTrainingArguments
from ...provenance import Provenance
from .cells import SeedResult, pack
from .config import SweepConfig
from .data import Task, subset_of
from .specs import HeadSpec

NOT_OF_A_CELL = {"fusion": "for several layers or timesteps", "sae": "for the latents of one SAE"}
SHAPES = {"mean": (2,), "max": (2,), "tokens": (4, 2), "none": (2, 8, 8)}
SET_BY_SWEEP = {"output_dir", "seed", "init_seed", "report_to", "d_in", "validation_fraction"}


def probe_options(head: HeadSpec) -> tuple[dict, dict]:
    """A head's options: (of DiffusionProbeConfig, of ProbeTrainingArguments).

    Raises:
        ValueError: for an option that neither knows, or that the sweep itself sets.
    """
    training_fields = {field.name for field in dataclasses.fields(ProbeTrainingArguments)}
    probe_fields = set(DiffusionProbeConfig.__annotations__)
    allowed = (training_fields | probe_fields) - SET_BY_SWEEP - {"model_type", "required_keys", "head"}
    unknown = [name for name in head.options if name not in allowed]
    if unknown:
        raise ValueError(
            f"The head {head.name!r} of the sweep does not know {', '.join(unknown)}. "
            f"Known: {', '.join(sorted(allowed))}."
        )
    training = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in head.options.items()
        if key in training_fields
    }
    return {key: value for key, value in head.options.items() if key not in training_fields}, training


def check_head(head: HeadSpec) -> None:
    """Find out before the long work what a probe would refuse after it, by one on features of zeros and ones.

    Raises:
        ValueError: naming the head.
    """
    if head.head in NOT_OF_A_CELL:
        raise ValueError(
            f"The head {head.name!r} of the sweep is {NOT_OF_A_CELL[head.head]}, and a cell of a sweep is one layer at "
            "one timestep. Train it with ProbeTrainer, or choose another of "
            f"{', '.join(name for name in HEADS if name not in NOT_OF_A_CELL)}."
        )
    probe, training = probe_options(head)
    try:
        config = DiffusionProbeConfig(d_in=2, id2label={0: "a", 1: "b"}, head=head.head, **probe)
        shape, labels = (4, *SHAPES[head.pooling]), torch.tensor([0, 1, 0, 1])
        zeros, ones = (FeatureSet([make(shape)], labels=labels) for make in (torch.zeros, torch.ones))
        args = ProbeTrainingArguments(output_dir="unused", **training)
        ProbeTrainer(DiffusionProbe(config), zeros, args, validation_features=ones)
    except ValueError as error:
        raise ValueError(
            f"The head {head.name!r} of the sweep, on features of pooling {head.pooling!r}: {error}"
        ) from error


def takes_views(head: HeadSpec) -> bool:
    """Whether a head is trained in epochs, each of which can take another view of an image."""
    _, training = probe_options(head)
    return optimizer_of(HEADS[head.head], ProbeTrainingArguments(output_dir="unused", **training).optimizer) == "adamw"


def fit_cell(
    features: Mapping[str, Tensor],
    task: Task,
    head: HeadSpec,
    config: SweepConfig,
    *,
    views: Sequence[Tensor] = (),
    provenance: Provenance | None,
    work: Path,
) -> list[SeedResult]:
    """A fit a seed.

    Args:
        features: rows of each split of its own, one an image.
        task: which of them are of which role, and their classes.
        head, config: what is fitted.
        views: of all images of the training split, for a head that takes them.
        provenance: the extraction, for probes that are checkpointed while they train.
        work: folder for these checkpoints; removed when the cell is done.
    """
    roles = {role: features[task.split_of[role]][rows] for role, rows in task.rows.items()}
    probe, training = probe_options(head)
    if head.head == "linear" and not probe and set(training) <= {"l2_path"}:
        return _fit_linear(roles, task, training, config)
    views = [view[task.rows["train"]] for view in views]
    results = [_train(roles, views, task, head, seed, config, provenance, work / str(seed)) for seed in config.seeds]
    shutil.rmtree(work, ignore_errors=True)
    return results


def _result(
    seed: int, validation: ProbeMetrics, logits: Mapping[str, Tensor], task: Task, chosen: dict, seconds: float
) -> SeedResult:
    role = "test" if "test" in task.rows else "validation"
    correct = logits[role].argmax(1) == task.labels[role]
    return SeedResult(
        seed=seed,
        validation_accuracy=validation.accuracy,
        validation_loss=validation.loss,
        test_accuracy=measure(SingleLabel(), logits["test"], task.labels["test"]).accuracy if role == "test" else None,
        l2=chosen.get("l2"),
        epoch=None if chosen.get("epoch") is None else int(chosen["epoch"]),
        seconds=round(seconds, 3),
        correct=pack(correct),
    )


def _fit_linear(roles: Mapping[str, Tensor], task: Task, training: dict, config: SweepConfig) -> list[SeedResult]:
    """All seeds in the same products."""
    started = time.perf_counter()
    count = len(roles["train"])
    fits = fit_subsets(
        roles["train"],
        task.labels["train"],
        torch.stack([subset_of(count, config.train_fraction, seed) for seed in config.seeds]),
        (roles["validation"], task.labels["validation"]),
        num_labels=task.num_labels,
        strengths=ProbeTrainingArguments(output_dir="unused", **training).l2_path,
    )
    seconds = (time.perf_counter() - started) / len(fits)
    measured = "test" if "test" in roles else "validation"
    return [
        _result(seed, fit.validation, {measured: fit.logits(roles[measured])}, task, {"l2": fit.solution.l2}, seconds)
        for seed, fit in zip(config.seeds, fits, strict=True)
    ]


def _train(
    roles: Mapping[str, Tensor],
    views: Sequence[Tensor],
    task: Task,
    head: HeadSpec,
    seed: int,
    config: SweepConfig,
    provenance: Provenance | None,
    work: Path,
) -> SeedResult:
    started = time.perf_counter()
    own = subset_of(len(roles["train"]), config.train_fraction, seed)
    names = dict(enumerate(task.class_names))

    def as_set(role: str, keep: Tensor | slice = slice(None)) -> FeatureSet:
        return FeatureSet([roles[role][keep]], labels=task.labels[role][keep], provenance=provenance)

    train, validation = as_set("train", own), as_set("validation")
    probe_settings, training = probe_options(head)
    # Any: transformers' `to` is wrapped, and pyright loses its type
    probe: Any = DiffusionProbe(
        DiffusionProbeConfig(
            d_in=train.d_in,
            head=head.head,
            id2label=names,
            label2id={name: number for number, name in names.items()},
            init_seed=seed,
            **probe_settings,
        )
    )
    if config.device is not None:
        probe.to(config.device)
    args = ProbeTrainingArguments(output_dir=str(work), seed=seed, **training)
    of_own = [FeatureSet([view[own]], provenance=provenance) for view in views]
    result = ProbeTrainer(probe, train, args, validation_features=validation, views=of_own).fit(progress=False)
    measured = "test" if "test" in roles else "validation"
    logits = {measured: probe.predict(roles[measured])}
    return _result(seed, result.validation, logits, task, dict(result.chosen), time.perf_counter() - started)
