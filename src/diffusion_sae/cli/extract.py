"""`diffusion-sae extract DATASET OUTPUT_DIR`."""

import argparse
import logging
from typing import Any

from ..provenance import DTYPES
from .options import EXTRACTOR, PLACEMENT, add_options, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder of images (class sub-folders give labels), Parquet file, datasets name")
    parser.add_argument("output_dir", help="folder of the feature store; an unfinished one is gone on with")
    parser.add_argument("--split", default="train", help="split of a named data set (default: train)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a forward pass (default: 32)")
    parser.add_argument("--shard-size", type=int, default=1024, help="images a shard (default: 1024)")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read; report them")
    parser.add_argument("--append", action="store_true", help="put the images behind those of a complete store")
    parser.add_argument(
        "--store-dtype",
        choices=DTYPES,
        help="type of the stored numbers (default: that of the computation)",
    )
    add_options(parser, "extraction", *EXTRACTOR)
    add_options(parser, "where and how the model runs", *PLACEMENT)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import DiffusionFeatureExtractor

    # where it goes on and what it did; to stderr
    logging.getLogger("diffusion_sae.extraction.run").setLevel(logging.INFO)
    settings = given(args, *EXTRACTOR)
    model = settings.pop("model", "tiny-sd")
    extractor = DiffusionFeatureExtractor.from_pretrained(model, **given(args, *PLACEMENT), **settings)
    store = extractor.extract(
        args.dataset,
        args.output_dir,
        split=args.split,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        limit=args.limit,
        skip_broken=args.skip_broken,
        append=args.append,
        store_dtype=args.store_dtype,
    )
    return {
        "store": str(store.path),
        "images": len(store),
        "skipped": store.skipped,
        "layers": list(store.layers),
        "timesteps": list(store.timesteps),
        "fingerprint": store.provenance.fingerprint,
    }


def show(result: dict[str, Any]) -> str:
    lines = [f"{result['images']:,} images in {result['store']} (fingerprint {result['fingerprint']})"]
    lines += [f"skipped {entry['source']}: {entry['reason']}" for entry in result["skipped"]]
    return "\n".join(lines)
