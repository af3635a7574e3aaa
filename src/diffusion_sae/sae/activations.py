"""From pre-activations p = W_encᵀ (x − b_dec) + b_enc to latents z, by name.

| name | z | source |
|---|---|---|
| `topk` | ReLU(TopK_k(p)) | Gao et al. 2024 (arXiv 2406.04093), §2.3 |
| `relu_topk` | TopK_k(ReLU(p)) | sparsify; the same z as `topk`, kept by name for what is loaded from there |
| `signed_topk` | TopK_k(p), signs kept | Revelio (arXiv 2411.16725), §3.2, as published |
| `batchtopk` | ReLU(p) among the B·k largest of B rows; later p > θ | Bussmann et al. 2024 (arXiv 2412.06410), §3 |
| `jumprelu` | p_i where p_i > θ_i, θ learned | Rajamanoharan et al. 2024 (arXiv 2407.14435), §3 |
| `relu` | ReLU(p), with an L1 penalty on z | Bricken et al. 2023, Towards Monosemanticity |

`batchtopk` chooses so in training alone. Its θ is a moving average of the smallest latent that was kept in a training
batch, so that a row's latents do not depend on the other rows. TopK takes the largest values, not the largest
magnitudes.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from .encoder import encode_top_k
from .processes import WholeBatch
from .selection import in_few_places


def batch_top_k(
    centered: Float[Tensor, "N d_in"],
    W_enc: Float[Tensor, "n d_in"],
    b_enc: Float[Tensor, " n"],
    *,
    k: int,
    num_latents: int | None = None,
    shared: WholeBatch | None = None,
) -> tuple[Float[Tensor, "N most"], Int[Tensor, "N most"]]:
    """The k · rows largest pre-activations of all rows, where positive; a row's free places hold −∞. For `Encode`.

    Exact with a memory of O(N k): each row offers its largest 2 k, and more where its last offer was still wanted.

    Args:
        centered: features − bias.
        k: latents of a row on average.
        num_latents: of all processes, where each holds a share of them; None: those of W_enc.
        shared: the batch, of which other processes may have rows or latents; their offers compete too.
    """
    shared = shared or WholeBatch()
    available = shared.largest(len(W_enc) if num_latents is None else num_latents)
    width = min(available, 2 * k)
    values, indices = _widened(*encode_top_k(centered, W_enc, b_enc, min(width, len(W_enc))), width)
    while True:
        every = shared.offers(values)
        kept = every.flatten().topk(min(len(every) * k, every.numel()), sorted=False)
        wanted = every.amin(2) >= kept.values.amin()
        if width == available or not bool(wanted.any()):
            break
        width = min(available, 2 * width)
        rows = torch.nonzero(shared.own(wanted[..., None]).flatten()).flatten()
        values, indices = _widened(values, indices, width)
        more = encode_top_k(centered[rows], W_enc, b_enc, min(width, len(W_enc)))
        values[rows], indices[rows] = _widened(*more, width)
    chosen = torch.zeros(every.numel(), dtype=torch.bool, device=every.device).index_fill_(0, kept.indices, True)
    return in_few_places(values, indices, shared.own(chosen.view_as(every)) & (values > 0))


def _widened(values: Tensor, indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    more = (0, width - values.shape[1])
    return F.pad(values, more, value=-torch.inf), F.pad(indices, more)


class JumpReLU(torch.autograd.Function):
    """z = p · 1[p > θ]; the derivative in θ is estimated with a rectangular kernel of width ε (§4, eq. 11):

    ∂z/∂θ ≈ −(θ / ε) · 1[|p − θ| < ε / 2]. θ is one of each latent, (n,), or of each place of a code, (N, most).
    """

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre_acts > threshold, pre_acts, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        return (
            gradient * (pre_acts > threshold),
            (gradient * near * (-threshold / ctx.bandwidth)).sum_to_size(threshold.shape),
            None,
        )


class Step(torch.autograd.Function):
    """1[p > θ], whose sum is L0, with the derivative −(1 / ε) · 1[|p − θ| < ε / 2] in θ (§4, eq. 12) and none in p."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors
        near = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        return None, (gradients[0] * near * (-1 / ctx.bandwidth)).sum_to_size(threshold.shape), None
