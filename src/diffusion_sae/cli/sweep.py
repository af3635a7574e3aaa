"""`diffusion-sae sweep --config sweep.yaml`."""

import argparse
from typing import Any

from .options import SWEEP, add_options, given
from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", action="store_true", help="print what would be done, and what it takes; do nothing")
    add_options(parser, "sweep", *SWEEP)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..analysis.sweep import SweepConfig

    config = SweepConfig.from_dict(given(args, *SWEEP))
    if args.plan:
        from ..analysis.sweep.plan import plan

        return plan(config)
    from ..analysis.sweep import Sweep

    result = Sweep(config).run()
    return {"sweep": config.output_dir, "fits": result["fits"], "best": result["best"]}


def show(result: dict[str, Any]) -> str:
    if "best" not in result:
        from ..analysis.sweep.plan import describe

        return describe(result)
    lines = [f"{result['fits']} fits in {result['sweep']}; `diffusion-sae report {result['sweep']}` draws them"]
    header = ("model", "head", "label", "best cell", "accuracy", "to the second best")
    rows = []
    for best in result["best"]:
        second = best["margins"].get("second best")
        margin = "" if second is None else f"{second['difference']:+.3f} [{second['low']:+.3f}, {second['high']:+.3f}]"
        cell = f"{best['layer']} t={best['timestep']} {best['prompt']}"
        rows.append((best["model"], best["head"], best["label"], cell, f"{best['accuracy']:.3f}", margin))
    return "\n".join([*lines, table(rows, header)] if rows else lines)
