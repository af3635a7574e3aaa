"""The images of a sweep: its splits, what is predicted of them, and which of them a seed fits on."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..._files import read_json, write_json
from ...extraction.sources import ImageSource, open_images
from ...features.order import held_out_images
from .config import SweepConfig
from .specs import LabelSpec, PromptSpec

SPLIT_SEED = 0
"""Of the validation images where no split has them: the same for all cells and seeds."""
MARKED_IMAGES = 64


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
    """The images of each role that has a split of its own.

    Raises:
        ValueError: for a Parquet file, or a folder without a folder for each split, where there are several; for
            classes that the training images lack.
    """
    opened = {role: source.first(config.limit) for role, source in _whole_splits(config).items()}
    names = opened["train"].class_names
    if names is None:
        return opened
    return {
        role: source.in_classes(names, f"The {role} images", "the training images'") for role, source in opened.items()
    }


def _whole_splits(config: SweepConfig) -> dict[str, ImageSource]:
    path, splits = Path(config.dataset), config.splits
    if not path.exists():
        return {role: open_images(config.dataset, split) for role, split in splits.items()}
    folders = {role: path / split for role, split in splits.items()}
    if all(folder.is_dir() for folder in folders.values()):
        return {role: open_images(folder) for role, folder in folders.items()}
    if len(folders) > 1:
        missing = ", ".join(folder.name for folder in folders.values() if not folder.is_dir())
        raise ValueError(
            f"{config.dataset} has no folder {missing}: training, validation and test would be the same images. Put "
            "each split into a folder of its name, or set validation_split and test_split to null, by which a part of "
            "the images is held out."
        )
    return {role: open_images(path) for role in folders}


def require_same_images(images: dict[str, ImageSource], folder: Path) -> None:
    """Refuse to go on with results of other images: up to 64 of each split are compared, by their content.

    The names of cells and stores say which data set was asked for, not what was in it.
    """
    path = folder / "images.json"
    known: dict[str, dict[str, str]] = read_json(path) if path.exists() else {}
    for role, source in images.items():
        there = known.get(role, {})
        for number, content in there.items():
            if int(number) < len(source) and _content(source, int(number)) != content:
                raise ValueError(
                    f"{str(folder)!r} holds results of other images: image {number} of the {role} split, "
                    f"{source.names[int(number)]!r}, is another one now. Choose another output_dir."
                )
        if not there:
            some = range(0, len(source), max(1, len(source) // MARKED_IMAGES))
            known[role] = {str(number): _content(source, number) for number in some[:MARKED_IMAGES]}
    write_json(path, known)


def _content(source: ImageSource, number: int) -> str:
    image = source.read(number)
    content = image.cpu().numpy().tobytes() if isinstance(image, Tensor) else image.tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


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
    names = max((names for _, names in found.values()), key=len)  # without class names some may have fewer numbers
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
