"""`diffusion-sae report SAE STORE DATASET OUTPUT.html`, or `diffusion-sae report SWEEP [OUTPUT_DIR]`."""

import argparse
from pathlib import Path
from typing import Any

from .selection import add_labels, add_selection, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", help="folder, embedded name or Hub id of a k-SAE; or the folder of a finished sweep")
    parser.add_argument(
        "store", nargs="?", help="feature store of labelled images; of a sweep: folder of the report (default: in it)"
    )
    parser.add_argument("dataset", nargs="?", help="the images the store was made of")
    parser.add_argument("output", nargs="?", help="HTML file to write")
    parser.add_argument("--split", default="train", help="split of a named data set (default: train)")
    parser.add_argument("--latents", type=int, default=24, help="how many of the purest latents to show (default: 24)")
    add_selection(parser)
    add_labels(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if (Path(args.sae) / "sweep.json").is_file():
        from ..report.sweep import write_sweep_report

        return write_sweep_report(args.sae, args.store)
    if args.output is None:
        raise ValueError(
            "A report needs an SAE, its store, its images and an HTML file to write: SAE STORE DATASET OUTPUT.html; or "
            f"the folder of a finished sweep, which {args.sae} is not: it has no sweep.json."
        )
    from .. import FeatureStore, KSparseAutoencoder
    from ..extraction.sources import open_images
    from ..report.build import write_sae_report

    sae = KSparseAutoencoder.from_pretrained(args.sae)
    features = select(FeatureStore(args.store), args)
    source = open_images(args.dataset, args.split).first(features.num_images)
    return write_sae_report(args.output, sae, features, source, name=args.sae, panels=args.latents)


def show(result: dict[str, Any]) -> str:
    if "findings" in result:
        return f"{len(result['figures'])} figures and {result['findings']}\n{result['page']}"
    figures = ", ".join(f"{name} {value}" for name, value in result["figures"].items())
    shuffled = result["shuffled_purity"]
    baseline = "" if shuffled is None else f" (shuffled labels: {shuffled:.2f})"
    return f"{figures}{baseline}\n{result['page']}"
