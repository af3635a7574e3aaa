"""ProbeTrainer: fits on training rows, chooses on validation rows, reports on test rows once, when asked to."""

import copy
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from tqdm.auto import tqdm

from .._files import fingerprint_of, require_writable_folder
from .._training import (
    MetricsLogger,
    hold_out_images,
    load_checkpoint,
    require_finite_loss,
    save_checkpoint,
)
from ..features import FeatureSet
from ..features.order import epoch_order
from ..provenance import require_same_provenance
from .heads import LinearHead
from .modeling import DiffusionProbe
from .training_args import ProbeTrainingArguments


@dataclass(frozen=True)
class ProbeMetrics:
    accuracy: float
    loss: float
    """Mean cross-entropy."""
    rows: int


@dataclass(frozen=True)
class ProbeTrainingResult:
    validation: ProbeMetrics
    """Of the chosen epoch or L2 strength."""
    chosen: dict[str, float]
    """Which epoch or L2 strength that was."""
    history: list[dict[str, float]]


class ProbeTrainer:
    """Trains a DiffusionProbe on cached features.

    The protocol: parameters are fitted on training rows; the L2 strength of `lbfgs` or the epoch of `adamw` is chosen
    by validation accuracy (ties by loss); test rows are given to `evaluate` alone, after everything is chosen.
    """

    def __init__(
        self,
        probe: DiffusionProbe,
        features: FeatureSet,
        args: ProbeTrainingArguments,
        *,
        validation_features: FeatureSet | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        """
        Raises:
            ValueError: for features without labels, with labels outside the probe's classes, of another shape, with NaN
                or infinity, or of another extraction.
        """
        self.probe, self.args = probe, args
        self.features = features
        self._require(features, "The training features", allow_mismatch)
        if validation_features is None:
            held_out = max(1, round(features.num_images * args.validation_fraction))
            self.train_rows, rows = hold_out_images(features, held_out, seed=args.seed)
            self.validation = (features[rows], _labels(features)[rows])
        else:
            self._require(validation_features, "The validation features", allow_mismatch)
            self.train_rows = torch.arange(len(features))
            self.validation = (validation_features.to_tensor(), _labels(validation_features))
        is_linear = probe.config.head == "linear"
        if args.optimizer == "lbfgs" and not is_linear:
            raise ValueError("lbfgs is for the linear head, whose problem is convex; use optimizer='adamw'.")
        self.optimizer_name = ("lbfgs" if is_linear else "adamw") if args.optimizer == "auto" else args.optimizer

    def _require(self, given: FeatureSet, what: str, allow_mismatch: bool) -> None:
        """Refuse features that are not the probe's, of another extraction than the training's, broken or unlabelled."""
        given.require_finite(what)
        self.probe.require_features(given, allow_mismatch=allow_mismatch)
        require_same_provenance(
            self.features.provenance, given.provenance, "This training", allow_mismatch=allow_mismatch
        )
        _require_labels(given, self.probe.config.num_labels, what)

    def train(self, *, progress: bool = True) -> ProbeTrainingResult:
        """Fit, choose on validation, save the chosen probe in `output_dir`."""
        result = self.fit(progress=progress)
        self.save()
        return result

    def fit(self, *, progress: bool = True) -> ProbeTrainingResult:
        """Fit and choose on validation, without saving the finished probe."""
        output_dir = require_writable_folder(self.args.output_dir)
        if isinstance(self.probe.head, LinearHead):
            self._standardise(self.probe.head)
        fit = self._fit_lbfgs if self.optimizer_name == "lbfgs" else self._fit_adamw
        result = fit(output_dir, progress)
        self.probe.eval()
        self.probe.provenance = self.features.provenance
        self.probe.metrics = {
            "validation": {"accuracy": result.validation.accuracy, "rows": result.validation.rows},
            "training": {"rows": len(self.train_rows), "optimizer": self.optimizer_name, **result.chosen},
        }
        return result

    def save(self) -> None:
        """Write the probe with its metrics into `output_dir`."""
        self.probe.save_pretrained(self.args.output_dir)

    def evaluate(self, test_features: FeatureSet, *, allow_mismatch: bool = False) -> ProbeMetrics:
        """Accuracy on rows that no choice was made on; recorded in the probe's metrics as `test`."""
        self._require(test_features, "The test features", allow_mismatch)
        metrics = _measure(self.probe.predict(test_features), _labels(test_features))
        self.probe.metrics["test"] = {"accuracy": metrics.accuracy, "rows": metrics.rows}
        return metrics

    def _standardise(self, head: LinearHead) -> None:
        rows = self.features[self.train_rows].double()
        head.feature_mean.copy_(rows.mean(0))
        # constant features carry nothing: with σ = 1 they stay 0 instead of becoming NaN
        std = rows.std(0, correction=0)
        head.feature_std.copy_(torch.where(std > 1e-6 * rows.abs().amax(0), std, 1.0))

    def _validate(self) -> ProbeMetrics:
        return _measure(self.probe.predict(self.validation[0]), self.validation[1])

    def _fit_lbfgs(self, output_dir: Path, progress: bool) -> ProbeTrainingResult:
        """One convex problem an L2 strength, warm-started from strong to weak."""
        head, device = self.probe.head, self.probe.device
        assert isinstance(head, LinearHead)
        rows = self.features[self.train_rows].to(device)
        labels = _labels(self.features)[self.train_rows].to(device)
        best: tuple[ProbeMetrics, float, dict[str, Tensor]] | None = None
        strengths = tqdm(sorted(self.args.l2_path, reverse=True), desc="probe", disable=not progress)
        with closing(MetricsLogger(self.args.report_to, output_dir, self.args.to_dict())) as logger, strengths:
            for step, l2 in enumerate(strengths):
                loss = _minimise(head, rows, labels, l2)
                require_finite_loss(loss, step, output_dir, "Check the scale of the features.", head)
                metrics = self._validate()
                logger.log(
                    step, {"l2": l2, "loss": loss, "accuracy": metrics.accuracy, "validation_loss": metrics.loss}
                )
                if best is None or _better(metrics, best[0]):
                    best = (metrics, l2, copy.deepcopy(head.state_dict()))
        assert best is not None  # l2_path is never empty
        head.load_state_dict(best[2])
        return ProbeTrainingResult(best[0], {"l2": best[1]}, logger.history)

    def _fit_adamw(self, output_dir: Path, progress: bool) -> ProbeTrainingResult:
        """Revelio's recipe; an epoch is the unit of resuming."""
        args, probe = self.args, self.probe
        labels = _labels(self.features)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
        best = {name: value.clone() for name, value in probe.state_dict().items()}
        # epochs done; best accuracy, loss, epoch
        state = torch.tensor([0.0, -1.0, math.inf, -1.0], dtype=torch.float64)
        logger = MetricsLogger(args.report_to, output_dir, args.to_dict())
        extra = load_checkpoint(output_dir, probe, optimizer, run=self._run_name(), history=logger.history)
        if extra is not None:
            state = extra.pop("state")
            best = {name.removeprefix("best."): value for name, value in extra.items()}
        epochs = range(int(state[0]), args.num_train_epochs)
        with closing(logger), tqdm(epochs, desc="probe", unit="epoch", disable=not progress) as bar:
            for epoch in bar:
                cosine = 0.5 * (1 + math.cos(math.pi * epoch / args.cosine_epochs))
                optimizer.param_groups[0]["lr"] = args.learning_rate * cosine
                loss = self._epoch(epoch, optimizer, labels)
                metrics = self._validate()
                for value in (loss, metrics.loss):
                    require_finite_loss(value, epoch, output_dir, "Lower learning_rate.")
                logger.log(epoch, {"loss": loss, "accuracy": metrics.accuracy, "validation_loss": metrics.loss})
                state[0] = epoch + 1
                if _better(metrics, ProbeMetrics(state[1].item(), state[2].item(), 0)):
                    state[1:] = torch.tensor([metrics.accuracy, metrics.loss, epoch], dtype=torch.float64)
                    best = {name: value.clone() for name, value in probe.state_dict().items()}
                extra = {"state": state, **{f"best.{name}": value for name, value in best.items()}}
                save_checkpoint(output_dir, probe, optimizer, extra, run=self._run_name(), history=logger.history)
        probe.load_state_dict(best)
        chosen = ProbeMetrics(state[1].item(), state[2].item(), len(self.validation[1]))
        return ProbeTrainingResult(chosen, {"epoch": state[3].item()}, logger.history)

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, labels: Tensor) -> float:
        """One pass in the order of (seed, epoch); the dropout's random state is forked: no one else's changes."""
        probe, total = self.probe, 0.0
        order = self.train_rows[epoch_order(len(self.train_rows), seed=self.args.seed, epoch=epoch)]
        devices = [probe.device] if probe.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed * 1_000_003 + epoch)
            probe.train()
            for rows in order.split(self.args.batch_size):
                if len(rows) == 1 and len(order) > 1:
                    continue  # BatchNorm cannot learn from a single row
                batch = self.features[rows].to(probe.device)
                loss = probe(features=batch, labels=labels[rows].to(probe.device)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.item() * len(rows)
        return total / len(order)

    def _run_name(self) -> str:
        config = self.probe.config
        content: dict[str, Any] = {
            key: getattr(config, key) for key in ("d_in", "num_labels", "head", "width", "dropout", "init_seed")
        }
        content |= {key: value for key, value in self.args.to_dict().items() if key not in ("output_dir", "report_to")}
        validation = FeatureSet.from_tensor(*self.validation)
        content |= {"features": self.features.fingerprint(), "validation": validation.fingerprint()}
        return fingerprint_of(content)


def _labels(features: FeatureSet) -> Tensor:
    labels = features.labels
    if labels is None:
        raise ValueError(
            "A probe needs labels, and these features have none. Extract from class folders or labelled data."
        )
    return labels


def _require_labels(features: FeatureSet, num_labels: int, what: str) -> None:
    labels = _labels(features)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        raise ValueError(f"{what} have labels {low}…{high}, the probe has classes 0…{num_labels - 1}. Check id2label.")


def _measure(logits: Tensor, labels: Tensor) -> ProbeMetrics:
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return ProbeMetrics(accuracy, F.cross_entropy(logits.double(), labels).item(), len(labels))


def _better(new: ProbeMetrics, old: ProbeMetrics) -> bool:
    return (new.accuracy, -new.loss) > (old.accuracy, -old.loss)


def _minimise(head: LinearHead, rows: Tensor, labels: Tensor, l2: float) -> float:
    """Multinomial logistic regression: mean cross-entropy + l2 · ‖W‖² / 2, by L-BFGS to convergence."""
    standardised = ((rows - head.feature_mean) / head.feature_std).double()
    weight = head.classifier.weight.detach().double().requires_grad_()
    bias = head.classifier.bias.detach().double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(standardised, weight, bias), labels) + l2 / 2 * weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = closure().item()  # `step` returns the loss before the first update
    with torch.no_grad():
        head.classifier.weight.copy_(weight)
        head.classifier.bias.copy_(bias)
    return loss
