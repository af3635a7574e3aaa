"""SAELens (`cfg.json`, `sae_weights.safetensors`), of version 6 and of those before, and its training checkpoints.

| theirs | here |
|---|---|
| `standard` | relu |
| `topk` | topk: ReLU after TopK |
| `jumprelu` | jumprelu; batchtopk where all thresholds are one, as SAELens exports its BatchTopK |
| `gated` | jumprelu: gate and magnitude share W_enc (Rajamanoharan et al. 2024, arXiv 2404.16014, §3.2) |
| `batchtopk`, `matryoshka_batchtopk` of a training checkpoint | batchtopk with its `topk_threshold` |
| `normalize_activations`: `layer_norm`, `constant_norm_rescale` | sample_layer_norm, constant_norm |
| `expected_average_only_in` | its factor in the weights, if `activation_scaler.json` or `scaling_factor` tells it |
| `apply_b_dec_to_input` false, `rescale_acts_by_decoder_norm` | in the weights |
| `reshape_activations` `hook_z` | the same: rows are flat here |
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..._files import write_json
from .checkpoint import Checkpoint, whole_number
from .options import ForeignOptions
from .weights import (
    NAMES,
    ForeignSAE,
    Weights,
    batch_threshold,
    log_threshold,
    require_shape,
    require_size,
    take,
)

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
DIRECT = {name: name for name in NAMES}
NORMS = {"none": "none", "layer_norm": "sample_layer_norm", "constant_norm_rescale": "constant_norm"}
BATCH = ("batchtopk", "matryoshka_batchtopk")
REFUSED = {
    "abstopk": "it keeps the largest magnitudes, and no activation here does",
    "matching_pursuit": "its encoder is a loop over the dictionary, not one product",
    "temporal": "its latents depend on the rows before",
    "transcoder": "it predicts another layer than it reads",
    "skip_transcoder": "it predicts another layer than it reads",
    "jumprelu_transcoder": "it predicts another layer than it reads",
    "jumprelu_skip_transcoder": "it predicts another layer than it reads",
}
KNOWN = ("standard", "topk", "jumprelu", "gated", *BATCH)


def recognise(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS) or checkpoint.chosen == WEIGHTS


def read(checkpoint: Checkpoint, options: ForeignOptions) -> ForeignSAE:
    config = _of_version_6(checkpoint.json(CONFIG))
    tensors = dict(checkpoint.tensors(WEIGHTS))
    architecture = config.get("architecture")
    if architecture not in KNOWN:
        reason = REFUSED.get(str(architecture), f"known are {', '.join(KNOWN)}")
        raise ValueError(f"SAELens's architecture {architecture!r} cannot be converted: {reason}.")
    _refuse_finetuning(tensors)
    if architecture == "gated":
        weights, own = _gated(tensors)
    else:
        weights, own = _ungated(tensors, str(architecture))
    require_size(config, {"d_in": weights.d_in, "d_sae": weights.num_latents}, CONFIG)
    # what is folded into the biases first is of the rows as the encoder sees them
    if not config.get("apply_b_dec_to_input", True):
        weights = weights.bias_not_subtracted()
    scale = _scale(checkpoint, config, options)
    rescaled = bool(config.get("rescale_acts_by_decoder_norm", False))
    if scale is not None:
        weights = weights.of_scaled_rows(scale)
        if rescaled and "threshold" in own:
            own["threshold"] = own["threshold"] / scale  # it is in units of W_dec's lengths
    if rescaled:
        weights = weights.latents_in_units_of_the_decoder()
    return _made(config, str(architecture), weights, own, options)


def _of_version_6(config: dict[str, Any]) -> dict[str, Any]:
    """Older files in the keys of version 6: what SAELens itself does when it reads them."""
    metadata = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    version = str(config.get("sae_lens_version") or (metadata or {}).get("sae_lens_version") or "0")
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6:
        return config
    config = dict(config)
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    arguments = config.get("activation_fn_kwargs")
    config.setdefault("architecture", "standard")
    if function == "topk":
        config["architecture"] = "topk"
        config.setdefault("k", arguments.get("k") if isinstance(arguments, dict) else None)
    elif function not in ("relu", None):
        raise ValueError(f"SAELens's activation_fn {function!r} cannot be converted; relu and topk can.")
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return config


def _refuse_finetuning(tensors: dict[str, Tensor]) -> None:
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise ValueError(
            "The SAE has a finetuning scaling_factor other than 1, which SAELens no longer loads either: multiply the "
            "rows of W_dec by it and leave it out."
        )


def _ungated(tensors: Mapping[str, Tensor], architecture: str) -> tuple[Weights, dict[str, Tensor]]:
    own: dict[str, Tensor] = {}
    ignored: tuple[str, ...] = ()
    if architecture == "jumprelu":
        name = "log_threshold" if "log_threshold" in tensors else "threshold"
        ignored = (name,)
    elif architecture in BATCH:
        name = "topk_threshold"
        ignored = (name,)
    weights = take(tensors, DIRECT, WEIGHTS, ignored)
    for name in ignored:
        if name not in tensors:
            raise ValueError(f"{WEIGHTS} lacks {name}, which a {architecture} SAE has.")
        shape = () if name == "topk_threshold" else (weights.num_latents,)
        require_shape(tensors[name], shape, f"{WEIGHTS}: {name}")
        own["threshold" if name != "log_threshold" else name] = tensors[name]
    return weights, own


def _gated(tensors: Mapping[str, Tensor]) -> tuple[Weights, dict[str, Tensor]]:
    weights = take(tensors, DIRECT | {"b_enc": "b_mag"}, WEIGHTS, ("b_gate", "r_mag"))
    return gated(weights, tensors.get("b_gate"), tensors.get("r_mag"), WEIGHTS)


def gated(
    weights: Weights, b_gate: Tensor | None, r_mag: Tensor | None, where: str
) -> tuple[Weights, dict[str, Tensor]]:
    """A gated SAE as a JumpReLU, from its magnitude's weights, the gate's bias and the logarithm between the two.

    Open where W_encᵀ x + b_gate > 0, with p = exp(r) W_encᵀ x + b_mag as magnitude: so where p > b_mag − exp(r) b_gate.
    """
    if b_gate is None or r_mag is None:
        raise ValueError(f"{where} lacks the gate's bias or r_mag, which a gated SAE has.")
    for name, value in (("the gate's bias", b_gate), ("r_mag", r_mag)):
        require_shape(value, (weights.num_latents,), f"{where}: {name}")
    factor = r_mag.double().exp()
    theta = weights.b_enc.double() - factor * b_gate.double()
    if not bool(torch.isfinite(theta).all()):
        raise ValueError(f"{where}: exp(r_mag) overflows; the weights are damaged.")
    W_enc = (weights.W_enc.double() * factor).to(weights.W_enc.dtype)
    return Weights(W_enc, weights.b_enc, weights.W_dec, weights.b_dec), {"threshold": theta}


def _scale(checkpoint: Checkpoint, config: Mapping[str, Any], options: ForeignOptions) -> float | None:
    """What the activations were multiplied by before the SAE saw them; None: nothing."""
    norm = str(config.get("normalize_activations") or "none")
    if norm in NORMS:
        return None
    if norm != "expected_average_only_in":
        raise ValueError(
            f"SAELens's normalize_activations = {norm!r} cannot be converted; {', '.join(NORMS)} and "
            "expected_average_only_in can. (SAELens folds whitening into finished SAEs: convert that one.)"
        )
    given: Any = options.scaling_factor
    if given is None and (checkpoint.folder / SCALER).is_file():
        given = checkpoint.json(SCALER).get("scaling_factor")
    if given is None:
        raise ValueError(
            "Its activations were multiplied by a factor that the files do not hold "
            f"(normalize_activations = {norm!r}, no {SCALER}). Give scaling_factor: SAELens's is √d_in / mean ‖x‖; 1 "
            "if the weights have it already."
        )
    if not isinstance(given, int | float) or not math.isfinite(given) or given <= 0:
        raise ValueError(f"The scaling factor must be a positive number, got {given!r}.")
    return float(given)


def _made(
    config: Mapping[str, Any], architecture: str, weights: Weights, own: dict[str, Tensor], options: ForeignOptions
) -> ForeignSAE:
    made: dict[str, Any] = {"input_norm": NORMS.get(str(config.get("normalize_activations") or "none"), "none")}
    if architecture in ("standard", "topk"):
        made["activation"] = "relu" if architecture == "standard" else "topk"
        if architecture == "topk":
            made["k"] = options.k or whole_number(config, "k", CONFIG)
        return ForeignSAE(made, weights)
    if architecture in BATCH:
        made |= {"activation": "batchtopk", "k": options.k or whole_number(config, "k", CONFIG)}
        if architecture == "matryoshka_batchtopk":
            made["matryoshka_sizes"] = _sizes(config.get("matryoshka_widths"), weights.num_latents)
        return ForeignSAE(made, weights, batch_threshold(float(own["threshold"]), weights))
    if "log_threshold" in own:
        return ForeignSAE(made | {"activation": "jumprelu"}, weights, {"log_threshold": own["log_threshold"]})
    theta = own["threshold"]
    metadata = config.get("metadata")
    details = metadata.get("training_architecture_details") if isinstance(metadata, dict) else None
    k = options.k or (details.get("k") if isinstance(details, dict) else None)
    one_threshold = bool((theta == theta[0]).all()) and architecture == "jumprelu"
    if one_threshold and options.activation != "jumprelu":
        made["activation"] = "batchtopk"
        if isinstance(k, int | float) and 1 <= k <= weights.num_latents:
            made["k"] = round(k)  # of its training; no part in encoding
        return ForeignSAE(made, weights, batch_threshold(float(theta[0]), weights))
    made["activation"] = "jumprelu"
    return ForeignSAE(made, weights, {"log_threshold": log_threshold(theta, weights.W_enc.dtype)})


def _sizes(widths: Any, num_latents: int) -> list[int]:
    if not isinstance(widths, list) or not widths or not all(isinstance(width, int) for width in widths):
        raise ValueError(f"{CONFIG} must give matryoshka_widths as a list of integers, got {widths!r}.")
    return widths if widths[-1] == num_latents else [*widths, num_latents]


ARCHITECTURES = {
    "topk": "topk",
    "relu_topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
}
WRITTEN_NORMS = {ours: theirs for theirs, ours in NORMS.items()}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """What `SAE.load_from_disk` of SAELens reads; signed_topk and layer_norm it cannot say."""
    activation, input_norm = config["activation"], config["input_norm"]
    if activation not in ARCHITECTURES:
        raise ValueError(
            f"SAELens has no {activation!r}: it applies ReLU after TopK. Activations that it has: "
            f"{', '.join(ARCHITECTURES)}."
        )
    if input_norm not in WRITTEN_NORMS:
        raise ValueError(
            f"SAELens has no input_norm={input_norm!r}: its layer_norm divides by the deviation with d − 1, which is "
            f"sample_layer_norm here. It has {', '.join(WRITTEN_NORMS)}."
        )
    written = {name: tensors[name] for name in NAMES}
    if ARCHITECTURES[activation] == "jumprelu":
        theta = tensors["log_threshold"].exp() if activation == "jumprelu" else tensors["threshold"]
        written["threshold"] = theta.to(tensors["b_enc"].dtype).expand_as(tensors["b_enc"]).contiguous()
    settings: dict[str, Any] = {
        "architecture": ARCHITECTURES[activation],
        "d_in": config["d_in"],
        "d_sae": config["num_latents"],
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": WRITTEN_NORMS[input_norm],
        "reshape_activations": "none",
        # without a version ≥ 6 it would be read as of an older layout
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **metadata},
    }
    if settings["architecture"] == "topk":
        settings |= {"k": config["k"], "rescale_acts_by_decoder_norm": False}
    save_file({name: value.contiguous() for name, value in written.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, settings)
