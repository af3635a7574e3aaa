"""SAETrainer: features in, a trained KSparseAutoencoder out; killed at any step, the next run ends the same."""

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .._files import fingerprint_of, require_writable_folder, write_atomically, write_json
from .._training import MetricsLogger, require_finite_loss
from ..features import FeatureSet, FeatureSource
from .averaging import MovingAverage
from .checkpoints import Checkpoints
from .data import prepare_data
from .divergence import ADVICE, diverging_lines, require_convergence
from .evaluation import SAEMetrics, evaluate_sae
from .modeling import KSparseAutoencoder
from .preparation import fold_input_scale_, input_scale, set_biases_, set_thresholds_
from .resampling import resample_
from .results import SAECallback, SAETrainingResult
from .schedule import learning_rate_factor
from .sharding import gathered, placed
from .step import StepReport, TrainingStep
from .training_args import SAETrainingArguments

logger = logging.getLogger(__name__)
_RECORDS_ONLY = ("output_dir", "logging_steps", "save_steps", "report_to")  # change no number


class SAETrainer:
    """Trains an SAE: normalised MSE, unit-norm decoder, b_dec from the data, Adam with warm-up (Revelio, §3.2).

    Beyond the paper: AuxK or resampling against dead latents, evaluation on held-out images, exact resuming, several
    processes (`accelerate launch`), and what `SAETrainingArguments` lists.
    """

    def __init__(
        self,
        sae: KSparseAutoencoder,
        features: FeatureSet | FeatureSource | Tensor,
        args: SAETrainingArguments,
        *,
        eval_features: FeatureSet | Tensor | None = None,
        allow_mismatch: bool = False,
        callbacks: Sequence[SAECallback] = (),
    ) -> None:
        """
        Args:
            sae: the model to train, changed in place; with `shard_latents` one on the meta device, which stays so:
                each process trains its share (`self.sae`), and the whole is in `output_dir` at the end.
            features: rows (N, d_in) to train on, or a source of batches: `ShuffledBatches`, `extractor.stream(…)`.
            args: how.
            eval_features: rows to evaluate on; None: `args.eval_fraction` of the images of `features`, held out, or
                what the source holds out.
            allow_mismatch: train on features of another extraction than the SAE records, and evaluate on others.
            callbacks: called after log lines and checkpoints.

        Raises:
            ValueError: for features of another width, with NaN or infinity, or of another extraction; for too few
                images to hold some out, or evaluation rows that are all equal; for an SAE that `shard_latents` cannot
                share out, or of fp16 weights.
        """
        self.callbacks = list(callbacks)
        self.args = args = dataclasses.replace(  # with numbers in place of None, for the record
            args,
            learning_rate=args.peak_learning_rate(sae.config.d_in),
            dead_after_rows=args.rows_until_dead(sae.config.num_latents, sae.config.k),
            sparsity_coefficient=args.penalty_weight(sae.config.activation),
        )
        if sae.dtype == torch.float16 and args.optimizer != "sgd":  # whose eps of 1e-8 is 0 there
            raise ValueError(
                f"{args.optimizer} cannot train weights of torch.float16, which become NaN. Call sae.float() before "
                "the training, with bf16=True to compute in half precision."
            )
        self.sae, self.processes = placed(sae, args)
        shares = self.processes.batch_shares
        data = prepare_data(self.sae, features, args, eval_features, allow_mismatch=allow_mismatch, processes=shares)
        self.source, self.eval_features, self.held_out = data.source, data.eval_features, data.held_out
        self._evaluated_on = None if eval_features is None else self.eval_features.fingerprint()
        epochs = args.num_train_epochs * self.source.steps_per_epoch
        self.max_steps = args.max_steps or max(1, round(epochs))
        self.step_number = 0
        self.scale = torch.ones(())
        self.best = sys.float_info.max  # finite, as all of a checkpoint is
        self.evaluations_since_best = 0
        self._stopping = False

    def stop(self) -> None:
        """End the training after the current step, as if it were the last one, for good; for callbacks."""
        self._stopping = True

    def _run_name(self) -> str:
        """Identifies what a checkpoint belongs to: settings, shape, data."""
        return fingerprint_of(
            {
                "args": {k: v for k, v in self.args.to_dict().items() if k not in _RECORDS_ONLY},
                "config": self.sae.config.record(),
                "source": self.source.fingerprint(),
                "eval_features": self._evaluated_on,
            }
        )

    def train(self, *, progress: bool = True) -> SAETrainingResult:
        """Train to the end, or on from the checkpoint in `output_dir`; save the finished SAE there.

        Raises:
            TrainingDivergedError: if the loss becomes NaN or infinite, or rises beyond twice its best while the SAE is
                worse than the mean row, at three log lines in a row; if too many latents are dead.
        """
        return train_together([self], progress=progress)[0]

    def begin(self) -> None:
        """Make the optimiser and take up the checkpoint, if there is one."""
        args, sae = self.args, self.sae
        self.output_dir = require_writable_folder(args.output_dir)
        report_to = args.report_to if self.processes.is_main else "none"
        self.logger = MetricsLogger(report_to, self.output_dir, args.to_dict())
        self.stepper = TrainingStep(sae, args, self.processes)
        self.schedule = learning_rate_factor(args, self.stepper.optimizer, self.max_steps)
        self.run_name = self._run_name()
        self.checkpoints = Checkpoints.of(self.output_dir, self.run_name, self.processes)
        extra = self.checkpoints.load(sae, self.stepper.optimizer, self.logger.history)
        if extra is None:
            if self.checkpoints.writes:
                self.checkpoints.best.unlink(missing_ok=True)  # of a run whose checkpoint was deleted
            self.scale = self.processes.broadcast(input_scale(self.source, args.normalize_input))
            set_biases_(sae, self.source, args.b_dec_init, self.scale)
            set_thresholds_(sae, self.source, self.scale)
            sae.normalize_decoder_()
            self.processes.broadcast_state(sae)
            self.average = MovingAverage(sae, args.ema_decay)
            return
        self.stepper.rows_since_active.copy_(extra["rows_since_active"])
        self.step_number = self.stepper.steps_done = int(extra["step"])
        self.scale = extra["input_scale"]
        self._stopping = bool(extra.get("stopped", False))
        self.best, self.evaluations_since_best = float(extra["best"]), int(extra["evaluations_since_best"])
        self.average = MovingAverage(sae, args.ema_decay)
        self.average.load(extra)

    @property
    def done(self) -> bool:
        patience = self.args.early_stopping_patience
        if self._stopping or self.step_number >= self.max_steps:
            return True
        return patience is not None and self.evaluations_since_best >= patience

    def advance(self, batch: Tensor, timesteps: Tensor | None) -> StepReport:
        """One step, with what belongs to it: logging, evaluation, checkpoint."""
        args, device = self.args, self.sae.device
        batch = (batch.to(device) / self.scale.to(device)) if args.normalize_input != "none" else batch.to(device)
        of_rows = None if self.sae.config.timesteps is None or timesteps is None else timesteps.to(device)
        step = self.step_number
        if args.resample_steps and step and step % args.resample_steps == 0:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            resample_(self.sae, self.stepper.optimizer, self.stepper.dead, batch, generator, of_rows)
            self.stepper.rows_since_active[self.stepper.dead] = 0
        report = self.stepper(batch, self._learning_rate(step), timesteps=of_rows, k=self._k(step))
        self.step_number = step = step + 1
        self.average.update(step)
        if step == 1 or step % args.logging_steps == 0 or step >= self.max_steps:
            self._log_step(report)
        if args.eval_steps and (step % args.eval_steps == 0 or step >= self.max_steps):
            self._evaluate_on_the_way()
        if self.done or (step % args.save_steps == 0 and self._is_sound()):
            self._save(report.loss.item())
        return report

    def _is_sound(self) -> bool:
        """Whether a checkpoint of now may replace the one from before; not while the training may be diverging."""
        collapsed = bool(self.stepper.dead.float().mean() > self.args.max_dead_latents)
        return not collapsed and not diverging_lines(self.logger.history, self.args.warmup_steps)

    def _learning_rate(self, step: int) -> float:
        """From the step's number alone, so that a resumed run needs no scheduler state."""
        return self.stepper.learning_rate * self.schedule(step + 1)

    def _k(self, step: int) -> int | None:
        start, k = self.args.k_anneal_start, self.sae.config.k
        if start is None or step >= self.args.k_anneal_steps:
            return None
        return round(start + (k - start) * step / self.args.k_anneal_steps)

    def _log(self, values: dict[str, float]) -> None:
        if self.processes.is_main:
            self.logger.log(self.step_number, values)
        else:  # by which all stop where one does
            self.logger.history.append({"step": self.step_number, **values})
        for callback in self.callbacks:
            callback.on_log(self, self.step_number, values)

    def _log_step(self, report: StepReport) -> None:
        loss, fvu = report.loss.item(), report.fvu.item()
        dead = self.stepper.dead.float().mean().item()
        require_finite_loss(loss, self.step_number, self.output_dir, ADVICE)
        values = {"loss": loss, "fvu": fvu, "l0": report.l0.item(), "dead_latents": dead}
        if not math.isfinite(fvu):  # the rows of the batch are all equal
            del values["fvu"]
        self._log(values)
        require_convergence(self.logger.history, self.args, self.output_dir)

    def _evaluate_on_the_way(self) -> None:
        with self.average.taken():
            metrics = self.evaluate()
        self._log({f"eval_{name}": value for name, value in dataclasses.asdict(metrics).items() if name != "rows"})
        if metrics.fvu < self.best:
            self.best, self.evaluations_since_best = metrics.fvu, 0
            if self.args.keep_best and self.checkpoints.writes:
                with self.average.taken():
                    tensors = {n: v.detach().cpu().contiguous() for n, v in self.sae.state_dict().items()}
                write_atomically(self.checkpoints.best, lambda path: save_file(tensors, path))
        else:
            self.evaluations_since_best += 1
        for callback in self.callbacks:
            callback.on_evaluate(self, self.step_number, metrics)

    def _save(self, loss: float) -> None:
        with self.processes.together():  # of several, one alone may see it
            require_finite_loss(loss, self.step_number, self.output_dir, ADVICE, self.sae)
        extra = {
            "step": torch.tensor(self.step_number),
            "rows_since_active": self.stepper.rows_since_active,
            "input_scale": self.scale,
            "best": torch.tensor(self.best, dtype=torch.float64),
            "evaluations_since_best": torch.tensor(self.evaluations_since_best),
            **self.average.tensors(),
        }
        self._write(extra)
        stopping = self._stopping
        for callback in self.callbacks:
            callback.on_save(self, self.step_number)
        if self._stopping and not stopping:
            self._write(extra)

    def _write(self, extra: dict[str, Tensor]) -> None:
        extra = {**extra, "stopped": torch.tensor(self._stopping)}
        self.checkpoints.save(self.sae, self.stepper.optimizer, extra, self.logger.history, self.step_number)

    def evaluate(self) -> SAEMetrics:
        """FVU, L0 and dead latents on the held-out rows (with `eval_fraction=0` on training rows)."""
        scaled = self.scale.ndim > 0 or self.scale != 1
        return evaluate_sae(self.sae, self.eval_features, allow_mismatch=True, scale=self.scale if scaled else None)

    def finish(self, seconds: float) -> SAETrainingResult:
        """Take the best or averaged weights, fold the input's scale in, measure and save."""
        sae, args = self.sae, self.args
        sae.eval()
        if self.stepper.screened.rows:
            logger.info("%s", self.stepper.screened.describe())
        if args.keep_best and self.checkpoints.best.exists():
            sae.load_state_dict(load_file(self.checkpoints.best))
        else:
            self.average.take_()
        if args.normalize_input != "none":
            fold_input_scale_(sae, self.scale)
            self.scale = torch.ones(())
        metrics = self.evaluate()
        require_finite_loss(metrics.fvu, self.step_number, self.output_dir, ADVICE)
        if metrics.fvu > 1:
            logger.warning("The SAE explains less than the mean row does: FVU %.3g. Train for longer.", metrics.fvu)
        sae.provenance = self.source.provenance
        sae.latents = sae.latent_sheet = None  # of other weights
        rows = len(self.source)
        sae.metrics = {
            "held_out" if self.held_out else "on_training_rows": dataclasses.asdict(metrics),
            "training": {"steps": self.step_number, "rows": rows, **args.to_dict()},
            "note": f"On {metrics.rows:,} rows of images that were held out of the SAE's training."
            if self.held_out
            else f"On {metrics.rows:,} rows that the SAE was trained on: none were held out.",
        }
        sae.metrics["training"].pop("output_dir")
        whole = gathered(sae)
        if whole is not None and self.processes.is_main:
            whole.save_pretrained(self.output_dir)
            write_json(self.output_dir / "training_history.json", self.logger.history)
        return SAETrainingResult(metrics, self.step_number, seconds, self.logger.history)


def train_together(trainers: Sequence[SAETrainer], *, progress: bool = True) -> list[SAETrainingResult]:
    """Train several SAEs (of other k, size, seed or kind) in one pass: each batch is read, or extracted, once.

    Each trainer keeps its own checkpoint in its own `output_dir`; a resumed run goes on from the earliest.

    Raises:
        ValueError: if the trainers do not have the same data, batch size and seed, or share an `output_dir`.
    """
    folders = {Path(trainer.args.output_dir).resolve() for trainer in trainers}
    orders = {(trainer.source.fingerprint(), trainer.processes.place) for trainer in trainers}
    if len(folders) != len(trainers) or len(orders) != 1:
        raise ValueError(
            f"{len(trainers)} trainers that train together need an output_dir each (got {len(folders)}) and the same "
            f"features, batch_size, seed, eval_fraction and shard_latents (got {len(orders)} different orders of rows)."
        )
    source, processes = trainers[0].source, trainers[0].processes
    for trainer in trainers:  # the same, and it remembers the mean that each asks for
        trainer.source = source
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(closing(source))
        for trainer in trainers:
            trainer.begin()
            stack.enter_context(closing(trainer.logger))
        last = max(trainer.max_steps for trainer in trainers)
        first = min((trainer.step_number for trainer in trainers if not trainer.done), default=last)
        hide = not progress or not processes.is_main
        with tqdm(total=last, initial=first, desc="train k-SAE", unit="step", disable=hide) as bar:
            for step in range(first, last):
                if all(trainer.done for trainer in trainers):
                    break
                bar.update()
                turn = [t for t in trainers if t.step_number == step and not t.done]
                if not turn:  # all that are not done were resumed further on
                    continue
                batch = source.batch(step, *processes.place)
                timesteps = source.timesteps_of(step, *processes.place)
                reports = [trainer.advance(batch, timesteps) for trainer in turn]
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{reports[0].loss.item():.4f}", fvu=f"{reports[0].fvu.item():.4f}")
        seconds = time.perf_counter() - started
        return [trainer.finish(seconds) for trainer in trainers]
