"""`diffusion-sae layers MODEL`."""

import argparse
import dataclasses
from typing import Any

from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder of a diffusers pipeline, or an embedded name such as tiny-sd")
    parser.add_argument("--image-size", type=int, help="side of the image in pixels")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import DiffusionFeatureExtractor

    extractor = DiffusionFeatureExtractor.from_pretrained(
        args.model, **({} if args.image_size is None else {"image_size": args.image_size}), **_any_layer(args.model)
    )
    layers = [dataclasses.asdict(layer) for layer in extractor.available_layers()]
    return {"model": args.model, "image_size": extractor.config.image_size, "layers": layers}


def _any_layer(model: str) -> dict[str, Any]:
    """An artifact fixes its layers; a pipeline is asked for whichever exists."""
    from ..extraction.loading import find_artifact, first_settings

    return {} if find_artifact(model) is not None else first_settings(model)


def show(result: dict[str, Any]) -> str:
    rows = [(e["name"], e["channels"], f"{e['stride']} px", e["module_path"]) for e in result["layers"]]
    return f"{result['model']} at {result['image_size']} px\n" + table(rows, ("layer", "channels", "stride", "module"))
