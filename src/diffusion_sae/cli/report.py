"""`diffusion-sae report SAE STORE DATASET OUTPUT.html`."""

import argparse
from typing import Any

from .selection import add_labels, add_selection, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", help="folder, embedded name or Hub id of a k-SAE")
    parser.add_argument("store", help="feature store of labelled images, made with the SAE's extraction")
    parser.add_argument("dataset", help="the images the store was made of")
    parser.add_argument("output", help="HTML file to write")
    parser.add_argument("--split", default="train", help="split of a named data set (default: train)")
    parser.add_argument("--latents", type=int, default=24, help="how many of the purest latents to show (default: 24)")
    add_selection(parser)
    add_labels(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import FeatureStore, KSparseAutoencoder
    from ..extraction.sources import open_images
    from ..report.build import write_sae_report

    sae = KSparseAutoencoder.from_pretrained(args.sae)
    features = select(FeatureStore(args.store), args)
    source = open_images(args.dataset, args.split).first(features.num_images)
    return write_sae_report(args.output, sae, features, source, name=args.sae, panels=args.latents)


def show(result: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {value}" for name, value in result["figures"].items())
    shuffled = result["shuffled_purity"]
    baseline = "" if shuffled is None else f" (shuffled labels: {shuffled:.2f})"
    return f"{figures}{baseline}\n{result['page']}"
