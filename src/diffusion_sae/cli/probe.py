"""`diffusion-sae probe STORE --output-dir DIR`."""

import argparse
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
        "--augment",
        action="store_true",
        help="train on the augmented views of the store, made by `diffusion-sae extract --views N`",
    )
    parser.add_argument("--sae", help="of --head sae: folder or name of the SAE")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    add_options(parser, "probe", *PROBE, leave_out=SETTLED)
    add_options(parser, "training", *PROBE_TRAINING)


def _features(path: str | None, args: argparse.Namespace, head: str, view: int = 0) -> Any:
    """One layer and timestep of a store; for fusion all of them, or those of --layer and --timestep."""
    from .. import FeatureStore

    if path is None:
        return None
    store = FeatureStore(path)
    if head != "fusion":
        return select(store, args, view=view)
    layers, timesteps = (None if one is None else [one] for one in (args.layer, args.timestep))
    return store.aligned(layers, timesteps, labels=args.labels, view=view)


def _views(args: argparse.Namespace, head: str) -> list[Any]:
    from .. import FeatureStore

    if not args.augment:
        return []
    count = FeatureStore(args.store).num_views
    if not count:
        raise ValueError(f"--augment needs views, which {args.store} does not have: extract with --views N.")
    return [_features(args.store, args, head, view) for view in range(1, count + 1)]


def _probe(args: argparse.Namespace, features: Any, settings: dict[str, Any]) -> Any:
    from .. import DiffusionProbe, DiffusionProbeConfig, KSparseAutoencoder
    from ..analysis.probing import class_config

    head = settings.get("head", "linear")
    if (head == "sae") != (args.sae is not None):
        raise ValueError(f"--sae belongs to --head sae, which needs it; got --head {head} and --sae {args.sae}.")
    settings |= class_config(features)
    if head != "sae":
        inputs = {"inputs": features.inputs} if head == "fusion" else {}
        return DiffusionProbe(DiffusionProbeConfig(d_in=features.d_in, **inputs, **settings))
    sae = KSparseAutoencoder.from_pretrained(args.sae)
    timestep = None if sae.config.timesteps is None else features.of_timesteps[0]
    return DiffusionProbe.from_sae(sae, timestep=timestep, **{k: v for k, v in settings.items() if k != "head"})


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import ProbeTrainer, ProbeTrainingArguments

    settings = given(args, *PROBE, leave_out=SETTLED)
    stores = (args.store, args.validation_store, args.test_store)
    head = settings.get("head", "linear")
    features, validation, test = (_features(path, args, head) for path in stores)
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
    test = f", test accuracy {result['test_accuracy']:.4f}" if "test_accuracy" in result else ""
    return f"probe in {result['probe']}: validation accuracy {result['validation_accuracy']:.4f}{test}"
