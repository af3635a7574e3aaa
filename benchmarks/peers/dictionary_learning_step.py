"""saprmarks/dictionary_learning: `TopKTrainer.update`."""

from collections.abc import Callable

import torch
from contenders import LEARNING_RATE, Shape
from stubs import import_dictionary_learning
from torch import Tensor

import_dictionary_learning()
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402

DISTRIBUTION = "dictionary-learning"
COMPRISES = (
    "TopKTrainer.update: dense codes, MSE, fired latents marked, backward, parallel gradient removed, gradients "
    "clipped to norm 1, torch Adam, scheduler, decoder renormalised; first step: b_dec = geometric median"
)


def build(shape: Shape, device: torch.device) -> Callable[[Tensor], float]:
    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=shape.d_in,
        dict_size=shape.num_latents,
        k=shape.k,
        layer=0,
        lm_name="none",
        lr=LEARNING_RATE,
        auxk_alpha=0,
        warmup_steps=0,
        device=str(device),
    )
    steps = 0

    def step(batch: Tensor) -> float:
        nonlocal steps
        loss = trainer.update(steps, batch)
        steps += 1
        return loss

    return step
