"""Where features come from: the settings of an extraction, and the record of one that was done.

The words that every room shares; no torch here, because the command line builds its options from these fields.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ._config import JsonConfig, check, check_choice, check_integer, check_number
from ._files import fingerprint_of, read_json, write_json

POOLINGS = ("mean", "max", "tokens", "none")
NOISES = ("seeded", "none")
PROMPT_SOURCES = ("config", "class", "image", "clip")
CROPS = ("center", "none")
RESAMPLINGS = ("bicubic", "bilinear", "lanczos", "nearest")
DTYPES = ("float32", "bfloat16", "float16")
NUM_TRAIN_TIMESTEPS = 1000
EXTRACTOR_CONFIG_NAME = "extractor_config.json"


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig(JsonConfig):
    """Settings of an extraction. Two extractions with equal settings give equal features."""

    model: str = "tiny-sd"
    """Hub id or folder of a diffusers pipeline, or the name of an embedded model."""
    layers: tuple[str, ...] = ("bottleneck",)
    """Canonical layer names (bottleneck, up_ft1, block14) or dotted module paths of the denoiser."""
    timesteps: tuple[int, ...] = (25,)
    """Timesteps 0…999 of the training noise schedule."""
    pooling: str = "mean"
    """mean or max over positions, tokens (one row a position), none (the activation as it is)."""
    prompt: str = ""
    """Text prompt; for a class-conditional model a class name. Empty: the unconditional input."""
    prompt_from: str = "config"
    """config: `prompt` for all images; class: `prompt` with the image's class name for {}; image: a text an image;
    clip: the best of `prompt_choices`."""
    prompt_choices: tuple[str, ...] = ()
    """What prompt_from="clip" chooses from, by the similarity of CLIP's embeddings (Revelio, §4)."""
    clip_model: str | None = None
    """Hub id or folder of the transformers CLIP model of prompt_from="clip"."""
    classifier_free_pair: bool = False
    """Features of the empty prompt and of the prompt side by side: (…, 2 C), the empty one's first."""
    noise: str = "seeded"
    """seeded: drawn by (seed, image id, timestep); none: the clean latents are given to the denoiser at timestep t."""
    ensemble: int = 1
    """Draws of the noise that the activations are averaged over (DIFT, §4.2, averages 8)."""
    seed: int = 0
    """Seed of the noise, which depends on (seed, image id, timestep) alone."""
    image_size: int | None = None
    """Side of the preprocessed image in pixels; None: what the model was trained on."""
    crop: str = "center"
    """center: the shorter side is resized and the middle square cut out; none: both sides are resized, whatever the
    proportions."""
    resample: str = "bicubic"
    """Interpolation of the resizing: bicubic, bilinear, lanczos or nearest."""
    dtype: str = "float32"
    """Floating-point type the model computes in: float32, bfloat16 or float16."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    guidance: float | int | None = None
    """Guidance embedding of guidance-distilled denoisers; other models refuse it."""
    random_weights: bool = False
    """Baseline: the same denoiser freshly initialised from `seed`; VAE and text encoder stay trained."""
    views: int = 0
    """Augmented views of each image in a store, beside the plain image: a random crop, resized, and a flip, drawn by
    (seed, image id, number of the view), with noise of their own (Revelio's augmentation, made once)."""
    view_area: float | int = 0.8
    """Smallest share of the image's area that a view's crop has; proportions from 3:4 to 4:3."""
    view_flip: bool = True
    """Whether half of the views are mirrored; not for images whose left and right mean something, such as text."""

    def __post_init__(self) -> None:
        for name in ("layers", "timesteps", "prompt_choices"):
            value = getattr(self, name)
            check(isinstance(value, str | int | Sequence), f"{name} must be a list, got {value!r}.")
            object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value))
        check(bool(self.model) and isinstance(self.model, str), f"model must name a pipeline, got {self.model!r}.")
        check(len(self.layers) > 0, "layers must name at least one layer, got none.")
        for layer in self.layers:
            check(bool(layer) and isinstance(layer, str), f"layer must be a name, got {layer!r}.")
        check(len(self.timesteps) > 0, "timesteps must hold at least one timestep, got none.")
        for t in self.timesteps:
            check_integer("timestep", t, 0, NUM_TRAIN_TIMESTEPS - 1)
        for name in ("layers", "timesteps"):
            values = getattr(self, name)
            check(len(set(values)) == len(values), f"{name} must not repeat, got {list(values)}.")
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("crop", self.crop, CROPS)
        check_choice("resample", self.resample, RESAMPLINGS)
        check_choice("noise", self.noise, NOISES)
        check_integer("ensemble", self.ensemble, 1)
        check(
            self.ensemble == 1 or self.noise == "seeded",
            f"ensemble={self.ensemble} averages over draws of the noise: it needs noise='seeded', got {self.noise!r}.",
        )
        check_choice("classifier_free_pair", self.classifier_free_pair, (True, False))
        check(isinstance(self.prompt, str), f"prompt must be a string, got {self.prompt!r}.")
        self._check_prompts()
        check_integer("seed", self.seed, 0)
        check_choice("random_weights", self.random_weights, (True, False))
        if self.image_size is not None:
            check_integer("image_size", self.image_size, 1, 1_000_000)
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0, 1_000_000)
            object.__setattr__(self, "guidance", float(self.guidance))  # 1 and 1.0 have one fingerprint
        self._check_views()

    def _check_views(self) -> None:
        check_integer("views", self.views, 0)
        check_number("view_area", self.view_area, 0, 1, open_low=True)
        object.__setattr__(self, "view_area", float(self.view_area))
        check_choice("view_flip", self.view_flip, (True, False))
        given = [name for name in ("view_area", "view_flip") if getattr(self, name) != getattr(type(self), name)]
        check(self.views > 0 or not given, f"{' and '.join(given)} are of views, of which there are none: set views.")

    def _check_prompts(self) -> None:
        check_choice("prompt_from", self.prompt_from, PROMPT_SOURCES)
        if self.prompt_from == "clip":
            check(len(self.prompt_choices) > 1, "prompt_from='clip' needs at least two prompt_choices.")
            check(bool(self.clip_model), "prompt_from='clip' needs clip_model, such as openai/clip-vit-base-patch32.")
        else:
            unused = {"prompt_choices": self.prompt_choices, "clip_model": self.clip_model}
            given = [name for name, value in unused.items() if value]
            check(not given, f"{' and '.join(given)} belong to prompt_from='clip', got {self.prompt_from!r}.")
        if self.prompt_from == "class":
            check(
                "{}" in self.prompt,
                f"prompt_from='class' needs a {{}} for the class name in prompt, got {self.prompt!r}.",
            )


@dataclass(frozen=True, kw_only=True)
class Provenance(ExtractorConfig):
    """Record of an extraction: its settings, what they resolved to, and the weights and libraries that did it.

    Travels with stores, SAEs and probes as `extractor_config.json`.
    """

    weights: str
    """Hash over all tensors of the pipeline that took part: the same model under another name has the same one."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions; recorded, but no part of the fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the numbers; names and versions do not, the weights do.

        Settings at their default are left out, so that a setting of a later version, which is off by default, leaves
        the fingerprints of what was published before as they are.
        """
        left_out = ("model", "revision", "versions", "layers", "timesteps")
        defaults = ExtractorConfig().to_dict()
        content = {k: v for k, v in self.to_dict().items() if k not in left_out and v != defaults.get(k)}
        # in order of name, so that asking for layers in another order is no other extraction
        return fingerprint_of(content | {"layers": sorted(self.layers), "timesteps": sorted(self.timesteps)})

    @property
    def settings(self) -> ExtractorConfig:
        own = {f.name for f in dataclasses.fields(ExtractorConfig)}
        return ExtractorConfig.from_dict({key: value for key, value in self.to_dict().items() if key in own})

    def select(self, layer: str, timestep: int | Sequence[int]) -> Self:
        """The same record narrowed to one layer, and to one timestep or several; all must be among those extracted."""
        timesteps = (timestep,) if isinstance(timestep, int | str) else tuple(timestep)
        check_choice("layer", layer, self.layers)
        for one in timesteps:
            check_choice("timestep", one, self.timesteps)
        return dataclasses.replace(self, layers=(layer,), timesteps=timesteps)

    def plain(self) -> Self:
        """The record of the plain images' features, which are the same with and without views."""
        return dataclasses.replace(self, views=0, view_area=type(self).view_area, view_flip=type(self).view_flip)

    def listed(self) -> list[tuple[str, Any]]:
        """Settings for a card; those of views where there are any."""
        return [(k, v) for k, v in self.settings.to_dict().items() if self.views or not k.startswith("view")]

    def describe(self) -> str:
        views = f" · {self.views} views" if self.views else ""
        prompt = f" · prompt {self.prompt!r}" if self.prompt else ""
        random = " · random weights" if self.random_weights else ""
        return (
            f"{self.model}{random} · {', '.join(self.layers)} · t={', '.join(map(str, self.timesteps))} · "
            f"{self.pooling}{prompt}{views} · seed {self.seed} · {self.image_size} px · {self.dtype} · "
            f"weights {self.weights} · fingerprint {self.fingerprint}"
        )

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / EXTRACTOR_CONFIG_NAME, {**self.to_dict(), "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not the record of an extraction.")  # noqa: TRY004
        recorded = content.pop("fingerprint", None)
        provenance = cls.from_dict(content)
        if recorded != provenance.fingerprint:
            raise ValueError(
                f"{path} was edited: it records the fingerprint {recorded}, its settings have "
                f"{provenance.fingerprint}. Restore the file, or make the artifact anew with the settings you want."
            )
        return provenance


class ProvenanceMismatchError(ValueError):
    """Features of one extraction were given to something made for another."""


ADVICE = "Extract with the settings it was made for, or pass allow_mismatch=True if you know that they are comparable."


def require_same_provenance(
    expected: Provenance | None,
    given: Provenance | None,
    what: str,
    *,
    allow_mismatch: bool = False,
    advice: str = ADVICE,
) -> None:
    """Refuse features of another extraction, naming both. Where a side is unknown there is nothing to compare."""
    if expected is None or given is None or allow_mismatch or expected.fingerprint == given.fingerprint:
        return
    ignored = ("versions", "model", "revision")
    mine, theirs = expected.to_dict(), given.to_dict()
    differing = [key for key in mine if key not in ignored and mine[key] != theirs[key]]
    raise ProvenanceMismatchError(
        f"{what} was made for features of another extraction (they differ in {', '.join(differing)}).\n"
        f"  made for: {expected.describe()}\n  got:      {given.describe()}\n{advice}"
    )
