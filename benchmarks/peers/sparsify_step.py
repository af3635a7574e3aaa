"""EleutherAI/sparsify: its `SparseCoder` with the body of its `Trainer.fit` for one hookpoint.

Its trainer takes a language model and token ids, so it cannot be given tensors. The lines of bookkeeping are those that
it has for the default loss (`fvu`); its optimizer `adam` is `torch.optim.Adam` where bitsandbytes is missing.
"""

from collections.abc import Callable

import torch
from contenders import LEARNING_RATE, Shape
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

DISTRIBUTION = "eai-sparsify"
COMPRISES = (
    "decoder rows renormalised, SparseCoder.forward (fused encoder, eager embedding_bag decoder on a CPU), FVU, "
    "backward, fired latents marked, parallel gradient removed, torch Adam; first step: b_dec = mean"
)


def build(shape: Shape, device: torch.device) -> Callable[[Tensor], float]:
    config = SparseCoderConfig(num_latents=shape.num_latents, k=shape.k)
    coder = SparseCoder(shape.d_in, config, device=device, dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
    rows_since_fired = torch.zeros(shape.num_latents, dtype=torch.long, device=device)
    fired = torch.zeros(shape.num_latents, dtype=torch.bool, device=device)
    steps = 0

    def step(batch: Tensor) -> float:
        nonlocal steps
        if steps == 0:
            coder.b_dec.data = batch.mean(0)
        steps += 1
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

    return step
