"""What a probe predicts, by transformers' `problem_type`: labels, loss, class weights and metrics of each.

| problem_type | labels | loss of an example | chosen by |
|---|---|---|---|
| `single_label_classification` | (N,) class numbers | −log softmax(logits)[y] | accuracy |
| `multi_label_classification` | (N, num_labels) of 0 and 1 | mean over labels of the binary cross-entropy | mAP |
| `regression` | (N,) or (N, num_labels) numbers | mean over outputs of (logit − y)² | R² |
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor


class Task(ABC):
    """One `problem_type`."""

    metric: ClassVar[str]
    """What choices are made by: larger is better."""
    balanced_metric: ClassVar[str]
    """The same where training is balanced over the classes."""

    @abstractmethod
    def checked(self, labels: Tensor, num_labels: int, what: str) -> Tensor:
        """The labels in the type that the loss takes.

        Raises:
            ValueError: for labels of another shape, type or range.
        """

    @abstractmethod
    def losses(
        self, logits: Float[Tensor, "N num_labels"], labels: Tensor, weights: Float[Tensor, " num_labels"] | None = None
    ) -> Float[Tensor, " N"]:
        """Loss of each example, times the weight of its class where weights are given."""

    @abstractmethod
    def class_weights(self, labels: Tensor, num_labels: int) -> Float[Tensor, " num_labels"]:
        """Weights with which all classes count alike; raises ValueError where there are no classes."""

    @abstractmethod
    def metrics(self, logits: Tensor, labels: Tensor, *, balanced: bool = False) -> dict[str, float]: ...

    def loss(self, logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """Mean over the examples."""
        return self.losses(logits, labels).mean()


class SingleLabel(Task):
    metric, balanced_metric = "accuracy", "balanced_accuracy"

    def checked(self, labels: Tensor, num_labels: int, what: str) -> Tensor:
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"{what} must have one class number an example, (N,) integers, got {_said(labels)}. For several labels "
                "an example set problem_type='multi_label_classification', for numbers 'regression'."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_labels:
            raise ValueError(
                f"{what} have labels {low}…{high}, the probe has classes 0…{num_labels - 1}. Check id2label."
            )
        return labels.long()

    def losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses if weights is None else losses * weights[labels]

    def class_weights(self, labels: Tensor, num_labels: int) -> Tensor:
        """n / (C n_c) over the C classes that occur, so that the weights of all examples have the mean 1."""
        counts = torch.bincount(labels, minlength=num_labels)
        weights = len(labels) / (int((counts > 0).sum()) * counts.double())
        return torch.where(counts > 0, weights, 0.0)

    def metrics(self, logits: Tensor, labels: Tensor, *, balanced: bool = False) -> dict[str, float]:
        right = (logits.argmax(1) == labels).double()
        if not balanced:
            return {"accuracy": right.mean().item()}
        recalls = torch.stack([right[labels == c].mean() for c in labels.unique()])
        return {"accuracy": right.mean().item(), "balanced_accuracy": recalls.mean().item()}


class MultiLabel(Task):
    metric = balanced_metric = "mean_average_precision"

    def checked(self, labels: Tensor, num_labels: int, what: str) -> Tensor:
        if labels.ndim != 2 or labels.shape[1] != num_labels:
            raise ValueError(
                f"{what} must have {num_labels} labels an example, (N, {num_labels}) of 0 and 1, got {_said(labels)}. "
                "Give them with features.with_labels(…)."
            )
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(f"{what} must have labels of 0 and 1, got others, such as {_other(labels)}.")
        return labels.float()

    def losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        labels = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none").mean(1)

    def class_weights(self, labels: Tensor, num_labels: int) -> Tensor:
        """Of the positives of each label: negatives / positives; 1 where there is none."""
        positives = labels.double().sum(0)
        return torch.where(positives > 0, (len(labels) - positives) / positives.clamp_min(1), 1.0)

    def metrics(self, logits: Tensor, labels: Tensor, *, balanced: bool = False) -> dict[str, float]:
        precisions = [average_precision(logits[:, c], labels[:, c]) for c in range(labels.shape[1])]
        known = [value for value in precisions if value is not None]
        return {
            "mean_average_precision": sum(known) / len(known) if known else 0.0,
            "macro_f1": _macro_f1(logits > 0, labels > 0),
        }


class Regression(Task):
    metric = balanced_metric = "r2"

    def checked(self, labels: Tensor, num_labels: int, what: str) -> Tensor:
        values = labels[:, None] if labels.ndim == 1 else labels
        if values.ndim != 2 or values.shape[1] != num_labels:
            shape = f"(N, {num_labels})" + (" or (N,)" if num_labels == 1 else "")
            raise ValueError(
                f"{what} must have {num_labels} numbers an example, {shape}, got {_said(labels)}. Give them with "
                "features.with_labels(…), or set num_labels."
            )
        if not bool(torch.isfinite(values.float()).all()):
            raise ValueError(f"{what} have labels that are NaN or infinite. Leave these examples out.")
        return values.float()

    def losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        return (logits - labels.reshape(logits.shape).to(logits.dtype)).square().mean(1)

    def class_weights(self, labels: Tensor, num_labels: int) -> Tensor:
        raise ValueError("Regression has no classes to balance: leave class_weights and balanced_sampling out.")

    def metrics(self, logits: Tensor, labels: Tensor, *, balanced: bool = False) -> dict[str, float]:
        """R² is the mean over outputs; of an output that is constant 1 if it is met exactly, else 0."""
        errors, labels = (logits - labels).double().square(), labels.double()
        total = (labels - labels.mean(0)).square().sum(0)
        exact = (errors.sum(0) == 0).double()
        r2 = torch.where(total > 0, 1 - errors.sum(0) / total, exact)
        return {"r2": r2.mean().item(), "mse": errors.mean().item()}


TASKS: dict[str | None, Task] = {
    None: SingleLabel(),
    "single_label_classification": SingleLabel(),
    "multi_label_classification": MultiLabel(),
    "regression": Regression(),
}


def average_precision(scores: Float[Tensor, " N"], labels: Tensor) -> float | None:
    """Σ_n (R_n − R_{n−1}) P_n over the distinct scores from the largest down; None without a positive."""
    positives = int((labels > 0).sum())
    if not positives:
        return None
    scores, order = scores.double().sort(descending=True, stable=True)
    true = (labels[order] > 0).double().cumsum(0)
    last = torch.ones(len(scores), dtype=torch.bool)
    last[:-1] = scores[:-1] != scores[1:]  # equal scores are one threshold
    precision = (true / torch.arange(1, len(scores) + 1))[last]
    recall = true[last] / positives
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


def _macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean over labels of 2 TP / (2 TP + FP + FN); 0 for a label that neither occurs nor is predicted."""
    both = (predicted & labels).sum(0).double()
    total = predicted.sum(0) + labels.sum(0)
    return torch.where(total > 0, 2 * both / total.clamp_min(1), 0.0).mean().item()


def _said(labels: Tensor) -> str:
    return f"{str(labels.dtype).removeprefix('torch.')} of the shape {tuple(labels.shape)}"


def _other(labels: Tensor) -> float:
    return labels[(labels != 0) & (labels != 1)][0].item()
