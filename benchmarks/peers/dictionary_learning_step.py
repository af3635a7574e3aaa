"""saprmarks/dictionary_learning: `TopKTrainer.update`."""

import torch
from contenders import FOR_SPEED, Learned, Recipe, Shape, Training
from stubs import import_dictionary_learning
from torch import Tensor

import_dictionary_learning()
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402

DISTRIBUTION = "dictionary-learning"
COMPRISES = (
    "TopKTrainer.update: dense codes, MSE, fired latents marked, backward, parallel gradient removed, gradients "
    "clipped to norm 1, torch Adam, scheduler, decoder renormalised; first step: b_dec = geometric median"
)


def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED) -> Training:
    own = {"lr": recipe.learning_rate, "auxk_alpha": 0, "warmup_steps": 0} if recipe.learning_rate else {}
    trainer = TopKTrainer(
        steps=recipe.steps,
        activation_dim=shape.d_in,
        dict_size=shape.num_latents,
        k=shape.k,
        layer=0,
        lm_name="none",
        device=str(device),
        **own,
    )
    steps = 0

    def step(batch: Tensor) -> float:
        nonlocal steps
        loss = trainer.update(steps, batch)
        steps += 1
        return loss

    return Training(step, lambda: Learned(trainer.ae.decoder.weight.T, trainer.ae.encode, trainer.ae.decode))
