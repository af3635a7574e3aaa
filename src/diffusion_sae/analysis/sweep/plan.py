"""What a sweep will do and what it takes: images, forward passes, features on the disk, fits, time."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...extraction.extractor import DiffusionFeatureExtractor
from ...extraction.sources import ImageSource
from ...provenance import DTYPES
from ...zoo import embedded_datasets, embedded_models
from .config import SweepConfig
from .data import open_splits, tasks
from .fit_cost import fit_seconds, row_numbers
from .fits import check_head, takes_views
from .published import published_model
from .sources import Source, cells_of, sources_of
from .specs import HeadSpec, ModelSpec

ASSUMED_WIDTH, ASSUMED_STRIDE, ASSUMED_SIZE = 1280, 16, 512
BYTES: dict[str, int] = dict(zip(DTYPES, (4, 2, 2), strict=True))
EFFICIENCY = 0.6  # of the peak of a matrix product that the convolutions and attentions of a denoiser reach


@dataclass(frozen=True)
class ModelCost:
    """What an image costs in one model."""

    numbers: dict[str, tuple[int, int]]
    """Layer → (channels, positions)."""
    encode_seconds: float | None
    forward_seconds: float | None
    """One timestep, up to the last layer that is wanted."""
    known_from: str


def _matmul_flops() -> float:
    """Operations a second of this machine, from matrix products of a tenth of a second."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    _ = a @ b
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        _ = a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / statistics.median(seconds)


def _is_here(model: str) -> bool:
    return model in embedded_models() or Path(model).is_dir()


def _measured(spec: ModelSpec, config: SweepConfig) -> ModelCost:
    """Of a model that is on this machine: loaded, and timed on a batch of blank images."""
    extractor = DiffusionFeatureExtractor.from_pretrained(
        spec.model, layers=spec.layers, timesteps=spec.timesteps[:1], device=config.device, **spec.extraction
    )
    size, batch = extractor.backbone.image_size, config.batch_size
    numbers = {info.name: (info.channels, (size // info.stride) ** 2) for info in extractor.layer_infos()}
    pixels, encode, forward = torch.zeros(batch, 3, size, size), 0.0, 0.0
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        extractor.backbone.encode(pixels)
        encode = time.perf_counter() - started
    for _ in range(2):
        started = time.perf_counter()
        extractor.features_of(pixels, [str(i) for i in range(batch)], None)
        forward = time.perf_counter() - started - encode
    how = f"measured on this machine, {extractor.device}, {batch} images at once"
    return ModelCost(numbers, encode / batch, max(forward, 0.0) / batch, how)


def _cost(spec: ModelSpec, config: SweepConfig, flops: float) -> ModelCost:
    if _is_here(spec.model):
        return _measured(spec, config)
    known = published_model(spec.model)
    size = spec.extraction.get("image_size")
    if known is not None and all(layer in known.layers for layer in spec.layers):
        scale = 1.0 if size is None else (size / known.image_size) ** 2
        layers = {layer: known.layers[layer] for layer in spec.layers}
        numbers = {
            name: (layer.channels, round(scale * (known.image_size // layer.stride) ** 2))
            for name, layer in layers.items()
        }
        furthest = max(layer.gflops for layer in layers.values())
        return ModelCost(
            numbers,
            scale * known.encode_gflops * 1e9 / (EFFICIENCY * flops),
            scale * furthest * 1e9 / (EFFICIENCY * flops),
            f"its published config, at {EFFICIENCY:.0%} of the {flops / 1e9:.0f} GFLOP/s of a matrix product here",
        )
    positions = ((size or ASSUMED_SIZE) // ASSUMED_STRIDE) ** 2
    missing = (
        "its config" if known is None else "a table of " + ", ".join(s for s in spec.layers if s not in known.layers)
    )
    return ModelCost(
        dict.fromkeys(spec.layers, (ASSUMED_WIDTH, positions)),
        None,
        None,
        f"assumed: {missing} is not on this machine; {ASSUMED_WIDTH} channels, {positions} positions a layer",
    )


def _opened(config: SweepConfig) -> dict[str, ImageSource] | None:
    """The images by role, if they are on this machine."""
    here = config.dataset in embedded_datasets() or Path(config.dataset).exists()
    return open_splits(config) if here else None


def _image_counts(
    config: SweepConfig, opened: dict[str, ImageSource] | None
) -> tuple[dict[str, int | None], list[str], str]:
    """Images a role, the classes' names if they are known, and where it is known from."""
    roles = list(config.splits)
    limit = config.limit
    if opened is not None:
        counts: dict[str, int | None] = {role: len(source) for role, source in opened.items()}
        return counts, opened["train"].class_names or [], "the data"
    if config.num_images:
        given = config.num_images if len(config.num_images) == len(roles) else ()
        counts = {role: min(n, limit or n) for role, n in zip(roles, given, strict=bool(given))}
        if counts:
            return counts, [], "num_images"
        raise ValueError(f"num_images must have an entry a split ({', '.join(roles)}), got {list(config.num_images)}.")
    return dict.fromkeys(roles), [], "nothing: the data are not on this machine; give num_images for an estimate"


def _class_counts(config: SweepConfig, opened: dict[str, ImageSource] | None) -> list[int]:
    """Of each label; 100 where nothing says how many."""
    if opened is not None:
        return [task.num_labels for task in tasks(config, opened)]
    return [len(spec.groups) if spec.groups else 100 for spec in config.label_specs]


def _stored_numbers(cost: ModelCost, pooling: str) -> int:
    """Of one image at one timestep, over all layers."""
    whole = pooling in ("none", "tokens")
    return sum(channels * (positions if whole else 1) for channels, positions in cost.numbers.values())


def _fit_seconds(
    cost: ModelCost, head: HeadSpec, images: int, classes: list[int], config: SweepConfig, flops: float
) -> float:
    """All layers of a timestep, all labels and all seeds."""
    each = [
        fit_seconds(head, channels, positions, images, count, flops)
        for channels, positions in cost.numbers.values()
        for count in classes
    ]
    return sum(each) * len(config.seeds)


def _fit_bytes(cost: ModelCost, images: int, training: int, config: SweepConfig) -> int:
    """Features of the largest cell, which are in memory in fp32 while it is fitted."""
    sizes = []
    for head in config.head_specs:
        rows = images + (config.views * training if takes_views(head) else 0)
        sizes += [4 * rows * row_numbers(head, *numbers) for numbers in cost.numbers.values()]
    return max(sizes)


def plan(config: SweepConfig) -> dict[str, Any]:
    """What `Sweep(config).run()` would extract and fit, with estimates; nothing is downloaded, extracted or fitted."""
    for head in config.head_specs:
        check_head(head)
    opened = _opened(config)
    counts, class_names, images_from = _image_counts(config, opened)
    known = [count for count in counts.values() if count is not None]
    images = sum(known) if len(known) == len(counts) else None
    flops = _matmul_flops()
    costs = {spec.name: _cost(spec, config, flops) for spec in config.model_specs}
    sources = sources_of(config, class_names or None)
    training = counts["train"] or 0
    entries = [_entry(source, costs[source.model.name], images, training, config) for source in sources]
    cells = sum(entry["cells"] for entry in entries)
    fits = cells * len(config.seeds)
    fit_times = memory = None
    if images is not None:
        classes = _class_counts(config, opened)
        fit_times = {
            head.name: sum(
                len(source.timesteps) * _fit_seconds(costs[source.model.name], head, training, classes, config, flops)
                for source in sources
            )
            for head in config.head_specs
        }
        memory = max(_fit_bytes(cost, images, training, config) for cost in costs.values())
    return {
        "dataset": config.dataset,
        "images": counts,
        "images_from": images_from,
        "models": {name: cost.known_from for name, cost in costs.items()},
        "extractions": entries,
        "cells": cells,
        "fits": fits,
        "extraction_seconds": _total([entry["seconds"] for entry in entries]),
        "fit_seconds": fit_times,
        "memory_bytes": memory,
        "disk_bytes": _total([e["bytes"] for e in entries], most=not config.keep_features),
        "output_dir": config.output_dir,
    }


def _total(values: Sequence[float | None], *, most: bool = False) -> float | None:
    known = [value for value in values if value is not None]
    return (max(known) if most else sum(known)) if len(known) == len(values) else None


def _entry(source: Source, cost: ModelCost, images: int | None, training: int, config: SweepConfig) -> dict[str, Any]:
    """`training` images of the `images` have views."""
    dtype = config.store_dtype or source.model.extraction.get("dtype", "float32")
    numbers = _stored_numbers(cost, source.pooling) * len(source.timesteps)
    if images is not None:
        images += source.views.get("views", 0) * training
    pairs = 2 if source.prompt.extraction.get("classifier_free_pair") else 1
    seconds = None
    if images is not None and cost.forward_seconds is not None and cost.encode_seconds is not None:
        members = source.model.extraction.get("ensemble", 1) * pairs
        seconds = images * (cost.encode_seconds + len(source.timesteps) * members * cost.forward_seconds)
    cells = len(list(cells_of(source))) * len(config.head_specs) * len(config.label_specs)
    return {
        **source.describe(),
        "layers": list(source.model.layers),
        "timesteps": list(source.timesteps),
        "pooling": source.pooling,
        "cells": cells,
        "seconds": seconds,
        "bytes": None if images is None else images * numbers * pairs * BYTES[dtype],
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not estimated"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s"


def _fits(seconds: dict[str, float] | None) -> str:
    if seconds is None:
        return _duration(None)
    return ", ".join(f"{head} {_duration(one)}" for head, one in seconds.items())


def _size(count: float | None) -> str:
    if count is None:
        return "not estimated"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def describe(planned: dict[str, Any]) -> str:
    """A plan as text."""
    counts = ", ".join(f"{role} {'?' if n is None else f'{n:,}'}" for role, n in planned["images"].items())
    lines = [f"{planned['dataset']}: {counts} images (from {planned['images_from']})"]
    lines += [f"{name}: {known}" for name, known in planned["models"].items()]
    lines.append("")
    for entry in planned["extractions"]:
        timesteps = ", ".join(map(str, entry["timesteps"]))
        lines.append(
            f"extract {entry['model']} · {entry['weights']} · prompt {entry['prompt']!r} · draw {entry['draw']}: "
            f"{', '.join(entry['layers'])} × t={timesteps} ({entry['pooling']}), {_duration(entry['seconds'])}, "
            f"{_size(entry['bytes'])}"
        )
    lines += [
        "",
        f"fit {planned['cells']:,} cells, {planned['fits']:,} probes: {_fits(planned['fit_seconds'])}",
        f"memory: {_size(planned['memory_bytes'])} for the features of the largest cell",
        f"extraction: {_duration(planned['extraction_seconds'])}; disk at most {_size(planned['disk_bytes'])}",
        f"results: {planned['output_dir']}/results.parquet and sweep.json. Nothing was done.",
    ]
    return "\n".join(lines)
