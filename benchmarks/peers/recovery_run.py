"""One training on features with a known dictionary, by one contender; prints what it found as JSON.

    python benchmarks/peers/recovery_run.py '{"contender": "sparsify", "setting": [128, 1024, 2048, 8], "seed": 2,
        "learning_rate": null, "steps": 2000, "batch": 1024}'

Runs in the environment of the contender, with `src` on PYTHONPATH for the data and the measures.
"""

import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from contenders import MODULES, Learned, Recipe, Shape
from torch import Tensor

from diffusion_sae.analysis.recovery import SyntheticDictionary, recovery

PART = 8192
WINDOWS = {"65536": 8, "262144": 32}
"""Held-out rows over which a latent counts as dead if it is never active, in parts of 8,192."""


def run(request: dict[str, Any]) -> dict[str, Any]:
    d_in, num_features, num_latents, k = request["setting"]
    seed, steps, batch = request["seed"], request["steps"], request["batch"]
    truth = SyntheticDictionary(num_features=num_features, d_in=d_in, seed=seed)
    contender: Any = importlib.import_module(MODULES[request["contender"]])
    torch.manual_seed(seed)
    training = contender.build(
        Shape(batch, d_in, num_latents, k), torch.device("cpu"), Recipe(request["learning_rate"], steps)
    )
    if training.learned is None:
        raise ValueError(f"{request['contender']} learns nothing that could be measured.")
    started = time.perf_counter()
    for number in range(steps):
        training.step(truth.rows(batch, number))
    seconds = time.perf_counter() - started
    result = measure(training.learned(), truth, first_seed=steps, num_latents=num_latents)
    return request | {"version": version(contender.DISTRIBUTION), "seconds": round(seconds, 1)} | result


@torch.no_grad()
def measure(learned: Learned, truth: SyntheticDictionary, *, first_seed: int, num_latents: int) -> dict[str, Any]:
    """`explained` is over the first 65,536 held-out rows."""
    active, dead, error = torch.zeros(num_latents, dtype=torch.bool), {}, 0.0
    small: list[Tensor] = []
    for part in range(max(WINDOWS.values())):
        rows = truth.rows(PART, first_seed + part)
        codes = learned.encode(rows)
        active |= (codes != 0).any(0)
        if part < WINDOWS["65536"]:
            small.append(rows)
            error += float((learned.decode(codes) - rows).square().sum())
        dead |= {name: 1 - active.float().mean().item() for name, parts in WINDOWS.items() if part + 1 == parts}
    held_out = torch.cat(small)
    variance = float((held_out - held_out.mean(0)).square().sum())
    found = recovery(learned.W_dec.detach(), truth.directions)
    return {
        "found": round(found.found, 4),
        "mean_max_cosine": round(found.mean_max_cosine, 4),
        "dead": {name: round(share, 4) for name, share in dead.items()},
        "explained": round(1 - error / variance, 4),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come into the answer
    torch.set_num_threads(1)
    print(json.dumps(run(json.loads(sys.argv[1]))), file=answers)


if __name__ == "__main__":
    main()
