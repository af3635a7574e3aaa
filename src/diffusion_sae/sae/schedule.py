"""The learning rate over the steps, from transformers' schedules."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

from .training_args import SAETrainingArguments


def learning_rate_factor(
    args: SAETrainingArguments, optimizer: torch.optim.Optimizer, max_steps: int
) -> Callable[[int], float]:
    """What multiplies the peak learning rate after n steps; n alone decides: a resumed run needs no other state."""
    warmup = min(args.warmup_steps, max_steps // 2)
    if args.lr_scheduler_type == "warmup_stable_decay":
        decay = round(args.decay_fraction * (max_steps - warmup))
        # of n steps the last has the rate after n, which is not to be 0
        specific: dict[str, Any] = {"num_decay_steps": decay, "decay_type": "linear"}
        schedule: Any = get_scheduler(
            "warmup_stable_decay", optimizer, warmup, max_steps + 1, scheduler_specific_kwargs=specific
        )
    else:
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, max_steps)
    return schedule.lr_lambdas[0]
