"""What an SAE's training begins and ends with: b_dec from the data, the input's scale, and folding that in."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..features import FeatureSource
from .modeling import INITIAL_THRESHOLD, KSparseAutoencoder

SAMPLE_ROWS, THRESHOLD_ROWS = 65_536, 4096


def sample_of(source: FeatureSource) -> tuple[Float[Tensor, "n d_in"], Tensor | None]:
    """The first rows of the order, at most one epoch and 65,536 of them, with their timesteps if these are known."""
    steps = range(max(1, min(source.steps_per_epoch, SAMPLE_ROWS // source.batch_size)))
    timesteps = [source.timesteps_of(step) for step in steps]
    known = [t for t in timesteps if t is not None]
    return torch.cat([source.batch(step) for step in steps]), torch.cat(known) if len(known) == len(timesteps) else None


def input_scale(source: FeatureSource, kind: str) -> Tensor:
    """What rows are divided by: `scalar`, the root mean square of all entries; `per_feature`, each one's deviation.

    After `scalar` E‖x‖² = d_in (dictionary_learning's and SAELens's normalisation), whatever the model and layer.
    """
    if kind == "none":
        return torch.ones(())
    rows, _ = sample_of(source)
    scale = rows.pow(2).mean().sqrt() if kind == "scalar" else rows.std(0)
    return scale.clamp_min(1e-6 * rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny))


def geometric_median(rows: Float[Tensor, "n d_in"], steps: int = 100) -> Float[Tensor, " d_in"]:
    """argmin over m of Σ ‖x − m‖, by Weiszfeld's iteration (1937): unlike the mean it hardly follows outliers."""
    median = rows.mean(0)
    for _ in range(steps):
        weights = 1 / torch.linalg.vector_norm(rows - median, dim=1).clamp_min(1e-9)
        moved = (weights @ rows) / weights.sum()
        if torch.linalg.vector_norm(moved - median) <= 1e-6 * torch.linalg.vector_norm(moved):
            return moved
        median = moved
    return median


@torch.no_grad()
def set_biases_(sae: KSparseAutoencoder, source: FeatureSource, kind: str, scale: Tensor) -> None:
    """`b_dec` from the data (of several timesteps each one's, with its scale), for rows as the SAE is trained on."""
    if sae.config.timesteps is not None:
        moments = source.moments()
        if set(moments.timesteps) != set(sae.config.timesteps):
            raise ValueError(
                f"The SAE is for the timesteps {sae.config.timesteps}, the features are of "
                f"{list(moments.timesteps) or 'unknown ones'}: they must be the same. Select those timesteps, or make "
                "the SAE for these."
            )
        order = [moments.timesteps.index(t) for t in sae.config.timesteps]
        sae.timestep_scale.copy_(moments.std[order].clamp_min(torch.finfo(moments.std.dtype).tiny))
    if kind == "zero":
        sae.b_dec.zero_()
        return
    if kind == "mean" and sae.config.timesteps is None and sae.config.input_norm == "none":
        sae.b_dec.copy_(source.mean() / scale)
        return
    rows, timesteps = sample_of(source)
    if sae.config.timesteps is None:  # features know theirs, whatever the SAE is for
        timesteps = None
    rows = rows / scale
    normalised = sae._rows(rows.to(sae.device), None if timesteps is None else timesteps.to(sae.device)).normalised
    center = geometric_median if kind == "geometric_median" else (lambda some: some.mean(0))
    if sae.config.timesteps is None or timesteps is None:
        sae.b_dec.copy_(center(normalised))
        return
    for place, timestep in enumerate(sae.config.timesteps):
        sae.b_dec[place] = center(normalised[(timesteps == timestep).to(normalised.device)])


@torch.no_grad()
def set_thresholds_(sae: KSparseAutoencoder, source: FeatureSource, scale: Tensor) -> None:
    """Of jumprelu: so that a row begins with about k active latents, whatever the length of the rows.

    Begun much below, thresholds do not come up: few pre-activations are so near to one that it has a gradient. Those of
    an SAE that has been trained are left as they are.
    """
    if sae.config.activation != "jumprelu":
        return
    if bool(((sae.log_threshold - math.log(INITIAL_THRESHOLD)).abs() > 0.1).any()):
        return
    rows, timesteps = sample_of(source)
    rows = (rows[:THRESHOLD_ROWS] / scale).to(sae.device)
    if sae.config.timesteps is None or timesteps is None:  # features know theirs, whatever the SAE is for
        given = sae._rows(rows)
    else:
        given = sae._rows(rows, timesteps[: len(rows)].to(sae.device))
    smallest = sae._chosen(given).top_acts.amin(1).mean()
    sae.log_threshold.fill_(smallest.clamp_min(1e-6 * given.normalised.abs().max()).log())


@torch.no_grad()
def fold_input_scale_(sae: KSparseAutoencoder, scale: Tensor) -> None:
    """Make an SAE of x / scale one of x: x̂ becomes scale · x̂(x / scale), and the same latents are active.

    A scalar goes into the latents, which are then in units of the features, with their biases and thresholds; the
    decoder keeps unit norm. A scale for each feature goes into both weights: to give the decoder rows unit norm again
    would weigh the latents anew, and so change which are the k largest.
    """
    scale = scale.to(sae.W_dec)
    sae.b_dec.mul_(scale)
    if scale.ndim == 0:
        sae.b_enc.mul_(scale)
        if sae.config.activation == "jumprelu":
            sae.log_threshold.add_(scale.log())
        elif sae.config.activation == "batchtopk":
            sae.threshold.mul_(scale)
        return
    sae.W_enc.div_(scale[:, None])
    sae.W_dec.mul_(scale)
