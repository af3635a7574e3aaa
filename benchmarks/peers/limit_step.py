"""What no exact step can avoid: one product of the encoder, and one pass over the weights and moments."""

import time
from functools import cache

import torch
from contenders import FOR_SPEED, LEARNING_RATE, Recipe, Shape, Training, batch_of
from torch import Tensor

DISTRIBUTION = "torch"
COMPRISES = "x @ W_enc into memory that exists, in the fastest row blocks and layout; one fused Adam over W_enc, W_dec"


def product(features: Tensor, W_enc: Tensor, scores: Tensor) -> None:
    """The scores of all rows, a block at a time; every block overwrites the last one."""
    for part in features.split(len(scores)):
        torch.mm(part, W_enc, out=scores[: len(part)])


def seconds(features: Tensor, W_enc: Tensor, scores: Tensor) -> float:
    times = []
    for _ in range(2):
        started = time.perf_counter()
        product(features, W_enc, scores)
        if features.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


@cache
def fastest(shape: Shape, device: torch.device) -> tuple[int, bool]:
    """Rows a block, and whether one latent is one row in memory."""
    features = batch_of(shape, 0, device)
    latent_major = torch.randn(shape.num_latents, shape.d_in, device=device)
    scores = torch.empty(shape.rows, shape.num_latents, device=device)
    tried = []
    for transposed, W_enc in ((True, latent_major.T), (False, latent_major.T.contiguous())):
        for rows in sorted({min(shape.rows, block) for block in (256, 1024, shape.rows)}):
            tried.append((seconds(features, W_enc, scores[:rows]), rows, transposed))
    return min(tried)[1:]


def build(shape: Shape, device: torch.device, _: Recipe = FOR_SPEED) -> Training:
    rows, transposed = fastest(shape, device)
    size = (shape.num_latents, shape.d_in)
    weights = [torch.randn(size, device=device).mul_(shape.d_in**-0.5).requires_grad_() for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE, fused=True)
    latent_major = weights[0].detach()  # Adam does not mind the layout, the product may
    W_enc = latent_major.T if transposed else latent_major.T.contiguous()
    scores = torch.empty(rows, shape.num_latents, device=device)

    def step(batch: Tensor) -> float:
        product(batch, W_enc, scores)
        optimizer.step()
        return 0.0

    return Training(step)
