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

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .selection import encode_top_k
from .sparse import Encode, SparseGradients


def batch_top_k(
    features: Float[Tensor, "N d_in"],
    bias: Float[Tensor, "*N d_in"],
    W_enc: Float[Tensor, "n d_in"],
    b_enc: Float[Tensor, " n"],
    k: int,
    collect: SparseGradients | None = None,
) -> tuple[Float[Tensor, "N most"], Int[Tensor, "N most"]]:
    """The N·k largest positive pre-activations of all rows, with gradients; a row's free places hold 0.

    Exact with a memory of O(N k): each row offers its largest 2 k, and more if a row's last offer was still wanted.
    """
    rows, latents = len(features), len(W_enc)
    offered = min(latents, 2 * k)
    while True:
        with torch.no_grad():
            values, _ = encode_top_k(features - bias, W_enc, b_enc, offered)
            floor = values.flatten().topk(min(rows * k, values.numel()), sorted=False).values.amin()
        if offered == latents or not bool((values.amin(1) >= floor).any()):
            break
        offered = min(latents, 2 * offered)
    most = max(1, int(((values >= floor) & (values > 0)).sum(1).max()))
    values, indices = Encode.apply(features, bias, W_enc, b_enc, partial(encode_top_k, k=most), None, collect)  # type: ignore[misc]
    return torch.where((values >= floor) & (values > 0), values, 0.0), indices


class JumpReLU(torch.autograd.Function):
    """z = p · 1[p > θ]; the derivative in θ is estimated with a rectangular kernel of width ε (§4, eq. 11):

    ∂z/∂θ ≈ −(θ / ε) · 1[|p − θ| < ε / 2].
    """

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        return (
            gradient * (pre_acts > threshold),
            (gradient * near * (-threshold / ctx.bandwidth)).sum(0),
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
        return None, (gradients[0] * near * (-1 / ctx.bandwidth)).sum(0), None
