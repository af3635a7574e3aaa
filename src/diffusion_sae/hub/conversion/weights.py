"""Weights on the way from another library to here: checked, renamed, and changed by what is exact algebra alone.

Every function of a `Weights` gives the same latents and the same reconstruction for every row, but for rounding: what
changes is computed in float64, what does not is left as it is, bit for bit.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Weights:
    """Of an SAE z = act(W_encᵀ (x − b_dec) + b_enc), x̂ = W_decᵀ z + b_dec."""

    W_enc: Tensor
    """(d_in, num_latents)"""
    b_enc: Tensor
    W_dec: Tensor
    """(num_latents, d_in)"""
    b_dec: Tensor

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def num_latents(self) -> int:
        return self.W_enc.shape[1]

    def bias_not_subtracted(self) -> "Weights":
        """Of one that encodes W_encᵀ x + b_enc: W_encᵀ b_dec goes into b_enc."""
        shift = self.b_dec.double() @ self.W_enc.double()
        return replace(self, b_enc=(self.b_enc.double() + shift).to(self.b_enc.dtype))

    def of_scaled_rows(self, factor: float) -> "Weights":
        """Of one that was given factor · x, and whose x̂ is divided by it."""
        return replace(
            self,
            W_enc=_times(self.W_enc, factor),
            W_dec=_times(self.W_dec, 1 / factor),
            b_dec=_times(self.b_dec, 1 / factor),
        )

    def latents_in_units_of_the_decoder(self) -> "Weights":
        """Of one that multiplies its pre-activations by the lengths of W_dec's rows and divides by them to decode."""
        norms = self.W_dec.double().norm(dim=1)
        if not bool((norms > 0).all()):
            zero = int((norms == 0).nonzero()[0])
            raise ValueError(
                f"Row {zero} of W_dec is 0, and rescale_acts_by_decoder_norm divides by its length: SAELens itself "
                "gives NaN for it. Set the row to a unit vector and its b_enc far below 0."
            )
        return replace(
            self,
            W_enc=_times(self.W_enc, norms),
            b_enc=_times(self.b_enc, norms),
            W_dec=_times(self.W_dec, 1 / norms[:, None]),
        )


def _times(value: Tensor, factor: Tensor | float) -> Tensor:
    return (value.double() * factor).to(value.dtype)


@dataclass
class ForeignSAE:
    """An SAE of another library in the words of this one."""

    config: dict[str, Any]
    """Arguments of KSparseAutoencoderConfig."""
    weights: Weights
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    """`threshold` () of batchtopk or `log_threshold` (num_latents,) of jumprelu."""

    def tensors(self) -> dict[str, Tensor]:
        """As KSparseAutoencoder's state dict."""
        return {name: getattr(self.weights, name) for name in NAMES} | self.thresholds


def take(tensors: Mapping[str, Tensor], places: Mapping[str, str], where: str, ignored: Iterable[str] = ()) -> Weights:
    """Weights from where a library keeps them; `.T`: transposed.

    Raises:
        ValueError: for missing, unexpected or misshapen tensors, and for numbers that are no floating-point numbers.
    """
    wanted = {path.removesuffix(".T") for path in places.values()}
    missing = sorted(wanted - set(tensors))
    unexpected = sorted(set(tensors) - wanted - set(ignored))
    if missing or unexpected:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has the unexpected {', '.join(unexpected[:10])}"] if unexpected else []
        raise ValueError(f"{where} {' and '.join(parts)}: it is of another kind than it was taken for.")
    found = {name: _placed(tensors, path, where) for name, path in places.items()}
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in found.values()) else torch.float32
    weights = Weights(**{name: value.to(dtype) for name, value in found.items()})
    if weights.W_enc.ndim != 2:
        raise ValueError(f"{where}: the encoder's weight must be a matrix, got the shape {tuple(weights.W_enc.shape)}.")
    if 0 in weights.W_enc.shape:
        raise ValueError(f"{where}: the encoder's weight is empty, of shape {tuple(weights.W_enc.shape)}.")
    d_in, num_latents = weights.W_enc.shape
    for name, shape in {"b_enc": (num_latents,), "W_dec": (num_latents, d_in), "b_dec": (d_in,)}.items():
        require_shape(getattr(weights, name), shape, f"{where}: {places[name]} as {name}")
    return weights


def _placed(tensors: Mapping[str, Tensor], path: str, where: str) -> Tensor:
    value = tensors[path.removesuffix(".T")]
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where}: {path} is of {value.dtype}; weights are float64, float32, float16 or bfloat16.")
    if path.endswith(".T"):
        if value.ndim != 2:
            raise ValueError(f"{where}: {path} must be a matrix, got the shape {tuple(value.shape)}.")
        value = value.T
    return value.detach()


def require_shape(value: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise ValueError for a tensor of another shape, or of complex numbers."""
    if value.is_complex():
        raise ValueError(f"{what} holds complex numbers ({value.dtype}).")
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} must have the shape {shape}, got {tuple(value.shape)}.")


def require_size(config: Mapping[str, Any], keys: Mapping[str, int], where: str) -> None:
    """Raise ValueError where a config file tells another size than the weights have; a missing or 0 one tells none."""
    for key, size in keys.items():
        if config.get(key) not in (None, 0, size):
            raise ValueError(f"{where} says {key} = {config[key]!r}, and the weights have {size}.")


def log_threshold(theta: Tensor, dtype: torch.dtype) -> Tensor:
    """log θ of a JumpReLU. A latent is never active below 0, so θ ≤ 0 is the smallest positive number.

    exp(log θ) is θ but for rounding, at most 10⁻⁶ of it, which is below that of the pre-activations.
    """
    return theta.double().clamp_min(torch.finfo(torch.float32).tiny).log().to(dtype)


def batch_threshold(theta: float, weights: Weights, *, inclusive: bool = False) -> dict[str, Tensor]:
    """θ of a batchtopk. `inclusive`: active at θ as well, which is above the number before it."""
    if not math.isfinite(theta):
        raise ValueError(f"The threshold must be finite, got {theta}.")
    value = torch.tensor(theta, dtype=weights.W_enc.dtype)
    if not bool(torch.isfinite(value)):
        raise ValueError(f"The threshold {theta} is too large for {weights.W_enc.dtype}.")
    if inclusive and theta > 0:
        value = torch.nextafter(value, torch.zeros_like(value))
    return {"threshold": value}
