"""`diffusion-sae train STORE --output-dir DIR`, or `diffusion-sae train --recipe FILE.yaml`."""

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from .options import SAE, SAE_TRAINING, add_options, given
from .selection import add_selection, select

SETTLED = ("d_in", "converted_from")  # what follows from the store, and what training does not set
OF_RECIPES = ("push", "dry_run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", help="feature store, made by `diffusion-sae extract`")
    add_selection(parser)
    parser.add_argument(
        "--device",
        help="cpu, cuda or mps (default: cpu; of a recipe what there is); with --shard-latents each process takes its "
        "own",
    )
    recipes = parser.add_argument_group("recipe: everything from images to a published artifact")
    recipes.add_argument(
        "--recipe", metavar="FILE.yaml", help="such as hub_cards/sd15-up1-t25.yaml; in place of a store and settings"
    )
    recipes.add_argument("--push", metavar="OWNER/NAME", help="push the finished artifact to the Hub")
    recipes.add_argument(
        "--dry-run",
        action="store_true",
        help="try it out: the true architecture with random weights, few images, few steps",
    )
    add_options(parser, "k-SAE", *SAE, leave_out=SETTLED)
    add_options(parser, "training", *SAE_TRAINING)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.recipe is not None:
        return _run_recipe(args)
    if args.store is None:
        raise ValueError("train needs a feature store, made by `diffusion-sae extract`, or --recipe FILE.yaml.")
    unused = [name for name in OF_RECIPES if getattr(args, name)]
    if unused:
        options = " and ".join("--" + name.replace("_", "-") for name in unused)
        raise ValueError(f"{options} belong to --recipe. `diffusion-sae push` pushes what was trained on a store.")
    from .. import FeatureStore, SAETrainingArguments
    from ..analysis.training import train_sae

    features = select(FeatureStore(args.store), args, getattr(args, "timesteps", None))
    training = SAETrainingArguments.from_dict(given(args, *SAE_TRAINING))
    settings = given(args, *SAE, leave_out=SETTLED)
    result, sae = train_sae(features, settings, training, device=args.device or "cpu")
    return {
        "sae": training.output_dir,
        "num_latents": sae.config.num_latents,
        "k": sae.config.k,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        **dataclasses.asdict(result.metrics),
    }


def _run_recipe(args: argparse.Namespace) -> dict[str, Any]:
    settings = given(args, *SAE, leave_out=SETTLED) | given(args, *SAE_TRAINING)
    output_dir = settings.pop("output_dir", None)
    settings |= {name: value for name in ("store", "layer", "timestep") if (value := getattr(args, name)) is not None}
    if settings:
        raise ValueError(
            f"A recipe says how it is made; it cannot be given {', '.join(settings)} as well. Change a copy of "
            f"{args.recipe}."
        )
    from ..analysis.recipe import Recipe, RecipeRun

    # which stage it is in; to stderr
    for name in ("analysis.recipe.run", "extraction.run"):
        logging.getLogger(f"diffusion_sae.{name}").setLevel(logging.INFO)
    recipe = Recipe.read(args.recipe)
    folder = output_dir or Path("runs", recipe.name + ("-dry-run" if args.dry_run else ""))
    result = RecipeRun(recipe, folder, device=args.device, dry_run=args.dry_run).run(push=args.push)
    return {"artifact": str(result.artifact), "metrics": result.metrics, "commit": result.commit}


def show(result: dict[str, Any]) -> str:
    if "artifact" not in result:
        return (
            f"k-SAE with {result['num_latents']:,} latents in {result['sae']}: on {result['rows']:,} held-out rows FVU "
            f"{result['fvu']:.4f}, L0 {result['l0']:.1f}, dead latents {result['dead_latents']:.1%}"
        )
    measured = {
        part: values for part, values in result["metrics"].items() if part in ("test", "validation", "held_out")
    }
    lines = [f"artifact in {result['artifact']}"]
    for part, values in measured.items():
        lines.append(f"{part}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float)))
    if result["commit"] is not None:
        lines.append(f"pushed: {result['commit']}")
    return "\n".join(lines)
