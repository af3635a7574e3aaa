"""Our own step as it is on a processor without bf16."""

import our_step
import torch
from contenders import FOR_SPEED, Recipe, Shape, Training
from torch import Tensor

from diffusion_sae.sae.screening import without_screening

DISTRIBUTION = our_step.DISTRIBUTION
COMPRISES = "as ours, with all scores formed in fp32"


def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED) -> Training:
    ours = our_step.build(shape, device, recipe)

    def step(batch: Tensor) -> float:
        with without_screening():
            return ours.step(batch)

    return Training(step, ours.learned)
