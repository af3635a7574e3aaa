"""What the fits of a cell take, before any is done: counted from the head's own operations."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...probes.configuration import DiffusionProbeConfig
from ...probes.heads import HEADS
from ...probes.modeling import DiffusionProbe
from ...probes.trainer import optimizer_of
from ...probes.training_args import ProbeTrainingArguments
from .fits import probe_options
from .specs import HeadSpec

EFFICIENCY = 0.5  # of the peak of a matrix product that a head's products, convolutions and attention reach
STEP_SECONDS = 0.001  # of an epoch's step, beside its operations
FIT_SECONDS = 0.02  # of a fit without an optimizer, beside its operations
# L-BFGS over a path of L2: its steps by the root of the classes, on features in which these overlap, and what a step
# costs a logit beside the products, in operations
STEPS, LOGIT_OPERATIONS = 40, 1000
WHOLE = ("none", "tokens")


def row_numbers(head: HeadSpec, channels: int, positions: int) -> int:
    """Numbers of an image's features, as the head takes them."""
    return channels * (positions if head.pooling in WHOLE else 1)


def fit_seconds(head: HeadSpec, channels: int, positions: int, images: int, classes: int, flops: float) -> float:
    """One seed of one cell on `images` training images, at `flops` operations a second of a matrix product.

    AdamW: all epochs of forward and backward passes, whose operations are counted. L-BFGS: covariance, factors and
    a path of as many steps as are usual where classes overlap (docs/speed.md compares it with the time taken).
    """
    probe, training = probe_options(head)
    args = ProbeTrainingArguments(output_dir="unused", **training)
    optimizer = optimizer_of(HEADS[head.head], args.optimizer)
    rate = EFFICIENCY * flops
    if optimizer == "adamw":
        batch = min(args.batch_size, images)
        config = DiffusionProbeConfig(
            d_in=channels, head=head.head, id2label={i: str(i) for i in range(classes)}, **probe
        )
        steps = args.num_train_epochs * max(1, images // batch)
        return steps * (_step_operations(config, head.pooling, batch, channels, positions) / rate + STEP_SECONDS)
    if optimizer == "none":
        return 2.0 * images**2 * channels / rate + FIT_SECONDS
    path = STEPS * math.sqrt(classes) * images * classes * (4.0 * channels + LOGIT_OPERATIONS)
    return (path + 2.0 * images * channels**2 + 5 * channels**3 / 3) / rate


def _step_operations(config: DiffusionProbeConfig, pooling: str, batch: int, channels: int, positions: int) -> int:
    """Forward and backward passes of a batch, without computing them."""
    side = math.isqrt(positions)
    shape = (positions, channels) if pooling in WHOLE else (channels,)  # whole activations become tokens for attention
    with torch.device("meta"):
        head = DiffusionProbe(config).head.train()
        features = torch.empty(batch, *((channels, side, side) if config.head == "diff-c" else shape))
    with FlopCounterMode(display=False) as counter:
        head(features).sum().backward()
    return counter.get_total_flops()
