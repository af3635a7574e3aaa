"""`diffusion-sae probe STORE --output-dir DIR`."""

import argparse
from typing import Any

from .options import PROBE, PROBE_TRAINING, add_options, given
from .selection import add_labels, add_selection, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="feature store with labels, made by `diffusion-sae extract`")
    parser.add_argument("--validation-store", help="store to choose on (default: a part of the training images)")
    parser.add_argument("--test-store", help="store to report on, once, after everything is chosen")
    add_selection(parser)
    add_labels(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    add_options(parser, "probe", *PROBE, leave_out=("d_in",))
    add_options(parser, "training", *PROBE_TRAINING)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import DiffusionProbe, DiffusionProbeConfig, FeatureStore, ProbeTrainer, ProbeTrainingArguments
    from ..analysis.probing import class_config

    features = select(FeatureStore(args.store), args)
    validation = None if args.validation_store is None else select(FeatureStore(args.validation_store), args)
    test = None if args.test_store is None else select(FeatureStore(args.test_store), args)
    training = ProbeTrainingArguments.from_dict(given(args, *PROBE_TRAINING))
    settings = given(args, *PROBE, leave_out=("d_in",))
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=features.d_in, **class_config(features), **settings))
    trainer = ProbeTrainer(probe.to(args.device), features, training, validation_features=validation)
    result = trainer.train()
    summary = {"probe": training.output_dir, "validation_accuracy": result.validation.accuracy, **result.chosen}
    if test is not None:
        summary["test_accuracy"] = trainer.evaluate(test).accuracy
        trainer.save()
    return summary


def show(result: dict[str, Any]) -> str:
    test = f", test accuracy {result['test_accuracy']:.4f}" if "test_accuracy" in result else ""
    return f"probe in {result['probe']}: validation accuracy {result['validation_accuracy']:.4f}{test}"
