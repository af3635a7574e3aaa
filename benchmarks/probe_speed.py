"""Linear probes over 25 (layer, timestep) cells × 5 seeds on 10,000 × 1280 features, beside scikit-learn.

    python benchmarks/probe_speed.py --out docs/results/probe-speed.json          # a few minutes on two cores

The features are synthetic: correlated, with a spectrum that falls as a power, classes that overlap, and a share of it
that differs from cell to cell. A fit is a path of five L2 strengths, of which 2,000 validation rows choose one; a seed
draws the 90 % of the rows that are fitted on. scikit-learn's LogisticRegression, as it comes but for max_iter, fits the
same path for one seed of a few cells, warm-started from strength to strength; its time for all is that of these fits
times their number. Both are measured on 4,000 further rows. Times are of the clock, with those of the processor beside:
a machine that does other things gives a longer first.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin would count as work

import torch
from machine import command, machine
from sklearn.linear_model import LogisticRegression

from diffusion_sae._files import write_json
from diffusion_sae.probes.logistic import moments
from diffusion_sae.probes.subsets import SubsetFit, fit_subsets

Part = tuple[torch.Tensor, torch.Tensor]

ROWS, WIDTH, CLASSES, CELLS, SEEDS = 10_000, 1280, 10, 25, 5
VALIDATION, TEST = 2000, 4000
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
TARGET_SECONDS = 60


def draw(cell: int, classes: int, rows: int, width: int) -> dict[str, Part]:
    generator = torch.Generator().manual_seed(cell)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scales = torch.arange(1, width + 1) ** -0.6
    centres = (0.08 + 0.002 * cell) * torch.randn(classes, width, generator=generator) * scales
    count = rows + VALIDATION + TEST
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = (centres[labels] + torch.randn(count, width, generator=generator) * scales) @ turn
    features = features + 0.3 * features.relu()  # a network's features are not symmetric
    cuts = {
        "train": slice(0, rows),
        "validation": slice(rows, rows + VALIDATION),
        "test": slice(rows + VALIDATION, count),
    }
    return {name: (features[part], labels[part]) for name, part in cuts.items()}


def subsets(rows: int, seeds: int) -> torch.Tensor:
    chosen = torch.zeros(seeds, rows, dtype=torch.bool)
    for seed in range(seeds):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        chosen[seed, order[: round(0.9 * rows)]] = True
    return chosen


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def ours(data: dict[str, Part], chosen: torch.Tensor, classes: int) -> tuple[list[SubsetFit], dict[str, float]]:
    clock, processor = time.perf_counter(), time.process_time()
    fits = fit_subsets(*data["train"], chosen, data["validation"], num_labels=classes, strengths=STRENGTHS)
    tests = [accuracy(fit.logits(data["test"][0]), data["test"][1]) for fit in fits]
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    return fits, seconds | {"test_accuracy": tests[0]}


def scikit_learn(data: dict[str, Part], subset: torch.Tensor) -> dict[str, float]:
    """One seed: the path, the choice on validation, and one measure on test rows."""
    rows, labels = data["train"][0][subset], data["train"][1][subset].numpy()
    clock, processor = time.perf_counter(), time.process_time()
    mean, std = (value.float() for value in moments(rows))
    scaled = {name: ((data[name][0] - mean) / std).numpy() for name in ("validation", "test")}
    standardised = ((rows - mean) / std).numpy()
    best = (-1.0, 0.0, 0.0)
    model = LogisticRegression(max_iter=1000, warm_start=True)
    for l2 in STRENGTHS:
        model.set_params(C=1 / (len(rows) * l2)).fit(standardised, labels)
        score = model.score(scaled["validation"], data["validation"][1].numpy())
        if score > best[0]:
            best = (float(score), l2, float(model.score(scaled["test"], data["test"][1].numpy())))
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    return seconds | {"test_accuracy": best[2], "l2": best[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--cells", type=int, default=CELLS)
    parser.add_argument("--compared", type=int, default=3, help="cells that scikit-learn fits as well (default: 3)")
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"machine": machine(), "command": command()}
    result |= {"cells": args.cells, "seeds": SEEDS, "rows": args.rows, "width": args.width, "classes": args.classes}
    result["strengths"] = STRENGTHS
    chosen, totals, compared = subsets(args.rows, SEEDS), {"seconds": 0.0, "processor_seconds": 0.0}, []
    every = max(1, args.cells // args.compared)
    for cell in range(args.cells):
        data = draw(cell, args.classes, args.rows, args.width)
        fits, mine = ours(data, chosen, args.classes)
        totals = {name: value + mine[name] for name, value in totals.items()}
        line = {"cell": cell, "ours": mine | {"l2": fits[0].solution.l2}}
        if cell % every == 0 and len(compared) < args.compared:
            line["scikit_learn"] = scikit_learn(data, chosen[0])
            compared.append(line)
        print(json.dumps(line), flush=True)
    fits = args.cells * SEEDS
    theirs = sum(line["scikit_learn"]["seconds"] for line in compared) / len(compared) * fits
    result["ours"] = {name: round(value, 1) for name, value in totals.items()} | {"fits": fits}
    result["target_seconds"] = TARGET_SECONDS
    result["scikit_learn_seconds_for_all"] = round(theirs, 1)
    result["ratio"] = round(theirs / totals["seconds"], 1)
    result["compared"] = compared
    gains = [line["ours"]["test_accuracy"] - line["scikit_learn"]["test_accuracy"] for line in compared]
    result["worst_accuracy_difference"] = min(gains)
    print(json.dumps({name: value for name, value in result.items() if name != "compared"}, indent=2))
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
