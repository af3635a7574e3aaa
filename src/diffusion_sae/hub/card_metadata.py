"""The metadata of a card: what the Hub searches, links and shows beside the text."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..provenance import Provenance
from ..zoo import dataset_on_hub

HUB_ID = r"[\w.-]+/[\w.-]+"
# the parts of metrics.json that are measurements of data, and the split they are of if `data` does not say
MEASURED = {"test": "test", "validation": "validation", "held_out": "train", "on_training_rows": "train"}
LATENTS = "latents"
"""The part about the images that activate the latents; of the split named `latents` in `data`."""


def base_model(provenance: Provenance | None) -> str | None:
    """The base model where it is a repository; folders and embedded models have no page to link to."""
    name = None if provenance is None else provenance.model
    return name if name is not None and re.fullmatch(HUB_ID, name) and not Path(name).is_dir() else None


def dataset_id(name: str | None) -> str | None:
    """A data set's repository on the Hub; None for a folder or a file."""
    if name is None or Path(name).exists():
        return None
    return name if re.fullmatch(HUB_ID, name) else dataset_on_hub(name)


def artifact_tags(provenance: Provenance | None) -> list[str]:
    """By which `list_artifacts` finds it."""
    return [] if provenance is None else [*provenance.layers, *(f"timestep-{t}" for t in provenance.timesteps)]


def card_data(
    provenance: Provenance | None,
    pipeline_tag: str,
    tags: Sequence[str],
    title: str = "",
    metrics: Mapping[str, Any] | None = None,
) -> ModelCardData:
    """
    Args:
        provenance: the extraction of the features; its model becomes `base_model`, related as an adapter is: it is
            added to a model that stays as it is.
        pipeline_tag: the Hub's word for what it does.
        tags: of this kind of artifact.
        title: name of the model in `model-index`.
        metrics: as in metrics.json; their `data` says of which data set they are, without which there is no
            `model-index`.
    """
    base = base_model(provenance)
    data = dict((metrics or {}).get("data", {}))
    dataset = dataset_id(data.get("dataset"))
    results = [] if not data.get("dataset") else eval_results(pipeline_tag, metrics or {})
    more: dict[str, Any] = {} if base is None else {"base_model_relation": "adapter"}
    more |= {"eval_results": results, "model_name": title} if results else {}
    return ModelCardData(
        library_name="diffusion_sae",
        license="apache-2.0",
        base_model=base,
        datasets=None if dataset is None else [dataset],
        pipeline_tag=pipeline_tag,
        tags=["diffusion_sae", *tags, *artifact_tags(provenance)],
        **more,
    )


def eval_results(pipeline_tag: str, metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Each number that was measured on data, for the `model-index`."""
    data = metrics["data"]
    splits = {part: data.get(part, usual) for part, usual in MEASURED.items()} | {LATENTS: data.get(LATENTS)}
    return [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=dataset_id(data["dataset"]) or data["dataset"],
            dataset_name=data["dataset"],
            dataset_split=split,
            metric_type=name,
            metric_name=f"{name.replace('_', ' ')}, {part.replace('_', ' ')}",
            metric_value=value,
        )
        for part, split in splits.items()
        for name, value in metrics.get(part, {}).items()
        if isinstance(value, float)  # counts are no measurements
    ]
