"""dictionary_learning (`ae.pt`, `config.json`).

| theirs | here |
|---|---|
| `AutoEncoderTopK` | relu_topk; with activation="batchtopk" its other way of encoding, above its threshold |
| `BatchTopKSAE`, `MatryoshkaBatchTopKSAE` | batchtopk with the threshold; one never set (−1) is 0, as there |
| `JumpReluAutoEncoder` | jumprelu, b_dec not subtracted |
| `GatedAutoEncoder` | jumprelu |
| `AutoEncoder` | relu, with W_dec's rows brought to unit length, as its own loader does |
| `AutoEncoderNew` | relu, b_dec not subtracted |
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, whole_number
from .options import ForeignOptions
from .sae_lens import DIRECT, gated
from .weights import ForeignSAE, batch_threshold, log_threshold, require_shape, require_size, take

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"}
GATED = LINEAR | {"b_enc": "mag_bias", "b_dec": "decoder_bias"}
CLASSES = (
    *("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
    *("GatedAutoEncoder", "AutoEncoder", "AutoEncoderNew"),
)


def recognise(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(WEIGHTS)


def read(checkpoint: Checkpoint, options: ForeignOptions) -> ForeignSAE:
    tensors = checkpoint.tensors(WEIGHTS)
    config: dict[str, Any] = {}
    if (checkpoint.folder / CONFIG).is_file():
        config = checkpoint.json(CONFIG).get("trainer", {})
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} of dictionary_learning must hold its trainer's settings, got {config!r}.")
    kind = config.get("dict_class") or _kind(tensors, options)
    if kind not in CLASSES:
        raise ValueError(f"dictionary_learning's class {kind!r} cannot be converted; {', '.join(CLASSES)} can.")
    made = _readers()[kind](tensors, config, options)
    sizes = {"activation_dim": made.weights.d_in, "dict_size": made.weights.num_latents}
    require_size(config, sizes, f"{CONFIG} of dictionary_learning")
    return made


def _kind(tensors: Mapping[str, Tensor], options: ForeignOptions) -> str:
    """By the tensors; TopK and BatchTopK have the same."""
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "mag_bias" in tensors:
        return "GatedAutoEncoder"
    if {"W_enc", "threshold"} <= set(tensors):
        return "JumpReluAutoEncoder"
    if "k" not in tensors:
        return "AutoEncoder" if "bias" in tensors else "AutoEncoderNew"
    if options.activation not in ("topk", "relu_topk", "batchtopk"):
        raise ValueError(
            f"Without its {CONFIG} {WEIGHTS} may be an AutoEncoderTopK or a BatchTopKSAE, which have the same tensors: "
            "give activation='relu_topk' or activation='batchtopk'."
        )
    return "BatchTopKSAE" if options.activation == "batchtopk" else "AutoEncoderTopK"


def _k(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> int:
    told = [value for value in (config.get("k"), options.k) if value is not None]
    if "k" in tensors:
        require_shape(tensors["k"], (), f"{WEIGHTS}: k")
        told.append(tensors["k"].item())
    if any(value != told[0] for value in told):
        raise ValueError(
            f"k is {' and '.join(map(str, told))} in {CONFIG}, {WEIGHTS} and what was given; leave it out."
        )
    return whole_number({"k": told[0] if told else None}, "k", "dictionary_learning's files")


def _threshold(tensors: Mapping[str, Tensor], options: ForeignOptions) -> float:
    if "threshold" not in tensors:
        if options.threshold is None:
            raise ValueError(f"{WEIGHTS} holds no threshold, as of an older version: give threshold.")
        return float(options.threshold)
    require_shape(tensors["threshold"], (), f"{WEIGHTS}: threshold")
    return max(0.0, float(tensors["threshold"]))


def _top_k(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:
    weights = take(tensors, LINEAR, WEIGHTS, ("k", "threshold"))
    made: dict[str, Any] = {"activation": "relu_topk", "k": _k(tensors, config, options)}
    if options.activation != "batchtopk":
        return ForeignSAE(made, weights)
    return ForeignSAE(
        made | {"activation": "batchtopk"}, weights, batch_threshold(_threshold(tensors, options), weights)
    )


def _batch_top_k(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:
    weights = take(tensors, LINEAR, WEIGHTS, ("k", "threshold"))
    made = {"activation": "batchtopk", "k": _k(tensors, config, options)}
    return ForeignSAE(made, weights, batch_threshold(_threshold(tensors, options), weights))


def _matryoshka(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:
    weights = take(tensors, DIRECT, WEIGHTS, ("k", "threshold", "group_sizes"))
    groups = tensors.get("group_sizes", torch.empty(0))
    if groups.ndim != 1 or groups.is_floating_point() or not len(groups) or len(groups) > weights.num_latents:
        raise ValueError(
            f"{WEIGHTS}: group_sizes must be a list of integers, got {groups.dtype} {tuple(groups.shape)}."
        )
    made: dict[str, Any] = {"activation": "batchtopk", "k": _k(tensors, config, options)}
    made["matryoshka_sizes"] = groups.long().cumsum(0).tolist()
    return ForeignSAE(made, weights, batch_threshold(_threshold(tensors, options), weights))


def _jump(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:  # noqa: ARG001
    weights = take(tensors, DIRECT, WEIGHTS, ("threshold",)).bias_not_subtracted()
    theta = tensors.get("threshold", torch.empty(0))
    require_shape(theta, (weights.num_latents,), f"{WEIGHTS}: threshold")
    return ForeignSAE({"activation": "jumprelu"}, weights, {"log_threshold": log_threshold(theta, weights.W_enc.dtype)})


def _gated(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:  # noqa: ARG001
    weights = take(tensors, GATED, WEIGHTS, ("gate_bias", "r_mag"))
    weights, own = gated(weights, tensors.get("gate_bias"), tensors.get("r_mag"), WEIGHTS)
    theta = log_threshold(own["threshold"], weights.W_enc.dtype)
    return ForeignSAE({"activation": "jumprelu"}, weights, {"log_threshold": theta})


def _standard(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:  # noqa: ARG001
    weights = take(tensors, LINEAR | {"b_dec": "bias"}, WEIGHTS)
    norms = weights.W_dec.norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms)):  # the test that its own loader makes
        weights = weights.latents_in_units_of_the_decoder()
    return ForeignSAE({"activation": "relu"}, weights)


def _standard_new(tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:  # noqa: ARG001
    weights = take(tensors, LINEAR | {"b_dec": "decoder.bias"}, WEIGHTS).bias_not_subtracted()
    return ForeignSAE({"activation": "relu"}, weights)


def _readers() -> dict[str, Any]:
    return dict(zip(CLASSES, (_top_k, _batch_top_k, _matryoshka, _jump, _gated, _standard, _standard_new), strict=True))
