"""Heads that are fitted whole, once for each of several settings, of which validation chooses one."""

import copy
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._training import MetricsLogger, require_finite_loss
from .convex import Design, minimise_l1, minimise_l2, smallest_l1
from .logistic import logistic_path
from .results import ProbeTrainingResult
from .run import Run
from .tasks import SingleLabel


def choose(run: Run, name: str, candidates: Iterable[float], fit: Callable[[Any], float | None]) -> ProbeTrainingResult:
    """`fit` the head for each candidate and keep what is best on validation; of equals the first.

    `name`: what the candidates are; empty where there is nothing to choose.
    """
    head, best = run.probe.head, None
    bar = tqdm(list(candidates), desc="probe", disable=not run.progress)
    with closing(MetricsLogger(run.report_to, run.output_dir, run.args.to_dict())) as logger, bar:
        for step, candidate in enumerate(bar):
            loss = fit(candidate)
            if loss is not None:
                require_finite_loss(loss, step, run.output_dir, "Check the scale of the features.", head)
            metrics = run.validate()
            said = ({name: candidate} if name else {}) | ({} if loss is None else {"loss": loss})
            logger.log(step, run.metrics_line(metrics, **said))
            if best is None or metrics.better_than(best[0]):
                best = (metrics, candidate, copy.deepcopy(head.state_dict()))
    assert best is not None  # no path is ever empty
    head.load_state_dict(best[2])
    return ProbeTrainingResult(best[0], {name: best[1]} if name else {}, logger.history)


def fit_lbfgs(run: Run) -> ProbeTrainingResult:
    """One convex problem an L2 strength, warm-started from strong to weak."""
    head, labels = run.probe.head, run.training_labels()
    classifier, strengths = head.classifier, sorted(run.args.l2_path, reverse=True)
    if head.name == "linear" and isinstance(run.probe.task, SingleLabel) and run.class_weights is None:
        rows = torch.cat(list(run.batches()))  # type: ignore[arg-type]
        path = logistic_path(rows, labels, run.probe.config.num_labels, strengths)

        @torch.no_grad()
        def next_solution(_: float) -> float:
            solution = next(path)
            classifier.weight.copy_(solution.weight[0])
            classifier.bias.copy_(solution.bias[0])
            return solution.loss.item()

        return choose(run, "l2", strengths, next_solution)
    design = Design.of(run)

    def fit(l2: float) -> float:
        start = design.scaled(classifier)
        weight, bias, loss = minimise_l2(design, lambda logits: run.losses(logits, labels).mean(), *start, l2)
        design.write(classifier, weight, bias)
        return loss

    return choose(run, "l2", strengths, fit)


def fit_fista(run: Run) -> ProbeTrainingResult:
    """One convex problem an L1 strength, as a fraction of the smallest at which every weight is 0; from there down."""
    design, labels = Design.of(run), run.training_labels()
    classifier = run.probe.head.classifier

    def loss_of(logits: Tensor) -> Tensor:
        return run.losses(logits, labels).mean()

    largest = smallest_l1(design, loss_of, *design.scaled(classifier))

    def fit(fraction: float) -> float:
        start = design.scaled(classifier)
        weight, bias, loss = minimise_l1(design, loss_of, *start, fraction * largest)
        design.write(classifier, weight, bias)
        return loss

    result = choose(run, "l1", sorted(run.args.l1_path, reverse=True), fit)
    active = int((classifier.weight != 0).any(0).sum())
    return ProbeTrainingResult(result.validation, {**result.chosen, "active_weights": active}, result.history)


@torch.no_grad()
def fit_memory(run: Run) -> ProbeTrainingResult:
    """The training rows are taken in; of knn the number of neighbours is chosen, unless the config fixes it."""
    head, config = run.probe.head, run.probe.config
    head.remember(torch.cat(list(run.batches())), run.labels[run.rows])  # type: ignore[arg-type]
    if head.name != "knn":
        return choose(run, "", [0], lambda _: None)
    wanted = run.args.neighbors_path if config.num_neighbors is None else (config.num_neighbors,)

    def fit(neighbors: int) -> None:
        config.num_neighbors = neighbors

    # more neighbours than rows are all rows
    result = choose(run, "num_neighbors", sorted({min(k, len(run.rows)) for k in wanted}), fit)
    config.num_neighbors = int(result.chosen["num_neighbors"])
    return result
