"""The k-SAE of Revelio (arXiv 2411.16725, §3.2), written from its mathematics: its code has no licence and cannot run.

    z = TopK(W_encᵀ (x − b_dec) + b_enc),    x̂ = W_decᵀ z + b_dec,    loss = mean ‖x̂ − x‖² / ‖x‖²

TopK is signed, without ReLU. Codes are dense, as there. Its code has the error of the batch relative to its variance as
the loss; this one is ours.
"""

import torch
from contenders import FOR_SPEED, LEARNING_RATE, Learned, Recipe, Shape, Training
from torch import Tensor, nn

DISTRIBUTION = "torch"
COMPRISES = (
    "decoder rows renormalised, signed TopK as dense codes, normalised MSE, backward by autograd, parallel gradient "
    "removed, torch Adam"
)


class RevelioSAE(nn.Module):
    def __init__(self, d_in: int, num_latents: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_in, num_latents)))
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(num_latents, d_in)))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def encode(self, features: Tensor) -> Tensor:
        pre_acts = (features - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = pre_acts.topk(self.k, dim=-1)
        return torch.zeros_like(pre_acts).scatter(-1, indices, values)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec + self.b_dec

    def forward(self, features: Tensor) -> Tensor:
        """The reconstruction."""
        return self.decode(self.encode(features))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec


def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED) -> Training:
    sae = RevelioSAE(shape.d_in, shape.num_latents, shape.k).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=recipe.learning_rate or LEARNING_RATE)  # the paper's
    # the paper's warm-up, with its rate
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 1.0 if recipe.learning_rate else min(1.0, (n + 1) / 500)
    )

    def step(batch: Tensor) -> float:
        sae.normalize_decoder()
        error = (sae(batch) - batch).pow(2).sum(-1)
        loss = (error / batch.pow(2).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient()
        optimizer.step()
        warmup.step()
        return loss.item()

    return Training(step, lambda: Learned(sae.W_dec, sae.encode, sae.decode))
