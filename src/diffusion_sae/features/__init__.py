"""The seam: plain tensors (N, d_in), and a manifest that says where they came from."""

from .aligned import AlignedFeatures
from .feature_set import FeatureSet, as_feature_set
from .labels import LabelSet
from .shuffle import ShuffledBatches
from .source import FeatureSource
from .store import FeatureStore
from .subset import ImageSubset
from .writer import Shard, StoreWriter

__all__ = [
    "AlignedFeatures",
    "FeatureSet",
    "FeatureSource",
    "FeatureStore",
    "ImageSubset",
    "LabelSet",
    "Shard",
    "ShuffledBatches",
    "StoreWriter",
    "as_feature_set",
]
