"""`diffusion-sae list`."""

import argparse
import dataclasses
from typing import Any

from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--author", help="user or organisation on the Hub")
    parser.add_argument("--model", help="Hub id of the diffusion model, or the short name in artifacts' names (sd15)")
    parser.add_argument("--layer", help="up1 or up_ft1")
    parser.add_argument("--timestep", type=int, help="0…999")
    parser.add_argument("--dataset", help="Hub id of the data set it was trained on")
    parser.add_argument("--kind", help="sae, probe or extractor")
    parser.add_argument("--limit", type=int, help="at most so many")
    parser.add_argument("--token", help="Hub token (default: that of `hf auth login`)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..hub.listing import list_artifacts

    names = ("author", "model", "layer", "timestep", "dataset", "kind", "limit", "token")
    found = list_artifacts(**{name: getattr(args, name) for name in names})
    return {"artifacts": [dataclasses.asdict(artifact) for artifact in found]}


def show(result: dict[str, Any]) -> str:
    rows = [
        (one["repo_id"], one["kind"], ", ".join(one["layers"]), ", ".join(map(str, one["timesteps"])))
        for one in result["artifacts"]
    ]
    return table(rows, ("artifact", "kind", "layers", "timesteps")) if rows else "no artifact on the Hub is all of that"
