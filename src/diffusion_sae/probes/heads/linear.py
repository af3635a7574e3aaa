"""`linear` and `mlp`, on pooled features."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .base import Head, add_moments, normalised
from .shared import Dropout


class PooledHead(Head):
    """A head on one vector x̂ = (x − μ)/σ an example; μ and σ, of the training features, are kept with the weights."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        add_moments(self, config.d_in)

    def normalised_modules(self) -> dict[str, nn.Module]:
        return {"": self}

    def design(self, features: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_in"]:
        """x̂, in which a linear classifier is fitted."""
        return normalised(self, features)


class LinearHead(PooledHead):
    """logits = W x̂ + b."""

    name = "linear"
    optimizers = ("lbfgs", "fista", "adamw")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.d_in, config.num_labels)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Convex: starts at the uniform prediction."""
        super().initialise(generator)
        if not self.classifier.weight.is_meta:
            self.classifier.weight.zero_()

    def forward(self, features: Float[Tensor, "B d_in"]) -> Float[Tensor, "B num_labels"]:
        return self.classifier(self.design(features))


class MLPHead(PooledHead):
    """h_0 = x̂,  h_i = dropout(ReLU(W_i h_{i−1} + b_i)) for i = 1 … depth,  logits = W h_depth + b."""

    name = "mlp"
    options = ("width", "depth", "dropout", "feature_norm")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        for index in range(config.depth):
            layers += [
                nn.Linear(config.width if index else config.d_in, config.width),
                nn.ReLU(),
                Dropout(config.dropout),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.width, config.num_labels)

    def forward(self, features: Float[Tensor, "B d_in"]) -> Float[Tensor, "B num_labels"]:
        return self.classifier(self.features(self.design(features)))
