"""The products of a sparse autoencoder, in which everything after the encoder touches the active latents alone.

Weights are latent-major here, (num_latents, d_in): one latent is one contiguous row. All functions run on any device,
and none holds a tensor of rows × latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scratch import distances, of_sums

Choose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def decode_rows(
    acts: Float[Tensor, "N k"], indices: Int[Tensor, "N k"], W_dec: Float[Tensor, "n d_in"]
) -> Float[Tensor, "N d_in"]:
    """Σ_i acts_i W_dec[i] over the active latents."""
    # detached: what may need a gradient is computed by an operator that prepares for it, in twice the time
    return F.embedding_bag(indices, W_dec.detach(), per_sample_weights=acts.to(W_dec.dtype), mode="sum")


@dataclass(frozen=True)
class ByLatent:
    """The active (row, latent) pairs in order of the latent: a sparse matrix of latents × rows."""

    rows: Int[Tensor, " pairs"]
    order: Int[Tensor, " pairs"]
    """Place of each pair in the row-wise arrays, flattened."""
    offsets: Int[Tensor, " n_plus_1"]
    """Where each latent's pairs begin, and the end."""

    @classmethod
    def of(cls, indices: Int[Tensor, "N k"], latents: int) -> "ByLatent":
        """Of rectangular codes."""
        flat, order = torch.sort(indices.reshape(-1), stable=True)
        offsets = torch.searchsorted(flat, torch.arange(latents + 1, device=flat.device))
        return cls(order // indices.shape[1], order, offsets)

    def sums(
        self, weights: Float[Tensor, "N k"], dense: Float[Tensor, "rows d_in"], low: int = 0, high: int | None = None
    ) -> Float[Tensor, "latents d_in"]:
        """Σ over a latent's rows of weight · dense[row], for latents low…high − 1.

        A sum over bags: for k = 32, d_in = 1280 it takes half of the time of a CSR product (MKL).
        """
        offsets = self.offsets[low : None if high is None else high + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        pairs = slice(begin, end)
        return F.embedding_bag(
            self.rows[pairs],
            dense.detach(),
            offsets - begin,
            per_sample_weights=weights.detach().reshape(-1)[self.order[pairs]].to(dense.dtype),
            mode="sum",
            include_last_offset=True,
        )


@dataclass
class SparseGradients:
    """Gradients in the weights of one step as sums that are not formed yet, for an update block by block.

    Each entry stands for Σ over its active pairs of weight · dense[row], added to the gradient row of the latent.
    """

    latents: int
    W_enc: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(indices, weights, dense) of each use of the encoder."""
    W_dec: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


class Encode(torch.autograd.Function):
    """The pre-activations of features − bias that `choose` picks, with the gradients of the dense product.

    `choose(centered, W_enc, b_enc)` is `encode_top_k` or `encode_above` with its last argument bound; `centered` is
    features − bias. With `subset` only those latents take part. With `collect` the gradient in W_enc is noted there
    instead of formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        bias: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        choose: Choose,
        subset: Tensor | None = None,
        collect: SparseGradients | None = None,
    ) -> tuple[Tensor, Tensor]:
        centered = features - bias
        if subset is None:
            values, indices = choose(centered, W_enc, b_enc)
        else:
            values, indices = choose(centered, W_enc[subset], b_enc[subset])
            indices = subset[indices]
        ctx.save_for_backward(centered, W_enc, indices)
        ctx.collect, ctx.one_bias = collect, bias.ndim == 1
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        centered, W_enc, indices = ctx.saved_tensors
        gradient, wanted, latents = gradients[0], ctx.needs_input_grad, len(W_enc)
        to_features = to_bias = to_weights = to_b_enc = None
        if wanted[3] or wanted[1]:
            to_b_enc = gradient.new_zeros(latents).index_add_(0, indices.reshape(-1), gradient.reshape(-1))
        few = indices.numel() < latents  # then a pass over all of W_enc is longer than one over the active pairs
        if wanted[0] or (wanted[1] and (few or not ctx.one_bias)):
            to_features = decode_rows(gradient, indices, W_enc)
        if wanted[1] and to_features is not None:
            to_bias = -to_features.sum(0) if ctx.one_bias else -to_features
        elif wanted[1]:
            to_bias = -(to_b_enc @ W_enc)
        if ctx.collect is not None:
            ctx.collect.W_enc.append((indices, gradient, centered))
        elif wanted[2]:
            to_weights = ByLatent.of(indices, latents).sums(gradient, centered)
        return to_features, to_bias, to_weights, to_b_enc, None, None, None


class DecodeRows(torch.autograd.Function):
    """`decode_rows` + bias, one for all rows or one each, with the gradient in W_dec by latents, where PyTorch's own
    operator forms it pair by pair; `collect` as in `Encode`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        bias: Tensor | None,
        collect: SparseGradients | None,
    ) -> Tensor:
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            leaf = acts.detach().requires_grad_(ctx.needs_input_grad[0])
            decoded = decode_rows(leaf, indices, W_dec)
        ctx.inner = (leaf, decoded)  # the gradient in acts is PyTorch's own: ⟨gradient of the row, W_dec[i]⟩
        ctx.save_for_backward(acts, indices, W_dec)
        ctx.collect, ctx.one_bias = collect, bias is not None and bias.ndim == 1
        result = decoded.detach()
        return result if bias is None else result.add_(bias)  # in place: a large batch has few arrays of its size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        acts, indices, W_dec = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_acts = to_weights = None
        if ctx.needs_input_grad[0]:
            leaf, decoded = ctx.inner
            (to_acts,) = torch.autograd.grad(decoded, leaf, gradient, retain_graph=True)
        if ctx.collect is not None:
            # detached: with its graph, which has this node and so `collect`, it would be a cycle that nothing frees
            ctx.collect.W_dec.append((indices, acts.detach(), gradient))
        elif ctx.needs_input_grad[2]:
            to_weights = ByLatent.of(indices, len(W_dec)).sums(acts, gradient)
        to_bias = (gradient.sum(0) if ctx.one_bias else gradient) if ctx.needs_input_grad[3] else None
        return to_acts, None, to_weights, to_bias, None


# autograd of their own, which torch.compile would go into and not come through
apply_encode: Any = torch.compiler.disable(Encode.apply)
apply_decode_rows: Any = torch.compiler.disable(DecodeRows.apply)


class NormalizedMSE(torch.autograd.Function):
    """(mean over rows of ‖x̂ − x‖² / ‖x‖², Σ‖x̂ − x‖²). The error is formed in both directions rather than kept.

    A row of zeros has no relative error and counts as 0: one of them would be all of the loss and of its gradient.
    """

    @staticmethod
    def forward(ctx: Any, reconstruction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.linalg.vector_norm(target, dim=1, dtype=of_sums(target)).square_()
        weights = torch.where(lengths > torch.finfo(lengths.dtype).tiny, lengths.reciprocal(), 0.0)
        squares = distances(reconstruction, target).square_()
        ctx.save_for_backward(reconstruction, weights, target, squares)
        total = squares.sum()
        ctx.mark_non_differentiable(total)
        return (squares * weights).mean(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        reconstruction, weights, target, squares = ctx.saved_tensors
        scale = (gradients[0] * 2 / len(target) * weights)[:, None]
        to_reconstruction = (reconstruction - target).mul_(scale)
        if not ctx.needs_input_grad[1]:
            return to_reconstruction, None
        return to_reconstruction, -to_reconstruction - target * (scale * (squares * weights)[:, None]).to(target.dtype)
