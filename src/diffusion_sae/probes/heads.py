"""The heads: from features to logits."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LinearHead(nn.Module):
    """logits = W (x − μ)/σ + b on pooled features; μ and σ, of the training features, are kept with the weights."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, d_in: int, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(d_in))
        self.register_buffer("feature_std", torch.ones(d_in))
        self.classifier = nn.Linear(d_in, num_labels)

    def forward(self, features: Float[Tensor, "B d_in"]) -> Float[Tensor, "B num_labels"]:
        return self.classifier((features - self.feature_mean) / self.feature_std)


class DiffCHead(nn.Module):
    """Diff-C (Revelio, §3.3): BatchNorm without affine; conv 3×3 to `width`; 3 × conv 3×3 of stride 2; average; linear.

    Each convolution is followed by BatchNorm, ReLU and channel dropout; a dropout stands before the linear layer.
    """

    def __init__(self, d_in: int, num_labels: int, width: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(d_in, affine=False)]
        for index in range(4):
            layers += [
                nn.Conv2d(width if index else d_in, width, 3, stride=2 if index else 1, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Dropout2d(dropout),
            ]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B num_labels"]:
        return self.classifier(self.dropout(self.features(features).mean((2, 3))))


def as_feature_map(features: Tensor) -> Float[Tensor, "B C h w"]:
    """Tokens (B, T, C) of a square grid, row-major, as a map (B, C, √T, √T); maps are passed through."""
    if features.ndim == 4:
        return features
    side = round(features.shape[1] ** 0.5)
    if side * side != features.shape[1]:
        raise ValueError(
            f"{features.shape[1]} tokens form no square grid; Diff-C needs whole activations, pooling='none'."
        )
    return features.transpose(1, 2).unflatten(2, (side, side))  # (B, T, C) -> (B, C, T) -> (B, C, h, w)
