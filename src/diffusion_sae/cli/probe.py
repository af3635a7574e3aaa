"""`diffusion-sae probe STORE --output-dir DIR`."""

import argparse
from collections.abc import Sequence
from typing import Any

from .options import PROBE, PROBE_TRAINING, add_options, given
from .selection import add_labels, add_selection, select

# what follows from the store, the SAE and the training
SETTLED = ("d_in", "inputs", "sae", "latent_names", "num_rows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="feature store with labels, made by `diffusion-sae extract`")
    parser.add_argument("--validation-store", help="store to choose on (default: a part of the training images)")
    parser.add_argument("--test-store", help="store to report on, once, after everything is chosen")
    add_selection(parser)
    add_labels(parser)
    parser.add_argument(
        "--labels-from",
        nargs="+",
        metavar="FILE",
        help="CSV or Parquet with the column `image` (path or row in the data set) and columns of labels; one file for "
        "all stores, or one each in the order store, validation store, test store",
    )
    parser.add_argument(
        "--problem-type",
        default="single_label_classification",
        choices=("single_label_classification", "multi_label_classification", "regression"),
        help="of --labels-from: one column of classes, columns of 0 and 1, or columns of numbers (default: "
        "single_label_classification)",
    )
    parser.add_argument(
        "--augment",
        action="store_true",
        help="train on the augmented views of the store, made by `diffusion-sae extract --views N`",
    )
    parser.add_argument("--sae", help="of --head sae: folder or name of the SAE")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    add_options(parser, "probe", *PROBE, leave_out=SETTLED)
    add_options(parser, "training", *PROBE_TRAINING)


STORES = ("store", "validation_store", "test_store")


def _features(
    which: str, args: argparse.Namespace, head: str, view: int = 0, names: Sequence[str] | None = None
) -> Any:
    """One layer and timestep of a store; for fusion all of them, or those of --layer and --timestep."""
    from .. import FeatureStore

    path = getattr(args, which)
    if path is None:
        return None
    store = FeatureStore(path)
    if head != "fusion":
        features = select(store, args, view=view)
    else:
        layers, timesteps = (None if one is None else [one] for one in (args.layer, args.timestep))
        features = store.aligned(layers, timesteps, labels=args.labels, view=view)
    if args.labels_from is None:
        return features
    from ..features.label_files import read_label_file

    file = _label_files(args)[which]
    return features.with_labels(*read_label_file(file, store.sources, args.problem_type, names))


def _label_files(args: argparse.Namespace) -> dict[str, str]:
    """By the store whose images they label."""
    files: list[str] = args.labels_from
    named = [which for which in STORES if getattr(args, which) is not None]
    if args.labels is not None:
        raise ValueError("--labels names labels of the store, --labels-from a file with others: give one of the two.")
    if len(files) == 1:
        return dict.fromkeys(named, files[0])
    if len(files) != len(named):
        raise ValueError(f"--labels-from takes one file, or one for each of the {len(named)} stores, got {len(files)}.")
    return dict(zip(named, files, strict=True))


def _views(args: argparse.Namespace, head: str) -> list[Any]:
    from .. import FeatureStore

    if not args.augment:
        return []
    count = FeatureStore(args.store).num_views
    if not count:
        raise ValueError(f"--augment needs views, which {args.store} does not have: extract with --views N.")
    return [_features("store", args, head, view) for view in range(1, count + 1)]


def _probe(args: argparse.Namespace, features: Any, settings: dict[str, Any]) -> Any:
    from .. import DiffusionProbe, DiffusionProbeConfig, KSparseAutoencoder
    from ..analysis.probing import class_config

    head = settings.get("head", "linear")
    if (head == "sae") != (args.sae is not None):
        raise ValueError(f"--sae belongs to --head sae, which needs it; got --head {head} and --sae {args.sae}.")
    settings |= class_config(features) | {"problem_type": args.problem_type}
    if head != "sae":
        inputs = {"inputs": features.inputs} if head == "fusion" else {}
        return DiffusionProbe(DiffusionProbeConfig(d_in=features.d_in, **inputs, **settings))
    sae = KSparseAutoencoder.from_pretrained(args.sae)
    timestep = None if sae.config.timesteps is None else features.of_timesteps[0]
    return DiffusionProbe.from_sae(sae, timestep=timestep, **{k: v for k, v in settings.items() if k != "head"})


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import ProbeTrainer, ProbeTrainingArguments

    settings = given(args, *PROBE, leave_out=SETTLED)
    head = settings.get("head", "linear")
    if args.labels_from is None and args.problem_type != "single_label_classification":
        raise ValueError(f"--problem-type {args.problem_type} needs --labels-from: a store has one class an image.")
    features = _features("store", args, head)
    names = features.class_names  # of a label file: those of the training images
    validation, test = (_features(which, args, head, names=names) for which in STORES[1:])
    training = ProbeTrainingArguments.from_dict(given(args, *PROBE_TRAINING))
    probe = _probe(args, features, settings)
    views = _views(args, head)
    trainer = ProbeTrainer(probe.to(args.device), features, training, validation_features=validation, views=views)
    result = trainer.train()
    of_validation = {f"validation_{name}": value for name, value in result.validation.values.items()}
    summary = {"probe": training.output_dir, **of_validation, **result.chosen}
    if test is not None:
        summary |= {f"test_{name}": value for name, value in trainer.evaluate(test).values.items()}
        trainer.save()
    return summary


def show(result: dict[str, Any]) -> str:
    measured = {name: value for name, value in result.items() if name.startswith(("validation_", "test_"))}
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())
    return f"probe in {result['probe']}: {shown}"
