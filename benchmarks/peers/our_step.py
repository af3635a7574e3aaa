"""Our own step."""

import torch
from contenders import FOR_SPEED, Learned, Recipe, Shape, Training
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainingArguments
from diffusion_sae.sae.schedule import learning_rate_factor
from diffusion_sae.sae.step import TrainingStep

DISTRIBUTION = "diffusion-sae"
COMPRISES = (
    "forward (scores screened in bf16, those in question formed in fp32), normalised MSE, exact gradients, "
    "parallel gradient removed, gradients clipped, Adam, decoder rows renormalised"
)


def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED) -> Training:
    config = KSparseAutoencoderConfig(
        d_in=shape.d_in, num_latents=shape.num_latents, k=shape.k, init_seed=torch.initial_seed()
    )
    args = SAETrainingArguments(output_dir="unused")  # gradients are clipped, and dead latents boosted
    if recipe is FOR_SPEED:
        args = SAETrainingArguments(
            output_dir="unused", learning_rate=recipe.learning_rate, lr_scheduler_type="constant"
        )
    elif recipe.learning_rate is not None:
        args = SAETrainingArguments(
            output_dir="unused",
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant",
            dead_latent_boost=0,
            max_grad_norm=None,
        )
    sae = KSparseAutoencoder(config).to(device)
    training = TrainingStep(sae, args)
    factor = learning_rate_factor(args, training.optimizer, recipe.steps)
    steps = 0

    def step(batch: Tensor) -> float:
        nonlocal steps
        if steps == 0:
            with torch.no_grad():
                sae.b_dec.copy_(batch.mean(0))
        steps += 1
        return float(training(batch, training.learning_rate * factor(steps)).loss)

    def learned() -> Learned:
        sae.eval()
        return Learned(sae.W_dec, lambda rows: sae.encode(rows).to_dense(shape.num_latents), dense_decode)

    def dense_decode(codes: Tensor) -> Tensor:
        return codes @ sae.W_dec + sae.b_dec

    return Training(step, learned)
