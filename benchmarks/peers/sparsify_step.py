"""EleutherAI/sparsify: its `SparseCoder` with the body of its `Trainer.fit` for one hookpoint.

Its trainer takes a language model and token ids, so it cannot be given tensors. The lines of bookkeeping are those that
it has for the default loss (`fvu`); its optimizer `adam` is `torch.optim.Adam` where bitsandbytes is missing, its own
default is the sign of the gradient, schedule-free.
"""

from typing import Any

import torch
from contenders import FOR_SPEED, Learned, Recipe, Shape, Training
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

DISTRIBUTION = "eai-sparsify"
COMPRISES = (
    "decoder rows renormalised, SparseCoder.forward (fused encoder, eager embedding_bag decoder on a CPU), FVU, "
    "backward, fired latents marked, parallel gradient removed, torch Adam; first step: b_dec = mean"
)


def own_optimizer(coder: SparseCoder) -> Any:
    """As its trainer makes it for `optimizer="signum"`, the default."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    rate = 5e-3 / (coder.num_latents / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD([{"params": coder.parameters(), "lr": rate}]), momentum=0.95)
    optimizer.train()
    return optimizer


def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED) -> Training:
    config = SparseCoderConfig(num_latents=shape.num_latents, k=shape.k)
    coder = SparseCoder(shape.d_in, config, device=device, dtype=torch.float32)
    optimizer: Any = None
    rows_since_fired = torch.zeros(shape.num_latents, dtype=torch.long, device=device)
    fired = torch.zeros(shape.num_latents, dtype=torch.bool, device=device)

    def step(batch: Tensor) -> float:
        nonlocal optimizer
        if optimizer is None:
            coder.b_dec.data = batch.mean(0)
            rate = recipe.learning_rate
            optimizer = own_optimizer(coder) if rate is None else torch.optim.Adam(coder.parameters(), lr=rate)
        coder.set_decoder_norm_to_unit_norm()
        total_variance = (batch - batch.mean(0)).pow(2).sum()
        out = coder(x=batch, y=batch, total_variance=total_variance)
        fired[out.latent_indices.flatten()] = True
        loss = float(out.fvu.detach())
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            rows_since_fired.add_(len(batch))
            rows_since_fired[fired] = 0
            fired.zero_()
        return loss

    def encode(rows: Tensor) -> Tensor:
        code = coder.encode(rows)
        return rows.new_zeros(len(rows), shape.num_latents).scatter_(1, code.top_indices, code.top_acts)

    def learned() -> Learned:
        if recipe.learning_rate is None:
            optimizer.eval()  # the averaged weights
        coder.set_decoder_norm_to_unit_norm()
        return Learned(coder.W_dec, encode, lambda codes: codes @ coder.W_dec + coder.b_dec)

    return Training(step, learned)
