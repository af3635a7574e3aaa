"""The images of a sweep: its splits, what is predicted of them, and which of them a seed fits on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...extraction.sources import ImageSource, open_images
from ...features.order import held_out_images
from .config import SweepConfig
from .specs import LabelSpec, PromptSpec

SPLIT_SEED = 0
"""Of the validation images where no split has them: the same for all cells and seeds."""


@dataclass(frozen=True)
class Task:
    """A label: its classes, and of each role the rows of that role's split and their classes."""

    name: str
    class_names: list[str]
    split_of: dict[str, str]
    """Role (train, validation, test) → the role whose images it takes: itself, or train for held-out ones."""
    rows: dict[str, Int[Tensor, " n"]]
    labels: dict[str, Int[Tensor, " n"]]

    @property
    def num_labels(self) -> int:
        return len(self.class_names)

    def shuffled(self, seed: int) -> "Task":
        """The baseline that says what the protocol itself gives: training labels in a random order."""
        order = torch.randperm(len(self.labels["train"]), generator=torch.Generator().manual_seed(seed))
        return dataclasses.replace(self, labels=self.labels | {"train": self.labels["train"][order]})


def open_splits(config: SweepConfig) -> dict[str, ImageSource]:
    """The images of each role that has a split of its own."""
    return {role: open_images(config.dataset, split).first(config.limit) for role, split in config.splits.items()}


def _numbers(source: ImageSource, spec: LabelSpec, role: str) -> tuple[Tensor, list[str]]:
    """Class of each image, and the classes' names; the one place that knows where labels come from."""
    if spec.groups is None and spec.name != "label":  # `label` is the default label, whatever its name
        source = source.labelled_by(spec.name)
    if any(label is None for label in source.labels):
        raise ValueError(f"A sweep needs labelled images; of the {role} images not all have a label.")
    own = torch.tensor([label for label in source.labels if label is not None])
    names = source.class_names or [str(i) for i in range(int(own.max()) + 1)]
    if spec.groups is None:
        return own, names
    group_of = {name: number for number, members in enumerate(spec.groups.values()) for name in members}
    unknown, missing = [n for n in group_of if n not in names], [n for n in names if n not in group_of]
    if unknown or missing:
        raise ValueError(
            f"The groups of the label {spec.name!r} must hold each class once: unknown {unknown}, missing {missing}. "
            f"Classes: {', '.join(names)}."
        )
    return torch.tensor([group_of[name] for name in names])[own], list(spec.groups)


def tasks(config: SweepConfig, sources: dict[str, ImageSource]) -> list[Task]:
    """A task a label."""
    return [_task(config, sources, spec) for spec in config.label_specs]


def _task(config: SweepConfig, sources: dict[str, ImageSource], spec: LabelSpec) -> Task:
    found = {role: _numbers(source, spec, role) for role, source in sources.items()}
    names = max((names for _, names in found.values()), key=len)
    split_of = {role: role for role in sources}
    rows = {role: torch.arange(len(source)) for role, source in sources.items()}
    if "validation" not in sources:
        count = len(sources["train"])
        held = held_out_images(count, max(1, round(count * config.validation_fraction)), seed=SPLIT_SEED)
        rows |= {"train": torch.nonzero(~held).flatten(), "validation": torch.nonzero(held).flatten()}
        split_of["validation"] = "train"
    labels = {role: found[split_of[role]][0][index] for role, index in rows.items()}
    return Task(spec.name, list(names), split_of, rows, labels)


def subset_of(count: int, fraction: float, seed: int) -> Bool[Tensor, " n"]:
    """Which of the training rows a seed fits on."""
    chosen = torch.zeros(count, dtype=torch.bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen[order[: max(1, round(fraction * count))]] = True
    return chosen


def texts_of(prompt: PromptSpec, source: ImageSource, seed: int = SPLIT_SEED) -> Sequence[str] | None:
    """The text of each image, where the prompt is filled with a class; None where one prompt serves all.

    A wrong class is drawn from the others, by the number of the image. It still says which class it is not.
    """
    if prompt.of is None:
        return None
    if source.class_names is None or any(label is None for label in source.labels):
        raise ValueError(f"The prompt {prompt.prompt!r} needs images with class names, which these data lack.")
    names = source.class_names
    numbers = torch.tensor([label for label in source.labels if label is not None])
    if prompt.of == "other":
        generator = torch.Generator().manual_seed(seed)
        numbers = (numbers + torch.randint(1, len(names), numbers.shape, generator=generator)) % len(names)
    return [prompt.text(number, names[number]) for number in numbers.tolist()]
