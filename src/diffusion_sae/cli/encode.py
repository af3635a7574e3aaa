"""`diffusion-sae encode STORE --sae SAE --output-dir DIR`."""

import argparse
import logging
from typing import Any

from .selection import add_selection, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="feature store, made with the SAE's extraction")
    # required, but --config may set them: `run` asks
    parser.add_argument("--sae", help="folder, embedded name or Hub id of a k-SAE (required)")
    parser.add_argument("--output-dir", help="folder of the codes; an unfinished one is gone on with (required)")
    add_selection(parser)
    parser.add_argument("--format", choices=("parquet", "safetensors"), default="parquet", help="default: parquet")
    parser.add_argument("--batch-size", type=int, default=8192, help="rows that are encoded at a time (default: 8192)")
    parser.add_argument("--file-rows", type=int, default=65_536, help="rows a file (default: 65536)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import FeatureStore, KSparseAutoencoder, encode_features

    missing = [name for name in ("sae", "output_dir") if getattr(args, name) is None]
    if missing:
        options = " and ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(f"encode needs {options}; give them on the command line or in --config.")
    # where it goes on and what it did; to stderr
    logging.getLogger("diffusion_sae.sae.encoding").setLevel(logging.INFO)
    store = FeatureStore(args.store)
    sae = KSparseAutoencoder.from_pretrained(args.sae).to(args.device)
    made = encode_features(
        sae,
        select(store, args, sae.config.timesteps),
        args.output_dir,
        format=args.format,
        batch_size=args.batch_size,
        file_rows=args.file_rows,
    )
    density = made.density()
    return {
        "output_dir": str(made.path),
        "rows": len(made),
        "num_latents": made.num_latents,
        "k": made.k,
        "l0": sum(mark["active"] for mark in made.manifest.shards) / len(made),
        "dead_latents": (density == 0).double().mean().item(),
        "files": made.manifest.num_shards,
    }


def show(result: dict[str, Any]) -> str:
    return (
        f"codes of {result['rows']:,} rows in {result['output_dir']} ({result['files']} files): "
        f"{result['num_latents']:,} latents, L0 {result['l0']:.1f}, dead latents {result['dead_latents']:.1%}"
    )
