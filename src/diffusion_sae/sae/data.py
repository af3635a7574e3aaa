"""What a training reads: batches of training rows, and rows that are held out of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._training import hold_out_images
from ..features import FeatureSet, FeatureSource, ImageSubset, ShuffledBatches, as_feature_set
from ..provenance import require_same_provenance
from .configuration import PENALISED
from .modeling import KSparseAutoencoder
from .training_args import SAETrainingArguments


@dataclass(frozen=True)
class TrainingData:
    source: FeatureSource
    eval_features: FeatureSet
    held_out: bool
    """Whether `eval_features` are not trained on."""


def prepare_data(
    sae: KSparseAutoencoder,
    features: FeatureSet | FeatureSource | Tensor,
    args: SAETrainingArguments,
    eval_features: FeatureSet | Tensor | None,
    *,
    allow_mismatch: bool,
    processes: int,
) -> TrainingData:
    """Arguments and errors: see `SAETrainer`."""
    _require_options(sae, args, processes)
    given = None
    if eval_features is not None:
        given = as_feature_set(eval_features)
        given.require_finite("The evaluation features")
        sae.require_features(given, allow_mismatch=allow_mismatch)
    if isinstance(features, FeatureSource):
        if features.d_in != sae.config.d_in:
            raise ValueError(f"The SAE takes features of width {sae.config.d_in}, the source gives {features.d_in}.")
        require_same_provenance(sae.provenance, features.provenance, "This SAE", allow_mismatch=allow_mismatch)
        data = TrainingData(features, given or _held_out(features), held_out=True)
    else:
        data = _of_features(sae, as_feature_set(features), args, given, allow_mismatch, processes)
    if given is not None:
        mine, theirs = data.source.provenance, given.provenance
        require_same_provenance(mine, theirs, "This training", allow_mismatch=allow_mismatch)
    first = data.eval_features[:1]
    if all(bool((rows == first).all()) for rows in data.eval_features.batches(8192)):  # mostly the first say no
        raise ValueError(
            f"The {len(data.eval_features)} rows to evaluate on are all equal, so that there is no variance to "
            "explain. Give more images, a larger eval_fraction, or eval_features."
        )
    return data


def _of_features(
    sae: KSparseAutoencoder,
    features: FeatureSet,
    args: SAETrainingArguments,
    given: FeatureSet | None,
    allow_mismatch: bool,
    processes: int,
) -> TrainingData:
    features.require_finite("The training features")
    sae.require_features(features, allow_mismatch=allow_mismatch)
    rows, held_out = None, True
    if given is None and args.eval_fraction == 0:
        held_out = False
        few = max(1, 8 * args.batch_size // features.rows_per_image)  # images
        given = ImageSubset(features, torch.arange(min(few, features.num_images)))
    elif given is None:
        at_least = 1 if features.rows_per_image > 1 else 2  # a single row has no variance
        images = max(at_least, round(features.num_images * args.eval_fraction))
        rows, _ = hold_out_images(features, images, seed=args.seed)
    count = len(features) if rows is None else len(rows)
    batch_size = min(args.batch_size, count) // processes * processes
    source = ShuffledBatches(features, max(1, batch_size), seed=args.seed, rows=rows)
    return TrainingData(source, given or _held_out(source), held_out)


def _held_out(source: FeatureSource) -> FeatureSet:
    held_out = source.held_out()
    if held_out is None:
        raise ValueError(
            "The source holds no images out to evaluate on. Give eval_features, or hold some out where it is made."
        )
    return held_out


def _require_options(sae: KSparseAutoencoder, args: SAETrainingArguments, processes: int) -> None:
    """Options that do not go together."""
    config = sae.config
    if args.normalize_input != "none" and (config.input_norm != "none" or config.timesteps is not None):
        raise ValueError(
            f"normalize_input={args.normalize_input!r} cannot be folded into an SAE with input_norm or timesteps, "
            "which scale rows themselves. Use normalize_input='none'."
        )
    if args.k_anneal_start is not None and not config.k <= args.k_anneal_start <= config.num_latents:
        raise ValueError(
            f"k_anneal_start must lie between k = {config.k} and num_latents = {config.num_latents}, got "
            f"{args.k_anneal_start}."
        )
    if config.activation in PENALISED and (args.multi_topk_alpha or args.k_anneal_start is not None):
        raise ValueError(
            f"multi_topk_alpha and k_anneal_start are for TopK activations and batchtopk, this SAE's is "
            f"{config.activation!r}. Leave them out."
        )
    if args.resample_steps and processes > 1:
        raise ValueError("resample_steps works in one process only: use AuxK with several.")
