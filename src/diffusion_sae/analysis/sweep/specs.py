"""The entries of a sweep's lists, as they stand in YAML, read into what they mean."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from ..._config import check, check_choice, refuse_unknown
from ...provenance import POOLINGS, ExtractorConfig

OF = (None, "own", "other")
# what a head is given where its entry names no pooling
POOLING_OF = dict.fromkeys(("linear", "mlp", "knn", "prototype"), "mean") | {"attention": "tokens", "diff-c": "none"}
EXTRACTION = ("image_size", "dtype", "revision", "guidance", "noise", "ensemble", "crop", "resample")


class Named(Protocol):
    @property
    def name(self) -> str: ...


def distinct_names(specs: Iterable[Named]) -> None:
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"{', '.join(twice)} is named twice; give each entry a name of its own.")


def _entry(entry: Any, key: str, allowed: Iterable[str], what: str) -> dict[str, Any]:
    """An entry as a mapping; a plain string is its `key`."""
    content = {key: entry} if isinstance(entry, str) else entry
    check(isinstance(content, Mapping), f"{what} is a string or a mapping, got {entry!r}.")
    refuse_unknown(content, allowed, what)
    return dict(content)


@dataclass(frozen=True)
class PromptSpec:
    """What a model is told of an image."""

    name: str
    prompt: str = ""
    of: str | None = None
    """own: the template is filled with the image's own class, which tells the model the answer; other: with a wrong
    one, drawn from the other classes."""
    extraction: dict[str, Any] = field(default_factory=dict)
    """Further settings of ExtractorConfig."""

    @classmethod
    def parse(cls, entry: Any) -> Self:
        further = ("prompt_from", "prompt_choices", "clip_model", "classifier_free_pair")
        content = _entry(entry, "prompt", ("name", "prompt", "of", *further), "A sweep's prompt")
        prompt, from_clip = content.get("prompt", ""), content.get("prompt_from") == "clip"
        is_template = ("{}" in prompt or "{number}" in prompt) and not from_clip
        of = content.get("of", "own" if is_template else None)
        check_choice("of", of, OF)
        check(
            (of is not None) == is_template,
            f"of={of!r} and the prompt {prompt!r} do not fit: a template has {{}} or {{number}} for a class.",
        )
        extraction = {key: content[key] for key in further if key in content}
        if "prompt_choices" in extraction:
            extraction["prompt_choices"] = tuple(extraction["prompt_choices"])
        return cls(content.get("name", prompt or "empty"), prompt, of, extraction)

    def with_choices(self, class_names: Sequence[str] | None) -> Self:
        """Of prompt_from="clip" with a template and no choices: those of the data's classes."""
        if self.extraction.get("prompt_from") != "clip" or "{}" not in self.prompt:
            return self
        check(class_names is not None, f"The prompt {self.prompt!r} needs images with class names.")
        choices = tuple(self.prompt.replace("{}", name) for name in class_names or ())
        return dataclasses.replace(self, prompt="", extraction={**self.extraction, "prompt_choices": choices})

    def text(self, number: int, name: str) -> str:
        return self.prompt.replace("{number}", str(number)).replace("{}", name)


@dataclass(frozen=True)
class ModelSpec:
    """A model with its grid."""

    name: str
    model: str
    layers: tuple[str, ...]
    timesteps: tuple[int, ...]
    prompts: tuple[PromptSpec, ...]
    weights: tuple[str, ...]
    extraction: dict[str, Any]

    @classmethod
    def parse(cls, entry: Any, common: Mapping[str, Sequence[Any]]) -> Self:
        content = _entry(entry, "model", ("model", "name", *common, *EXTRACTION), "A sweep's model")
        check(bool(content.get("model")), f"A sweep's model needs `model`, got {entry!r}.")
        grid = {key: tuple(content.get(key, common[key])) for key in common}
        for one in grid["weights"]:
            check_choice("weights", one, ("trained", "random"))
        prompts = tuple(PromptSpec.parse(prompt) for prompt in grid["prompts"])
        distinct_names(prompts)
        extraction = {key: content[key] for key in EXTRACTION if key in content}
        model = content["model"]
        spec = cls(
            content.get("name", model.rstrip("/").rsplit("/", 1)[-1]),
            model,
            grid["layers"],
            grid["timesteps"],
            prompts,
            grid["weights"],
            extraction,
        )
        ExtractorConfig(model=model, layers=spec.layers, timesteps=spec.timesteps, **extraction)  # raises if invalid
        return spec


@dataclass(frozen=True)
class HeadSpec:
    """A probe's head, and how it is trained."""

    name: str
    head: str
    pooling: str
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of DiffusionProbeConfig and of ProbeTrainingArguments."""

    @classmethod
    def parse(cls, entry: Any) -> Self:
        content = {"head": entry} if isinstance(entry, str) else dict(entry)
        check(isinstance(content.get("head"), str), f"A sweep's head needs `head`, got {entry!r}.")
        head = content.pop("head")
        name, pooling = content.pop("name", head), content.pop("pooling", POOLING_OF.get(head))
        if pooling is None:
            raise ValueError(f"The head {head!r} has no usual pooling; add pooling: one of {', '.join(POOLINGS)}.")
        check_choice("pooling", pooling, POOLINGS)
        return cls(name, head, pooling, content)


@dataclass(frozen=True)
class LabelSpec:
    """What is predicted: a label of the data set, or groups of its classes."""

    name: str
    groups: dict[str, list[str]] | None = None

    @classmethod
    def parse(cls, entry: Any) -> Self:
        content = _entry(entry, "name", ("name", "groups"), "A sweep's label")
        check(bool(content.get("name")), f"A sweep's label needs `name`, got {entry!r}.")
        groups = content.get("groups")
        if groups is not None:
            check(len(groups) > 1, f"The label {content['name']!r} needs at least two groups.")
            members = [name for names in groups.values() for name in names]
            check(len(set(members)) == len(members), f"A class stands in two groups of {content['name']!r}: {members}.")
        return cls(content["name"], groups)
