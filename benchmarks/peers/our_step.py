"""Our own step."""

from collections.abc import Callable

import torch
from contenders import LEARNING_RATE, Shape
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainingArguments
from diffusion_sae.sae.step import TrainingStep

DISTRIBUTION = "diffusion-sae"
COMPRISES = "forward, normalised MSE, exact gradients, parallel gradient removed, Adam, decoder rows renormalised"


def build(shape: Shape, device: torch.device) -> Callable[[Tensor], float]:
    config = KSparseAutoencoderConfig(d_in=shape.d_in, num_latents=shape.num_latents, k=shape.k)
    training = TrainingStep(
        KSparseAutoencoder(config).to(device), SAETrainingArguments(output_dir="unused", auxk=0, max_grad_norm=None)
    )

    def step(batch: Tensor) -> float:
        return float(training(batch, LEARNING_RATE).loss)

    return step
