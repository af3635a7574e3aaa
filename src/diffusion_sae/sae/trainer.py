"""SAETrainer: features in, a trained KSparseAutoencoder out; killed at any step, the next run ends the same."""

import dataclasses
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_scheduler

from .._files import fingerprint_of, require_writable_folder, write_json
from .._training import (
    MetricsLogger,
    data_fingerprint,
    hold_out_images,
    load_checkpoint,
    require_finite_loss,
    save_checkpoint,
    step_rows,
)
from ..features import FeatureSet, as_feature_set
from ..provenance import require_same_provenance
from .evaluation import SAEMetrics, evaluate_sae
from .modeling import KSparseAutoencoder
from .training_args import SAETrainingArguments

_ADVICE = "Lower learning_rate, or check the features' scale."


@dataclass(frozen=True)
class SAETrainingResult:
    """What a training came to."""

    metrics: SAEMetrics
    """On the held-out rows; with `eval_fraction=0` on training rows."""
    steps: int
    seconds: float
    """Of this run; a resumed run counts its own part."""
    history: list[dict[str, float]]
    """One entry a log line."""


class SAETrainer:
    """Trains a k-SAE as Revelio does (§3.2): normalised MSE, unit-norm decoder, b_dec from the mean, Adam with warm-up.

    Beyond the paper: an AuxK loss against dead latents, evaluation on held-out images, exact resuming.
    """

    def __init__(
        self,
        sae: KSparseAutoencoder,
        features: FeatureSet | Tensor,
        args: SAETrainingArguments,
        *,
        eval_features: FeatureSet | Tensor | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        """
        Args:
            sae: the model to train, changed in place.
            features: rows (N, d_in) to train on.
            args: how.
            eval_features: rows to evaluate on; None: `args.eval_fraction` of the images of `features`, held out.
            allow_mismatch: train on features of another extraction than the SAE records, and evaluate on others.

        Raises:
            ValueError: for features of another width, with NaN or infinity, or of another extraction; for too few
                images to hold some out, or evaluation rows that are all equal.
        """
        self.sae, self.args = sae, args
        self.features = as_feature_set(features)
        self.features.require_finite("The training features")
        sae.require_features(self.features, allow_mismatch=allow_mismatch)
        self.train_rows, self.eval_features = self._split(eval_features, allow_mismatch)
        if bool((self.eval_features == self.eval_features[:1]).all()):
            raise ValueError(
                f"The {len(self.eval_features)} rows to evaluate on are all equal, so that there is no variance to "
                "explain. Give more images, a larger eval_fraction, or eval_features."
            )
        self.held_out = eval_features is not None or args.eval_fraction > 0
        self.batch_size = min(args.batch_size, len(self.train_rows))
        per_epoch = max(1, len(self.train_rows) // self.batch_size)
        self.max_steps = args.max_steps or max(1, round(args.num_train_epochs * per_epoch))
        self.auxk = sae.config.d_in // 2 if args.auxk is None else args.auxk

    def _split(self, eval_features: FeatureSet | Tensor | None, allow_mismatch: bool) -> tuple[Tensor, Tensor]:
        """Training rows, and the features to evaluate on."""
        features, args = self.features, self.args
        if eval_features is not None:
            given = as_feature_set(eval_features)
            given.require_finite("The evaluation features")
            self.sae.require_features(given, allow_mismatch=allow_mismatch)
            require_same_provenance(
                features.provenance, given.provenance, "This training", allow_mismatch=allow_mismatch
            )
            return torch.arange(len(features)), given.to_tensor()
        if args.eval_fraction == 0:
            return torch.arange(len(features)), features[: 8 * args.batch_size]
        at_least = 1 if features.rows_per_image > 1 else 2  # a single row has no variance
        held_out = max(at_least, round(features.num_images * args.eval_fraction))
        train_rows, eval_rows = hold_out_images(features, held_out, seed=args.seed)
        return train_rows, features[eval_rows]

    def _run_name(self) -> str:
        """Identifies what a checkpoint belongs to: settings, shape, data."""
        return fingerprint_of(
            {
                "args": {
                    k: v
                    for k, v in self.args.to_dict().items()
                    if k not in ("output_dir", "logging_steps", "report_to")
                },
                "config": {
                    k: getattr(self.sae.config, k) for k in ("d_in", "num_latents", "k", "encoder_init", "init_seed")
                },
                "features": data_fingerprint(self.features),
                "train_rows": len(self.train_rows),
            }
        )

    def train(self, *, progress: bool = True) -> SAETrainingResult:
        """Train to the end, or on from the checkpoint in `output_dir`; save the finished SAE there.

        Raises:
            TrainingDivergedError: if the loss becomes NaN or infinite.
        """
        sae, args = self.sae, self.args
        output_dir = require_writable_folder(args.output_dir)
        device = sae.W_dec.device
        optimizer = torch.optim.Adam(sae.parameters(), lr=args.learning_rate)
        rows_since_active = torch.zeros(sae.config.num_latents, dtype=torch.long, device=device)
        logger = MetricsLogger(args.report_to, output_dir, args.to_dict())
        step = self._resume_or_begin(output_dir, optimizer, rows_since_active, logger.history)
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, min(args.warmup_steps, self.max_steps // 2), self.max_steps
        )
        started = time.perf_counter()
        sae.train()
        bar = tqdm(total=self.max_steps, initial=step, desc="train k-SAE", unit="step", disable=not progress)
        with closing(logger), bar:
            while step < self.max_steps:
                _set_step(scheduler, step)
                rows = step_rows(step, self.batch_size, len(self.train_rows), seed=args.seed)
                batch = self.features[self.train_rows[rows]].to(device)
                loss, fvu = self._step(batch, optimizer, rows_since_active)
                step += 1
                bar.update()
                if step % args.logging_steps == 0 or step == self.max_steps:
                    require_finite_loss(loss.item(), step, output_dir, _ADVICE)
                    dead = (rows_since_active >= args.dead_after_rows).float().mean().item()
                    logger.log(step, {"loss": loss.item(), "fvu": fvu.item(), "dead_latents": dead})
                    bar.set_postfix(loss=f"{loss.item():.4f}", fvu=f"{fvu.item():.4f}")
                if step % args.save_steps == 0 or step == self.max_steps:
                    require_finite_loss(loss.item(), step, output_dir, _ADVICE, sae)
                    extra = {"step": torch.tensor(step), "rows_since_active": rows_since_active}
                    save_checkpoint(output_dir, sae, optimizer, extra, run=self._run_name(), history=logger.history)
        return self._finish(output_dir, step, time.perf_counter() - started, logger.history)

    def _resume_or_begin(
        self,
        output_dir: Path,
        optimizer: torch.optim.Optimizer,
        rows_since_active: Tensor,
        history: list[dict[str, float]],
    ) -> int:
        extra = load_checkpoint(output_dir, self.sae, optimizer, run=self._run_name(), history=history)
        if extra is not None:
            rows_since_active.copy_(extra["rows_since_active"])
            return int(extra["step"])
        with torch.no_grad():
            self.sae.b_dec.copy_(self.features.mean())
            self.sae.normalize_decoder_()
        return 0

    def _step(
        self, batch: Tensor, optimizer: torch.optim.Optimizer, rows_since_active: Tensor
    ) -> tuple[Tensor, Tensor]:
        sae, args = self.sae, self.args
        output = sae(batch, rows_since_active >= args.dead_after_rows, self.auxk, args.auxk_alpha)
        output.loss.backward()
        sae.remove_parallel_gradient_()
        if args.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sae.normalize_decoder_()
        rows_since_active += len(batch)
        rows_since_active[output.top_indices[output.top_acts > 0]] = 0
        return output.loss.detach(), output.fvu

    def evaluate(self) -> SAEMetrics:
        """FVU, L0 and dead latents on the held-out rows (with `eval_fraction=0` on training rows)."""
        return evaluate_sae(self.sae, FeatureSet.from_tensor(self.eval_features))

    def _finish(
        self, output_dir: Path, steps: int, seconds: float, history: list[dict[str, float]]
    ) -> SAETrainingResult:
        self.sae.eval()
        metrics = self.evaluate()
        require_finite_loss(metrics.fvu, steps, output_dir, _ADVICE)
        self.sae.provenance = self.features.provenance
        self.sae.metrics = {
            "held_out" if self.held_out else "on_training_rows": dataclasses.asdict(metrics),
            "training": {"steps": steps, "rows": len(self.train_rows), **self.args.to_dict()},
            "note": f"On {metrics.rows:,} rows of images that were held out of the SAE's training."
            if self.held_out
            else f"On {metrics.rows:,} rows that the SAE was trained on: none were held out.",
        }
        self.sae.metrics["training"].pop("output_dir")
        self.sae.save_pretrained(output_dir)
        write_json(output_dir / "training_history.json", history)
        return SAETrainingResult(metrics, steps, seconds, history)


def _set_step(scheduler: Any, step: int) -> None:
    """Learning rate of a step from its number alone, so that a resumed run needs no scheduler state."""
    for group, base, factor in zip(
        scheduler.optimizer.param_groups,
        scheduler.base_lrs,
        scheduler.lr_lambdas,
        strict=True,
    ):
        group["lr"] = base * factor(step + 1)
