"""SweepConfig. No torch here: the command line builds its options from these fields."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..._config import JsonConfig, check, check_choice, check_integer, check_number
from ...provenance import DTYPES
from .specs import HeadSpec, LabelSpec, ModelSpec, distinct_names

WEIGHTS = ("trained", "random")
BASELINES = ("pixels", "latents", "shuffled")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(JsonConfig):
    """What a sweep covers. A cell is one of model × weights × draw × prompt × layer × timestep × head × label.

    What a seed draws: the share of the training images that is fitted on (`train_fraction`), and for heads that are
    trained step by step the initial weights, the order of the rows and the dropout. What a draw draws: the noise and
    the random weights, which are part of an extraction.
    """

    output_dir: str
    """Folder of features, fitted cells and results; a sweep that was stopped is gone on with."""
    models: tuple[str | dict[str, Any], ...] = ("tiny-sd",)
    """Hub ids, folders or embedded names; in YAML also {model, name, layers, timesteps, prompts, weights} and settings
    of an extraction."""
    layers: tuple[str, ...] = ("bottleneck",)
    """Layers of the models that have none of their own."""
    timesteps: tuple[int, ...] = (25, 100, 300)
    """Timesteps of the models that have none of their own."""
    prompts: tuple[str | dict[str, Any], ...] = ("",)
    """Texts; {} stands for the image's class name, {number} for its number. In YAML also {name, prompt, of: own|other}
    and clip_model, prompt_choices, prompt_from."""
    weights: tuple[str, ...] = ("trained",)
    """trained, random (the same denoiser freshly initialised), or both."""
    dataset: str = "fashion-mnist-mini"
    """Folder of images, Parquet file, or name of a labelled data set."""
    train_split: str = "train"
    """Split that is fitted on."""
    validation_split: str | None = "validation"
    """Split that everything is chosen on; None: a share of the training images."""
    test_split: str | None = "test"
    """Split that is measured and never chosen on; None: there is none, and margins are those of validation."""
    validation_fraction: float | int = 0.2
    """Share of the training images that is held out where validation_split is None."""
    limit: int | None = None
    """Only the first so many images of each split."""
    labels: tuple[str | dict[str, Any], ...] = ("label",)
    """What is predicted: label is the data set's own; in YAML also coarser ones, {name, groups: {group: [classes]}}."""
    heads: tuple[str | dict[str, Any], ...] = ("linear",)
    """Heads of the probes; in YAML also {head, name, pooling} and fields of the probe's config and training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A fit each; see above what differs."""
    draws: tuple[int, ...] = (0,)
    """Seeds of the extraction: of the noise, and of random weights."""
    train_fraction: float | int = 0.9
    """Share of the training images that a seed draws."""
    views: int = 0
    """Augmented views of each training image, one of which heads that are trained in epochs take in each epoch
    (Revelio's crop and flip); the others take plain images."""
    view_flip: bool = True
    """Whether half of the views are mirrored."""
    baselines: tuple[str, ...] = ("pixels", "latents", "shuffled")
    """pixels, latents (of the VAE, without noise), and shuffled (labels, at the best cell of each model)."""
    baseline_size: int = 32
    """Side that images are reduced to for the pixels baseline, where it is below the model's own."""
    batch_size: int = 32
    """Images a forward pass."""
    store_dtype: str | None = None
    """float32, bfloat16 or float16 for the stored features; None: that of the computation."""
    keep_features: bool = True
    """False: one timestep is extracted at a time, and its features are deleted when its cells are fitted."""
    device: str | None = None
    """cpu, cuda or mps; None: the first of cuda, mps, cpu that there is."""
    num_images: tuple[int, ...] = ()
    """Images of the training, validation and test splits, for a plan of data that cannot be opened."""

    def __post_init__(self) -> None:
        check(bool(self.output_dir), "output_dir must name a folder, got an empty string.")
        for name in ("models", "layers", "timesteps", "prompts", "weights", "labels", "heads", "seeds", "draws"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str | int | dict) else tuple(value)
            object.__setattr__(self, name, value)
            check(len(value) > 0, f"{name} must name at least one, got none.")
        for name, allowed in (("weights", WEIGHTS), ("baselines", BASELINES)):
            for value in getattr(self, name):
                check_choice(name, value, allowed)
        for name in ("seeds", "draws", "num_images"):
            for value in getattr(self, name):
                check_integer(name, value, 0)
        for name in ("weights", "seeds", "draws"):
            values = getattr(self, name)
            check(len(set(values)) == len(values), f"{name} must not repeat, got {list(values)}.")
        named = [split for split in (self.train_split, self.validation_split, self.test_split) if split is not None]
        check(len(set(named)) == len(named), f"Each split has a role of its own; splits repeat in {named}.")
        check_number("train_fraction", self.train_fraction, 0, 1, open_low=True)
        check_number("validation_fraction", self.validation_fraction, 0, 0.9, open_low=True)
        for name in ("batch_size", "baseline_size"):
            check_integer(name, getattr(self, name), 1)
        if self.limit is not None:
            check_integer("limit", self.limit, 1)
        check_choice("store_dtype", self.store_dtype, (None, *DTYPES))
        check_choice("keep_features", self.keep_features, (True, False))
        check_integer("views", self.views, 0)
        check_choice("view_flip", self.view_flip, (True, False))
        check(self.views > 0 or self.view_flip, "view_flip is of views, of which there are none: set views.")
        for parsed in (self.model_specs, self.head_specs, self.label_specs):
            distinct_names(parsed)

    @cached_property
    def model_specs(self) -> list[ModelSpec]:
        own = {"layers": self.layers, "timesteps": self.timesteps, "prompts": self.prompts, "weights": self.weights}
        return [ModelSpec.parse(entry, own) for entry in self.models]

    @cached_property
    def head_specs(self) -> list[HeadSpec]:
        return [HeadSpec.parse(entry) for entry in self.heads]

    @cached_property
    def label_specs(self) -> list[LabelSpec]:
        return [LabelSpec.parse(entry) for entry in self.labels]

    @property
    def splits(self) -> dict[str, str]:
        """The splits that there are, by what they are for."""
        named = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return {role: split for role, split in named.items() if split is not None}
