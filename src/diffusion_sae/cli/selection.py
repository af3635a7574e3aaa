"""`--layer` and `--timestep`: which features of a store; not needed where it has one."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..features import FeatureSet, FeatureStore


def add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", help="layer of the store (default: its only one)")
    parser.add_argument("--timestep", type=int, help="timestep of the store (default: its only one)")


def add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", help="which labels of the store, such as subgroup (default: its first)")


def _only(name: str, given: Any, values: Sequence[Any]) -> Any:
    if given is None and len(values) > 1:
        raise ValueError(f"The store holds several: choose --{name} from {', '.join(map(str, values))}.")
    return values[0] if given is None else given


def select(
    store: "FeatureStore", args: argparse.Namespace, timesteps: Sequence[int] | None = None, *, view: int = 0
) -> "FeatureSet":
    """`timesteps`: what is taken together where no --timestep is given."""
    labels = getattr(args, "labels", None)  # of commands that use any
    layer = _only("layer", args.layer, store.layers)
    if timesteps is not None and args.timestep is None:
        return store.select(layer, timesteps, labels=labels, view=view)
    return store.select(layer, _only("timestep", args.timestep, store.timesteps), labels=labels, view=view)
