"""DiffusionProbeConfig."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .._config import check, check_choice, check_integer, check_number
from ..hub.artifact import ArtifactConfig, refuse_unknown_config_keys

HEADS = ("linear", "diff-c")


@strict
class DiffusionProbeConfig(ArtifactConfig):
    """Shape of a probe; the classes are `id2label` / `label2id`, as in transformers.

    Args:
        d_in: width of the features (channels).
        head: `linear` on pooled features, or `diff-c`, Revelio's convolutional classifier on whole activations.
        width: channels of Diff-C's convolutions; 1024 in the paper.
        dropout: dropout rate of Diff-C.
        init_seed: seed of the initial weights; the global random state is not used.
    """

    model_type = "diffusion-probe"
    required_keys = ("d_in", "head")

    d_in: int
    head: str = "linear"
    width: int = 1024
    dropout: float | int = 0.3
    init_seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_config_keys(self, kwargs)
        check_integer("d_in", self.d_in, 1)
        check_choice("head", self.head, HEADS)
        check_integer("width", self.width, 1)
        check_number("dropout", self.dropout, 0, 1)
        check_integer("init_seed", self.init_seed, 0)
        self._settle_class_names(kwargs.get("num_labels"))
        super().__post_init__(**kwargs)
        check(
            self.num_labels is not None and self.num_labels >= 2, f"A probe needs ≥ 2 classes, got {self.num_labels}."
        )

    def _settle_class_names(self, num_labels: int | None) -> None:
        """Complete id2label and label2id from each other; transformers drops or replaces what does not agree."""
        if self.id2label is None and self.label2id is None:
            return
        if self.id2label is None:
            self.id2label = {number: name for name, number in self.label2id.items()}  # type: ignore[union-attr]
        self.id2label = {int(number): name for number, name in (self.id2label or {}).items()}
        count, inverse = len(self.id2label), {name: number for number, name in (self.id2label or {}).items()}
        check(
            sorted(self.id2label) == list(range(count)) and len(inverse) == count,
            f"id2label must give each class 0…{count - 1} a name of its own, got {self.id2label}.",
        )
        check(
            self.label2id in (None, inverse),
            f"label2id must be the inverse of id2label, {inverse}, got {self.label2id}. Give one of the two.",
        )
        check(num_labels in (None, count), f"num_labels is {num_labels}, but id2label names {count} classes.")
        self.label2id = inverse
