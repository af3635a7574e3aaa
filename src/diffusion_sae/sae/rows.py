"""Rows as the encoder sees them: checked, shifted and scaled, and the way back."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._row_norms import row_norm

Timesteps = int | Int[Tensor, " N"] | None


class Rows(NamedTuple):
    """Rows as the encoder sees them, before b_dec is taken off, and the way back."""

    normalised: Float[Tensor, "N d_in"]
    """As `row_norm` and the timestep's scale make them."""
    bias: Float[Tensor, "*N d_in"]
    """b_dec of each row, or of all."""
    shift: Tensor | None
    scale: Tensor | None

    @classmethod
    def of(
        cls,
        features: Float[Tensor, "N d_in"],
        bias: Float[Tensor, "*N d_in"],
        scale: Float[Tensor, "N 1"] | None,
        *,
        input_norm: str,
    ) -> "Rows":
        """By the scale of each row's timestep, if there are any, and what `input_norm` makes of the row itself."""
        shift, divisor, own = row_norm(features, input_norm)
        if divisor is not None and own is not None and scale is not None:
            divisor, own = divisor * scale, own * scale
        elif scale is not None:
            divisor = own = scale
        if shift is not None:
            features = features - shift
        return cls(features if divisor is None else features / divisor, bias, shift, own)

    def scaled(self, decoded: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_in"]:
        return decoded if self.scale is None else self.scale * decoded

    def back(self, decoded: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_in"]:
        """shift + scale · decoded, to which the bias was added."""
        scaled = self.scaled(decoded)
        return scaled if self.shift is None else self.shift + scaled


def checked_features(features: Tensor, d_in: int) -> Float[Tensor, "N d_in"]:
    """The features, if they are of the SAE's width and finite.

    Raises:
        ValueError: for another shape, NaN or infinity.
    """
    if features.ndim != 2 or features.shape[1] != d_in:
        raise ValueError(
            f"features must have the shape (N, d_in) = (N, {d_in}), got {tuple(features.shape)}. "
            "For token or image-shaped activations put positions into the rows first."
        )
    # a sum is a third of the time of looking at each; if it overflows, they are looked at
    if not bool(torch.isfinite(features.sum())) and not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or infinite values; extract them again or remove these rows.")
    return features


def timestep_index(
    timesteps: Timesteps, rows: int, known: list[int] | None, device: torch.device
) -> Int[Tensor, " N"] | None:
    """Each row's place in the SAE's timesteps; None for an SAE without.

    Raises:
        ValueError: for timesteps that are missing, not needed or unknown.
    """
    if known is None:
        if timesteps is not None:
            raise ValueError("timesteps were given, but this SAE has none: leave them out, or set config.timesteps.")
        return None
    if timesteps is None:
        raise ValueError(f"This SAE is for several timesteps: give timesteps=, each one of {known}.")
    given = torch.as_tensor(timesteps, device=device).expand(rows)
    of_sae = torch.tensor(known, device=device)
    index = torch.searchsorted(of_sae, given.contiguous()).clamp_max(len(known) - 1)
    unknown = of_sae[index] != given
    if bool(unknown.any()):
        raise ValueError(f"timesteps must be among {known}, got {sorted(set(given[unknown].tolist()))[:5]}.")
    return index


def rows_of(timesteps: Timesteps, rows: slice) -> Timesteps:
    """Those of some rows; one for all stays."""
    return timesteps[rows] if isinstance(timesteps, Tensor) and timesteps.ndim else timesteps
