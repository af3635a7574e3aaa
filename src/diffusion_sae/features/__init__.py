"""The seam: plain tensors (N, d_in), and a manifest that says where they came from."""

from .feature_set import FeatureSet, as_feature_set
from .store import FeatureStore
from .writer import Shard, StoreWriter

__all__ = ["FeatureSet", "FeatureStore", "Shard", "StoreWriter", "as_feature_set"]
