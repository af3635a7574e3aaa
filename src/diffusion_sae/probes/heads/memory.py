"""`knn` and `prototype`, which remember training features instead of fitting weights."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from .linear import PooledHead

SMALLEST_SHARE = 1e-6  # so that the logarithm of a class without neighbours is a number


class MemoryHead(PooledHead):
    """f(x) = x̂ / ‖x̂‖ of the training rows is all there is to learn."""

    optimizers = ()

    def directions(self, features: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_in"]:
        """f, of unit length."""
        return F.normalize(self.design(features), dim=1)

    def remember(self, features: Float[Tensor, "n d_in"], labels: Tensor) -> None:
        """Take the training rows in; the moments are known by then."""
        raise NotImplementedError


class KNNHead(MemoryHead):
    """Weighted vote of the k nearest training rows (Wu et al. 2018, arXiv 1805.01978, §3.4; DINO's evaluation, Caron et
    al. 2021, arXiv 2104.14294, §4.1): with the cosine c_i = ⟨f(x), f(x_i)⟩ and w_i = exp(c_i / τ) over the k largest,

        p_c = Σ_i w_i 1[y_i = c] / Σ_i w_i,   logits = log(p + 10⁻⁶)

    several labels: p_c = Σ w_i y_ic / Σ w_i, logits = log(p + 10⁻⁶) − log(1 − p + 10⁻⁶); regression: Σ w_i y_i / Σ w_i.
    """

    name = "knn"
    options = ("num_neighbors", "temperature", "feature_norm", "num_rows")
    row_directions: Tensor
    row_labels: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("row_directions", torch.zeros(config.num_rows, config.d_in))
        single = config.problem_type in (None, "single_label_classification")
        shape = (config.num_rows,) if single else (config.num_rows, config.num_labels)
        self.register_buffer("row_labels", torch.zeros(shape, dtype=torch.long if single else torch.float32))

    def remember(self, features: Float[Tensor, "n d_in"], labels: Tensor) -> None:
        self.row_directions = self.directions(features)
        self.row_labels = labels.to(self.row_directions.device)
        self.config.num_rows = len(features)

    def neighbours(self, features: Float[Tensor, "B d_in"]) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """Cosine and number of the k nearest training rows, nearest first."""
        if not len(self.row_directions):
            raise ValueError("This knn probe holds no training rows yet: train it with ProbeTrainer first.")
        k = min(self.config.num_neighbors or 1, len(self.row_directions))
        cosines = self.directions(features) @ self.row_directions.T
        nearest, rows = cosines.float().topk(k, dim=1)
        return nearest, rows

    def forward(self, features: Float[Tensor, "B d_in"]) -> Float[Tensor, "B num_labels"]:
        cosines, rows = self.neighbours(features)
        shares = (cosines / self.config.temperature).softmax(1)
        labels = self.row_labels[rows]  # (B, k) or (B, k, num_labels)
        if labels.ndim == 2:
            votes = shares.new_zeros(len(shares), self.config.num_labels).scatter_add_(1, labels, shares)
            logits = (votes + SMALLEST_SHARE).log()
        else:
            logits = torch.einsum("bk,bkc->bc", shares, labels.to(shares.dtype))
            if self.config.problem_type == "multi_label_classification":
                logits = (logits + SMALLEST_SHARE).log() - (1 - logits).clamp_min(0).add(SMALLEST_SHARE).log()
        return logits.to(features.dtype)


class PrototypeHead(MemoryHead):
    """Nearest class mean (Snell et al. 2017, arXiv 1703.05175, §2.2, the cosine in place of the distance): over the
    training rows of class c

        p_c = mean_i f(x_i),   logits_c = cos(f(x), p_c) / τ
    """

    name = "prototype"
    options = ("temperature", "feature_norm")
    problem_types = ("single_label_classification",)
    prototypes: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("prototypes", torch.zeros(config.num_labels, config.d_in))

    def remember(self, features: Float[Tensor, "n d_in"], labels: Int[Tensor, " n"]) -> None:
        directions, labels = self.directions(features), labels.to(self.prototypes.device)
        counts = torch.bincount(labels, minlength=len(self.prototypes))
        if not bool((counts > 0).all()):
            names = [self.config.id2label[number] for number in torch.nonzero(counts == 0).flatten().tolist()]
            raise ValueError(
                f"A prototype is the mean of its class, and {', '.join(names[:10])} has no training rows. Give rows of "
                "every class, or validation features, so that none are held out."
            )
        sums = torch.zeros_like(self.prototypes).index_add_(0, labels, directions)
        self.prototypes.copy_(sums / counts[:, None])

    def forward(self, features: Float[Tensor, "B d_in"]) -> Float[Tensor, "B num_labels"]:
        return self.directions(features) @ F.normalize(self.prototypes, dim=1).T / self.config.temperature
