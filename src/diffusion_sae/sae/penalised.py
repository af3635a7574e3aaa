"""`relu` and `jumprelu` in training: any number of latents may be active, and a penalty holds their number down.

At the start half of them are, and codes are dense. When few are, only those that have a gradient are touched, as with
TopK: the active ones, and of a JumpReLU those within half a bandwidth of their threshold.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from .activations import JumpReLU, Step
from .code import SparseCode
from .encoder import encode_above
from .losses import l0_penalty, l1_penalty
from .processes import WholeBatch
from .rows import Rows

if TYPE_CHECKING:
    from .modeling import KSparseAutoencoder

FEW = 1 / 16
"""Share of the latents up to which codes are sparse, by an estimate: both ways have the same result."""
BANDWIDTH = 0.5
"""Of a JumpReLU, as a share of its threshold."""
LOOKED_AT = 128
"""Rows of a batch by which it is chosen."""


def penalised_pass(
    sae: "KSparseAutoencoder", rows: Rows, target: Tensor, shared: WholeBatch
) -> tuple[SparseCode, Float[Tensor, "N d_in"], Float[Tensor, ""]]:
    """(code, decoded rows with their bias, penalty), with the gradients of dense autograd."""
    few = few_have_a_gradient(sae, rows, shared)
    return (_sparse_pass if few else _dense_pass)(sae, rows, target, shared)


def _floor(sae: Any) -> Float[Tensor, "*num_latents"]:
    """What a pre-activation must exceed to have a gradient."""
    threshold = sae.activation_threshold().detach()
    return (threshold - _bandwidth(sae, threshold) / 2).clamp_min(0) if threshold.ndim else threshold


def _bandwidth(sae: Any, threshold: Tensor) -> Tensor | float:
    width = sae.config.jumprelu_bandwidth
    return BANDWIDTH * threshold.detach() if width is None else width


@torch.no_grad()
def few_have_a_gradient(sae: Any, rows: Rows, shared: WholeBatch) -> bool:
    """By an estimate from the first rows of each process: all of them must take the same way."""
    bias = rows.bias if rows.bias.ndim == 1 else rows.bias[:LOOKED_AT]
    pre_acts = torch.addmm(sae.b_enc, rows.normalised[:LOOKED_AT] - bias, sae.W_enc)
    return bool(shared.mean((pre_acts > _floor(sae)).float().mean()) <= FEW)


def _sparse_pass(sae: Any, rows: Rows, target: Tensor, shared: WholeBatch) -> tuple[SparseCode, Tensor, Tensor]:
    pre_acts, indices = sae._encoded(rows, partial(encode_above, threshold=_floor(sae)))
    if sae.config.activation == "relu":
        acts, norms = F.relu(pre_acts), sae.W_dec.norm(dim=1)
        if sae._collect is not None:
            norms = norms.detach()  # whose gradient is parallel to the decoder rows, and so taken out by the step
        sparsity = l1_penalty(acts, _of(norms, indices), target)
    else:
        threshold = _of(sae.log_threshold.exp(), indices)
        width = _bandwidth(sae, threshold)
        acts: Tensor = JumpReLU.apply(pre_acts, threshold, width)  # type: ignore[assignment]
        active: Tensor = Step.apply(pre_acts, threshold, width)  # type: ignore[assignment]
        sparsity = l0_penalty(active, sae.config.k, shared)
    code = SparseCode(acts, indices)
    return code, sae._decoded(code, rows.bias), sparsity


def _of(values: Float[Tensor, " num_latents"], indices: Tensor) -> Float[Tensor, "N most"]:
    """`values[indices]`, whose gradient is a sum over the places of a latent."""
    return values.index_select(0, indices.flatten()).view_as(indices)


def _dense_pass(sae: Any, rows: Rows, target: Tensor, shared: WholeBatch) -> tuple[SparseCode, Tensor, Tensor]:
    pre_acts = F.relu(sae._dense_pre_acts(rows))
    if sae.config.activation == "relu":
        acts = pre_acts
        sparsity = l1_penalty(acts, sae.W_dec.norm(dim=1), target)
    else:
        threshold = sae.log_threshold.exp()
        width = _bandwidth(sae, threshold)
        acts: Tensor = JumpReLU.apply(pre_acts, threshold, width)  # type: ignore[assignment]
        active: Tensor = Step.apply(pre_acts, threshold, width)  # type: ignore[assignment]
        sparsity = l0_penalty(active, sae.config.k, shared)
    return SparseCode.of_dense(acts.detach()), acts @ sae.W_dec + rows.bias, sparsity
