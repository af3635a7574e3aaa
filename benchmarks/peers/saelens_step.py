"""SAELens: `SAETrainer.step` on its `TopKTrainingSAE`, with the settings that it has by default."""

import torch
from contenders import FOR_SPEED, Learned, Recipe, Shape, Training
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

DISTRIBUTION = "sae-lens"
COMPRISES = (
    "SAETrainer.step: dense codes scaled by decoder norms (instead of renormalising), MSE, firing statistics, "
    "backward, gradients clipped to norm 1, torch Adam, scheduler; no latent counts as dead, so no AuxK"
)


def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED, *, sparse: bool = False) -> Training:
    config = TopKTrainingSAEConfig(
        d_in=shape.d_in,
        d_sae=shape.num_latents,
        k=shape.k,
        device=str(device),
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )
    rate = recipe.learning_rate or 3e-4  # the default of its configuration
    trainer_config = SAETrainerConfig(
        total_training_samples=recipe.steps * shape.rows,
        train_batch_size_samples=shape.rows,
        lr=rate,
        lr_end=rate / 10,  # the runner's default; a constant schedule ignores it
        device=str(device),
    )
    sae = TopKTrainingSAE(config)
    trainer = SAETrainer(trainer_config, sae, data_provider=iter(()))

    def step(batch: Tensor) -> float:
        loss = trainer.step(batch).loss.item()
        trainer.n_training_steps += 1
        return loss

    return Training(step, lambda: Learned(sae.W_dec, sae.encode, sae.decode))
