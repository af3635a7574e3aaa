"""Training by AdamW, epoch by epoch: Revelio's recipe."""

import math
from contextlib import closing

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._training import MetricsLogger, load_checkpoint, require_finite_loss, save_checkpoint
from ..features.order import epoch_order, generator_of
from .modeling import DiffusionProbe
from .results import ProbeMetrics, ProbeTrainingResult
from .run import Run
from .targets import TargetUnits
from .training_args import ProbeTrainingArguments


def fit_adamw(run: Run) -> ProbeTrainingResult:
    """The epoch that is best on validation; an epoch is the unit of resuming.

    Of several processes each computes a share of every batch; the main one validates and writes. Of a regression the
    logged training loss is in units of the targets' variance.
    """
    args, probe, processes = run.args, run.probe, run.processes
    units = TargetUnits.of(run)
    run = units.taken_by(run)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    best = {name: value.clone() for name, value in probe.state_dict().items()}
    # epochs done; best score, loss, epoch
    state = torch.tensor([0.0, -math.inf, math.inf, -1.0], dtype=torch.float64)
    logger = MetricsLogger(run.report_to, run.output_dir, args.to_dict())
    with processes.together():
        extra = load_checkpoint(run.output_dir, probe, optimizer, run=run.name, history=logger.history)
    if extra is not None:
        state = extra.pop("state")
        best = {name.removeprefix("best."): value for name, value in extra.items()}
    epochs = range(int(state[0]), args.num_train_epochs)
    with closing(logger), tqdm(epochs, desc="probe", unit="epoch", disable=not run.progress) as bar:
        for epoch in bar:
            if _is_patience_over(run, state):
                break
            cosine = 0.5 * (1 + math.cos(math.pi * epoch / args.cosine_epochs))
            optimizer.param_groups[0]["lr"] = args.learning_rate * cosine
            loss = _epoch(run, epoch, optimizer)
            with units.folded(probe.head.classifier):
                metrics = processes.from_main(run.validate)
            for value in (loss, metrics.loss):
                require_finite_loss(value, epoch, run.output_dir, "Lower learning_rate.")
            logger.log(epoch, run.metrics_line(metrics, loss=loss))
            state[0] = epoch + 1
            if (metrics.score, -metrics.loss) > (state[1].item(), -state[2].item()):
                state[1:] = torch.tensor([metrics.score, metrics.loss, epoch], dtype=torch.float64)
                best = {name: value.clone() for name, value in probe.state_dict().items()}
            extra = {"state": state, **{f"best.{name}": value for name, value in best.items()}}
            if processes.is_main:
                save_checkpoint(run.output_dir, probe, optimizer, extra, run=run.name, history=logger.history)
    probe.load_state_dict(best)
    units.fold_(probe.head.classifier)
    return ProbeTrainingResult(_best_metrics(run, int(state[3]), logger), {"epoch": state[3].item()}, logger.history)


def require_trainable(probe: DiffusionProbe, args: ProbeTrainingArguments) -> None:
    """Raise ValueError for batches of one row with a head that has batch statistics, and for fp16 weights."""
    head, dtype = probe.head, probe.dtype
    if args.batch_size == 1 and has_batch_statistics(head):
        raise ValueError(
            f"The head {head.name} has BatchNorm, which cannot learn from the statistics of a single row, got "
            "batch_size=1. Use a batch_size ≥ 2."
        )
    if dtype == torch.float16:  # AdamW's eps of 1e-8 is 0 there: without gradient the step is 0 / 0
        raise ValueError(
            "adamw cannot train weights of torch.float16, whose steps become NaN or infinite at any learning_rate. "
            "Call probe.float() before the training, with bf16=True to compute in half precision."
        )


def has_batch_statistics(head: nn.Module) -> bool:
    """Whether rows of a batch are normalised by one another in training."""
    return any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in head.modules())


def _is_patience_over(run: Run, state: Tensor) -> bool:
    """Whether so many epochs have passed since the best one; also asked when a run goes on that had stopped."""
    patience = run.args.early_stopping_patience
    done, best = int(state[0]), int(state[3])
    return patience is not None and done - 1 - best >= patience


def _best_metrics(run: Run, epoch: int, logger: MetricsLogger) -> ProbeMetrics:
    """From the log: measured again the numbers could differ in their last bits."""
    entry = logger.history[epoch]
    values = {name: value for name, value in entry.items() if name not in ("step", "loss", "validation_loss")}
    task = run.probe.task
    metric = task.balanced_metric if run.balanced else task.metric
    return ProbeMetrics(values, entry["validation_loss"], len(run.validation[1]), metric)


def _epoch(run: Run, epoch: int, optimizer: torch.optim.Optimizer) -> float:
    """One pass in the order of (seed, epoch); the dropout's random state is forked: no one else's changes."""
    probe, args, total, seen = run.probe, run.args, 0.0, 0
    order = _order(run, epoch)
    leaves_single_row_out = len(order) > 1 and has_batch_statistics(probe.head)
    devices = [probe.device] if probe.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(args.seed * 1_000_003 + epoch)
        probe.train()
        for numbers in order.split(args.batch_size):
            if len(numbers) == 1 and leaves_single_row_out:
                continue  # BatchNorm cannot learn from a single row
            loss = _gradient(run, numbers, epoch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, seen = total + loss * len(numbers), seen + len(numbers)
    return run.processes.summed(total) / seen


def _gradient(run: Run, numbers: Tensor, epoch: int) -> float:
    """Of the mean loss of a batch; returns this process's part of the loss."""
    device = run.probe.device
    with run.processes.share_of_batch(numbers) as (mine, weight):
        batch = run.step_batch(mine, epoch)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.args.bf16):
            logits = run.probe(features=batch).logits
        loss = run.losses(logits.float(), run.labels[mine].to(device)).mean() * weight
        loss.backward()
    run.processes.sum_gradients(run.probe)
    return loss.item()


def _order(run: Run, epoch: int) -> Tensor:
    """Numbers of the examples of an epoch: a permutation, or balanced, drawn with the same chance for each class."""
    count, seed = len(run.rows), run.args.seed
    if not run.args.balanced_sampling:
        return run.rows[epoch_order(count, seed=seed, epoch=epoch)]
    labels = run.labels[run.rows]
    chance = 1 / torch.bincount(labels).double()[labels]
    drawn = torch.multinomial(chance, count, replacement=True, generator=generator_of(seed=seed, epoch=epoch))
    return run.rows[drawn]
