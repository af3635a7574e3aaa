"""`diff-c`, Revelio's convolutional classifier on whole activations."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..examples import Features
from .base import Head
from .shared import BatchNorm2d, Dropout, Dropout2d


class DiffCHead(Head):
    """Diff-C (Revelio, §3.3): BatchNorm without affine; conv 3×3 to `width`; 3 × conv 3×3 of stride 2; average; linear.

    Each convolution is followed by BatchNorm, ReLU and channel dropout; a dropout stands before the linear layer.
    """

    name = "diff-c"
    whole_images = True
    shape = "(N, {d_in}, h, w)"
    pooling = "none"
    options = ("width", "dropout")
    explains = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d_in, width, dropout = config.d_in, config.width, config.dropout
        layers: list[nn.Module] = [BatchNorm2d(d_in, affine=False)]
        for index in range(4):
            layers += [
                nn.Conv2d(width if index else d_in, width, 3, stride=2 if index else 1, padding=1),
                BatchNorm2d(width),
                nn.ReLU(),
                Dropout2d(dropout),
            ]
        self.features = nn.Sequential(*layers)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(width, config.num_labels)

    def arranged(self, features: Features) -> Features:
        if isinstance(features, Tensor) and features.ndim in (3, 4):
            features = as_feature_map(features)
        if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != self.config.d_in:
            raise self.refusal(features)
        return features

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B num_labels"]:
        return self.classifier(self.dropout(self.features(features).mean((2, 3))))

    def evidence(
        self, features: Float[Tensor, "B C h w"]
    ) -> tuple[Float[Tensor, "B num_labels p q"], Float[Tensor, "B num_labels"]]:
        """Class activation maps (Zhou et al. 2016, arXiv 1512.04150, §2). The average and the linear layer commute: of
        the P positions of the last map f, position p adds Σ_k W_ck f_kp / P to logit c, and no position adds b_c.
        """
        last = self.features(features)  # (B, width, p, q)
        maps = torch.einsum("bkpq,ck->bcpq", last, self.classifier.weight) / last[0, 0].numel()
        return maps, self.classifier.bias.expand(len(maps), -1)


def as_feature_map(features: Tensor) -> Float[Tensor, "B C h w"]:
    """Tokens (B, T, C) of a square grid, row-major, as a map (B, C, √T, √T); maps are passed through."""
    if features.ndim == 4:
        return features
    side = round(features.shape[1] ** 0.5)
    if side * side != features.shape[1]:
        raise ValueError(
            f"{features.shape[1]} tokens form no square grid; this head needs whole activations, pooling='none'."
        )
    return features.transpose(1, 2).unflatten(2, (side, side))  # (B, T, C) -> (B, C, T) -> (B, C, h, w)
