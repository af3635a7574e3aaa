"""diffusion_sae: see what a diffusion model knows, and use it."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.sweep.config import SweepConfig
    from .analysis.sweep.run import Sweep
    from .extraction.extractor import DiffusionFeatureExtractor
    from .features import FeatureStore
    from .hub.listing import list_artifacts
    from .probes.configuration import DiffusionProbeConfig
    from .probes.modeling import DiffusionProbe
    from .probes.trainer import ProbeTrainer
    from .probes.training_args import ProbeTrainingArguments
    from .sae.configuration import KSparseAutoencoderConfig
    from .sae.encoding import encode_features
    from .sae.modeling import KSparseAutoencoder
    from .sae.sparse_codes import SparseCodes
    from .sae.trainer import SAETrainer, train_together
    from .sae.training_args import SAETrainingArguments

_HOMES = {
    "DiffusionFeatureExtractor": "extraction.extractor",
    "FeatureStore": "features",
    "KSparseAutoencoder": "sae.modeling",
    "KSparseAutoencoderConfig": "sae.configuration",
    "SAETrainer": "sae.trainer",
    "SAETrainingArguments": "sae.training_args",
    "DiffusionProbe": "probes.modeling",
    "DiffusionProbeConfig": "probes.configuration",
    "ProbeTrainer": "probes.trainer",
    "ProbeTrainingArguments": "probes.training_args",
    "Sweep": "analysis.sweep.run",
    "SweepConfig": "analysis.sweep.config",
    "SparseCodes": "sae.sparse_codes",
    "encode_features": "sae.encoding",
    "list_artifacts": "hub.listing",
    "train_together": "sae.trainer",
}
__all__ = [
    "DiffusionFeatureExtractor",
    "DiffusionProbe",
    "DiffusionProbeConfig",
    "FeatureStore",
    "KSparseAutoencoder",
    "KSparseAutoencoderConfig",
    "ProbeTrainer",
    "ProbeTrainingArguments",
    "SAETrainer",
    "SAETrainingArguments",
    "SparseCodes",
    "Sweep",
    "SweepConfig",
    "encode_features",
    "list_artifacts",
    "train_together",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# Importing the package registers the pipeline with transformers, which loads torch. The command line does it when a
# command runs instead, so that `diffusion-sae --help` answers at once.
if Path(sys.argv[0] if sys.argv else "").stem != "diffusion-sae":
    from ._registration import register

    register()
