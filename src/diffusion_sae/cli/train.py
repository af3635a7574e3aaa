"""`diffusion-sae train STORE --output-dir DIR`."""

import argparse
import dataclasses
from typing import Any

from .options import SAE, SAE_TRAINING, add_options, given
from .selection import add_selection, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="feature store, made by `diffusion-sae extract`")
    add_selection(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    add_options(parser, "k-SAE", *SAE, leave_out=("d_in",))
    add_options(parser, "training", *SAE_TRAINING)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import FeatureStore, KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainer, SAETrainingArguments

    features = select(FeatureStore(args.store), args, getattr(args, "timesteps", None))
    training = SAETrainingArguments.from_dict(given(args, *SAE_TRAINING))
    config = KSparseAutoencoderConfig(d_in=features.d_in, **given(args, *SAE, leave_out=("d_in",)))
    sae = KSparseAutoencoder(config).to(args.device)
    result = SAETrainer(sae, features, training).train()
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
