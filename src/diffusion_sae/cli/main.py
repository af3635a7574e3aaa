"""`diffusion-sae`: parses, runs one command, prints its result; errors of the user's input are one message."""

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMANDS = {
    "demo": "the main job on the embedded model: images → features → k-SAE and probe → a page",
    "extract": "features of images at chosen layers and timesteps, into a store",
    "train": "train a k-sparse autoencoder on a store",
    "encode": "sparse codes of all features of a store, on the disk",
    "probe": "train a probe on a store",
    "sweep": "probes over models, layers, timesteps, prompts, heads and seeds",
    "report": "a page of an SAE's latents and their images, or the figures of a sweep",
    "convert": "SAEs of other libraries into artifacts, and back",
    "browse": "a report with live actions: drop an image, save names, search by text",
    "push": "push a trained artifact or a feature store to the Hub",
    "list": "artifacts on the Hub, by author, model, layer, timestep or data set",
    "layers": "the layers of a model, with width and stride",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help  # the options say their own defaults


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the named command's module is loaded."""
    parser = argparse.ArgumentParser("diffusion-sae", description="See what a diffusion model knows, and use it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=_Help)
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
        sub.add_argument("--config", metavar="FILE.yaml", help="set any option; the command line comes first")
        if name == command:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run, show=module.show)
    return parser


def _read_config(path: str, parser: argparse.ArgumentParser, command: str) -> dict[str, Any]:
    """Options from a YAML file, checked against what the command knows and converted as on the command line."""
    import yaml

    from .._config import refuse_unknown

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options, got a {type(content).__name__}.")  # noqa: TRY004
    (subparsers,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    known = {a.dest for a in subparsers.choices[command]._actions} - {"help", "config", "json"}
    refuse_unknown(content, known, f"{path} for `diffusion-sae {command}`")
    return content


def _parse(argv: list[str]) -> argparse.Namespace:
    command = next((a for a in argv if a in COMMANDS), None)
    parser = build_parser(command)
    args = parser.parse_args(argv)
    if args.config:
        content = _read_config(args.config, parser, args.command)
        (subparsers,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        subparsers.choices[args.command].set_defaults(**content)
        args = parser.parse_args(argv)
    return args


def _quiet() -> None:
    """Other libraries' notices and inner bars would bury the command's own."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # waiting threads that spin take the cores from whatever else runs
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    from ..extraction.loading import hide_loading_bars

    hide_loading_bars()


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit code 0; 1 for an error in the input or the files; 2 for wrong options; 130 for Ctrl-C."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:  # in --config; wrong options exit with 2 by themselves
        print(f"error: {error}", file=sys.stderr)
        return 1
    _quiet()
    from huggingface_hub.errors import StrictDataclassError

    from .._registration import register
    from .._training import TrainingDivergedError

    register()
    run: Callable[[argparse.Namespace], dict[str, Any]] = args.run
    try:
        result = run(args)
    except (ValueError, TypeError, OSError, StrictDataclassError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next run goes on where this one stopped", file=sys.stderr)
        return 130
    print(json.dumps(result, ensure_ascii=False, sort_keys=True) if args.json else args.show(result))
    return 0
