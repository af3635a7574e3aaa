"""The heads: from features to logits. The equations are in the docstrings of the classes."""

from typing import Any

from .attention import AttentionHead
from .base import Head
from .diff_c import DiffCHead, as_feature_map
from .fusion import FUSIONS, FusionHead
from .linear import LinearHead, MLPHead
from .memory import KNNHead, MemoryHead, PrototypeHead
from .sparse import SAEHead

HEADS: dict[str, type[Head]] = {
    head.name: head
    for head in (LinearHead, MLPHead, DiffCHead, AttentionHead, FusionHead, KNNHead, PrototypeHead, SAEHead)
}


def build_head(config: Any) -> Head:
    kind = HEADS[config.head]
    return (FUSIONS[config.fusion] if kind is FusionHead else kind)(config)


__all__ = [
    "AttentionHead",
    "DiffCHead",
    "FusionHead",
    "Head",
    "KNNHead",
    "LinearHead",
    "MLPHead",
    "MemoryHead",
    "PrototypeHead",
    "SAEHead",
    "as_feature_map",
    "build_head",
]
