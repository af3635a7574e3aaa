"""Making and training an SAE of given settings."""

from collections.abc import Mapping
from typing import Any

import torch

from ..features import FeatureSet
from ..sae.configuration import KSparseAutoencoderConfig
from ..sae.modeling import KSparseAutoencoder
from ..sae.results import SAETrainingResult
from ..sae.trainer import SAETrainer
from ..sae.training_args import SAETrainingArguments


def train_sae(
    features: FeatureSet, settings: Mapping[str, Any], training: SAETrainingArguments, *, device: str
) -> tuple[SAETrainingResult, KSparseAutoencoder]:
    """Result and SAE, which with `shard_latents` stays on the meta device.

    Args:
        features: rows to train on, of which some are held out.
        settings: fields of KSparseAutoencoderConfig, without d_in.
        training: how; the finished SAE is in its `output_dir`.
        device: with `shard_latents` each process takes its own.
    """
    config = KSparseAutoencoderConfig(d_in=features.d_in, **settings)
    with torch.device("meta" if training.shard_latents else "cpu"):
        sae = KSparseAutoencoder(config)
    if not training.shard_latents:
        torch.nn.Module.to(sae, device)
    return SAETrainer(sae, features, training).train(), sae
