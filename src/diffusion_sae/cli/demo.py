"""`diffusion-sae demo`."""

import argparse
from typing import Any

from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", default="runs/demo", help="folder for all results (default: runs/demo)")
    parser.add_argument(
        "--quick", action="store_true", help="100 images a split and a short training, for a first look"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..report.demo import QUICK, run_demo

    return run_demo(args.output_dir, QUICK if args.quick else None)


def show(result: dict[str, Any]) -> str:
    rows: list[tuple[object, object]] = [(name, value) for name, value in result["figures"].items()]
    if result["label_purity_shuffled"] is not None:
        rows.append(("Label purity, shuffled labels", f"{result['label_purity_shuffled']:.2f}"))
    rows.append(("Probe accuracy (test)", f"{result['probe_accuracy']:.1%}"))
    rows += [(f"  baseline: {name}", f"{value:.1%}") for name, value in result["baselines"].items()]
    rows += [("k-SAE", result["sae"]), ("probe", result["probe"]), ("page", result["page"])]
    return table(rows)
