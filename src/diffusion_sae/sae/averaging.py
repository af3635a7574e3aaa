"""The moving average of an SAE's weights over the steps of its training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .modeling import KSparseAutoencoder

PREFIX = "ema."  # of its tensors in a checkpoint


class MovingAverage:
    """w̄ ← d w̄ + (1 − d) w after each step, with d = min(decay, (1 + step) / (10 + step)): else the first weights would
    weigh in for long. With the decay None there is none, and the SAE's own weights take its place.
    """

    def __init__(self, sae: KSparseAutoencoder, decay: float | None) -> None:
        self.sae, self.decay = sae, decay
        named = {} if decay is None else dict(sae.named_parameters())
        self.weights = {name: parameter.detach().clone() for name, parameter in named.items()}

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {PREFIX + name: value for name, value in self.weights.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """From all tensors of a checkpoint."""
        self.weights = {name: tensors[PREFIX + name].to(value) for name, value in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.decay is not None:
            decay = min(self.decay, (1 + step) / (10 + step))
            for name, parameter in self.sae.named_parameters():
                self.weights[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def take_(self) -> None:
        """Give the SAE the averaged weights, with decoder rows of unit norm."""
        if self.weights:
            for name, parameter in self.sae.named_parameters():
                parameter.copy_(self.weights[name])
            self.sae.normalize_decoder_()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it the SAE has the averaged weights and is in evaluation mode."""
        training = self.sae.training
        kept = {name: parameter.detach().clone() for name, parameter in self.sae.named_parameters() if self.weights}
        self.sae.eval()
        self.take_()
        try:
            yield
        finally:
            self.sae.train(training)
            with torch.no_grad():
                for name, parameter in self.sae.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])
