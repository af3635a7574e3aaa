"""State dicts of overcomplete. The library has no file format; its own examples save whole modules, which are refused.

The dictionary is D = normalised(weights) · exp(multiplier), with no b_dec. What the module knows and its state dict
does not are options: k, the running threshold of a BatchTopK (active at it as well), the dictionary's normalization.
"""

from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .options import ForeignOptions
from .weights import ForeignSAE, Weights, batch_threshold, require_shape, take

ENCODER = "encoder.final_block.0"
DICTIONARY, MULTIPLIER, THRESHOLDS = "dictionary._weights", "dictionary.multiplier", "thresholds"
PLACES = {"W_enc": f"{ENCODER}.weight.T", "b_enc": f"{ENCODER}.bias", "W_dec": DICTIONARY, "b_dec": "b_dec"}
TOP_K = ("topk", "relu_topk", "signed_topk")


def recognise(checkpoint: Checkpoint) -> bool:
    name = checkpoint.sole_weights()
    return name is not None and any(key.startswith(("dictionary.", ENCODER)) for key in checkpoint.tensors(name))


def read(checkpoint: Checkpoint, options: ForeignOptions) -> ForeignSAE:
    name = checkpoint.sole_weights()
    if name is None:
        raise ValueError("An overcomplete state dict has no name of its own: give filename.")
    tensors = dict(checkpoint.tensors(name))
    _refuse(tensors, name)
    jump = THRESHOLDS in tensors
    multiplier = tensors.get(MULTIPLIER, torch.zeros(()))
    require_shape(multiplier, (), f"{name}: {MULTIPLIER}")
    dictionary = tensors.get(DICTIONARY, torch.empty(0))
    if "b_dec" not in tensors and dictionary.ndim == 2:
        tensors["b_dec"] = torch.zeros(dictionary.shape[1])
    weights = take(tensors, PLACES, name, (MULTIPLIER, *((THRESHOLDS,) if jump else ())))
    W_dec = normalised(weights.W_dec.double(), options.normalization) * multiplier.double().exp()
    if not bool(torch.isfinite(W_dec).all()):
        raise ValueError(f"{name}: the dictionary is not finite once it is normalised by {options.normalization!r}.")
    weights = Weights(weights.W_enc, weights.b_enc, W_dec.to(weights.W_dec.dtype), weights.b_dec)
    if jump:
        require_shape(tensors[THRESHOLDS], (weights.num_latents,), f"{name}: {THRESHOLDS}")
        # both libraries learn the logarithm
        theta = tensors[THRESHOLDS].to(weights.W_enc.dtype)
        return ForeignSAE({"activation": "jumprelu"}, weights, {"log_threshold": theta})
    return _by_options(weights, options)


def _refuse(tensors: dict[str, Tensor], name: str) -> None:
    if "dictionary.C" in tensors:
        raise ValueError(
            f"{name} is of an archetypal SAE, whose dictionary depends on settings that a state dict does not hold. "
            "Save its get_dictionary() as dictionary._weights, and convert with normalization='identity'."
        )
    others = sorted(key for key in tensors if key.startswith("encoder.") and not key.startswith(f"{ENCODER}."))
    if others:
        raise ValueError(
            f"{name} has an encoder of several layers ({', '.join(others[:5])}): only a linear one can be."
        )


def normalised(dictionary: Tensor, normalization: str) -> Tensor:
    """As the dictionary layer does when it is put into evaluation mode."""
    if normalization == "identity":
        return dictionary
    norms = torch.linalg.vector_norm(dictionary, ord=2 if normalization.endswith("l2") else 1, dim=1, keepdim=True)
    return dictionary / (norms.amax() if normalization.startswith("max") else norms + 1e-8)


def _by_options(weights: Weights, options: ForeignOptions) -> ForeignSAE:
    activation = options.activation
    if activation == "relu":
        return ForeignSAE({"activation": "relu"}, weights)
    if activation not in (*TOP_K, "batchtopk"):
        raise ValueError(
            "An overcomplete state dict does not say which SAE it is of: give activation, relu_topk for TopKSAE (or "
            f"signed_topk for one whose encoder has no ReLU), batchtopk or relu; got {activation!r}."
        )
    if options.k is None:
        raise ValueError("An overcomplete state dict does not hold top_k: give k, of BatchTopKSAE top_k a row.")
    made: dict[str, Any] = {"activation": activation, "k": options.k}
    if activation != "batchtopk":
        return ForeignSAE(made, weights)
    if options.threshold is None:
        raise ValueError("The running_threshold of a BatchTopKSAE is no part of its state dict: give threshold.")
    return ForeignSAE(made, weights, batch_threshold(options.threshold, weights, inclusive=True))
