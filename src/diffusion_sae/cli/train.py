"""`diffusion-sae train STORE --output-dir DIR`."""

import argparse
import dataclasses
from typing import Any

from .options import SAE, SAE_TRAINING, add_options, given
from .selection import add_selection, select

SETTLED = ("d_in", "converted_from")  # what follows from the store, and what training does not set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="feature store, made by `diffusion-sae extract`")
    add_selection(parser)
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda or mps (default: cpu); with --shard-latents each process takes its own",
    )
    add_options(parser, "k-SAE", *SAE, leave_out=SETTLED)
    add_options(parser, "training", *SAE_TRAINING)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .. import FeatureStore, KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainer, SAETrainingArguments

    features = select(FeatureStore(args.store), args, getattr(args, "timesteps", None))
    training = SAETrainingArguments.from_dict(given(args, *SAE_TRAINING))
    config = KSparseAutoencoderConfig(d_in=features.d_in, **given(args, *SAE, leave_out=SETTLED))
    with torch.device("meta" if training.shard_latents else "cpu"):
        sae = KSparseAutoencoder(config)
    result = SAETrainer(sae if training.shard_latents else sae.to(args.device), features, training).train()
    return {
        "sae": training.output_dir,
        "num_latents": config.num_latents,
        "k": config.k,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        **dataclasses.asdict(result.metrics),
    }


def show(result: dict[str, Any]) -> str:
    return (
        f"k-SAE with {result['num_latents']:,} latents in {result['sae']}: on {result['rows']:,} held-out rows FVU "
        f"{result['fvu']:.4f}, L0 {result['l0']:.1f}, dead latents {result['dead_latents']:.1%}"
    )
