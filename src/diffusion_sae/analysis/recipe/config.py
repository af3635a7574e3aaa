"""Recipe: how one artifact of the zoo is made, checked before anything is done."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..._config import JsonConfig, check, check_choice, check_integer, refuse_unknown
from ...probes.training_args import ProbeTrainingArguments
from ...provenance import DTYPES, ExtractorConfig
from ...sae.training_args import SAETrainingArguments
from ...zoo.names import ArtifactName

KINDS = {"sae": SAETrainingArguments, "probe": ProbeTrainingArguments}
"""The section that says what is trained, and how the section `training` of each is read."""


@dataclass(frozen=True, kw_only=True)
class RecipeData(JsonConfig):
    """Section `data`: the images."""

    dataset: str
    """Folder, Parquet file, embedded name or `datasets` name."""
    train: str = "train"
    """Split to train on."""
    validation: str | None = None
    """Split that a probe is chosen on; None: a part of the training images."""
    test: str | None = None
    """Split that is measured at the end, and of which an SAE's latents are described; None: the training images."""
    labels: str | None = None
    """Which labels of the images; None: their first."""
    limit: int | None = None
    """Only the first so many images of each split."""
    batch_size: int = 32
    """Images a forward pass."""
    store_dtype: str | None = None
    """Type of the stored features; None: that of the computation."""

    def __post_init__(self) -> None:
        check(bool(self.dataset), "data.dataset must name the images, got an empty string.")
        for name in ("limit", "batch_size"):
            if getattr(self, name) is not None:
                check_integer(f"data.{name}", getattr(self, name), 1)
        check_choice("data.store_dtype", self.store_dtype, (None, *DTYPES))


@dataclass(frozen=True, kw_only=True)
class LatentSettings(JsonConfig):
    """Section `latents`, of an SAE: how they are described."""

    images_per_latent: int = 16
    """Top images that are recorded of each, and of which its label is."""

    def __post_init__(self) -> None:
        check_integer("latents.images_per_latent", self.images_per_latent, 1, 1024)


@dataclass(frozen=True)
class Recipe:
    """One artifact: its name, the extraction, the images, the model and its training."""

    name: str
    """`<model>-<layer>-t<timestep>[-<dataset>]`, of the layer and timestep of the extraction."""
    kind: str
    """sae or probe."""
    extraction: ExtractorConfig
    data: RecipeData
    model: Mapping[str, Any]
    """Fields of KSparseAutoencoderConfig or DiffusionProbeConfig; what follows from the data is left out."""
    training: Mapping[str, Any]
    """Fields of the training arguments, without output_dir."""
    latents: LatentSettings = field(default_factory=LatentSettings)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        self.training_arguments("runs")
        name = ArtifactName.parse(self.name)
        layers, timesteps = self.extraction.layers, self.extraction.timesteps
        several = self.kind == "sae" and self.model.get("timesteps") is not None
        check(
            len(layers) == 1 and (several or len(timesteps) == 1),
            f"A recipe is of one layer and one timestep (or of an SAE with `timesteps`), got {list(layers)} and "
            f"{list(timesteps)}. Write a recipe for each.",
        )
        check(
            (name.layer, name.timestep) == (layers[0], timesteps[0]),
            f"The name {self.name!r} is of {name.layer} at timestep {name.timestep}, the extraction of {layers[0]} at "
            f"{timesteps[0]}. Make them agree.",
        )

    def training_arguments(self, output_dir: str) -> Any:
        """SAETrainingArguments or ProbeTrainingArguments."""
        check("output_dir" not in self.training, "training must not name output_dir: it follows from --output-dir.")
        return KINDS[self.kind].from_dict({**self.training, "output_dir": output_dir})

    @property
    def splits(self) -> dict[str, str]:
        """What a split is for → its name, of those that are used."""
        used = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        if self.kind == "sae":
            del used["validation"]  # an SAE holds out training images
        return {purpose: split for purpose, split in used.items() if split is not None}

    @property
    def described(self) -> str:
        """The split whose images describe the latents: the measured one, else the training images."""
        return "test" if self.data.test is not None else "train"

    @classmethod
    def from_dict(cls, content: Any, name: str) -> Self:
        """
        Args:
            content: the sections `extraction`, `data`, `sae` or `probe`, and optionally `training` and `latents`.
            name: of the artifact.

        Raises:
            ValueError: for sections and settings that there are not, and for a name of another layer or timestep.
        """
        if not isinstance(content, dict):
            raise ValueError(f"A recipe must be a mapping of sections, got a {type(content).__name__}.")  # noqa: TRY004
        refuse_unknown(content, ("extraction", "data", "training", "latents", *KINDS), f"The recipe {name}")
        kinds = [kind for kind in KINDS if kind in content]
        check(len(kinds) == 1, f"The recipe {name} must have one section of {' and '.join(KINDS)}, got {kinds}.")
        for section in ("extraction", "data"):
            check(section in content, f"The recipe {name} lacks the section {section!r}.")
        return cls(
            name=name,
            kind=kinds[0],
            extraction=ExtractorConfig.from_dict(content["extraction"]),
            data=RecipeData.from_dict(content["data"]),
            model=content[kinds[0]] or {},
            training=content.get("training") or {},
            latents=LatentSettings.from_dict(content.get("latents") or {}),
        )

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """A YAML file, named like the artifact: `sd15-up1-t25.yaml`."""
        return cls.parse(Path(path).read_text(encoding="utf-8"), Path(path).stem)

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """From YAML; see `from_dict`."""
        import yaml

        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"The recipe {name} is no valid YAML: {error}") from error
        return cls.from_dict(content, name)

    def to_dict(self) -> dict[str, Any]:
        """All settings that are not at their default, so that a setting of a later version changes no recipe."""
        return {
            "name": self.name,
            "extraction": _chosen(self.extraction),
            "data": _chosen(self.data),
            self.kind: dict(self.model),
            "training": {k: v for k, v in _chosen(self.training_arguments("runs")).items() if k != "output_dir"},
            "latents": _chosen(self.latents),
        }


def _chosen(config: JsonConfig) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {k: v for k, v in config.to_dict().items() if getattr(config, k) != defaults[k]}
