"""One contender in one process: reads a JSON object a line on stdin, answers with one a line.

    python benchmarks/peers/worker.py sparsify

`{"do": "setup", "shape": [rows, d_in, num_latents, k], "device": "cpu"}`, then `{"do": "step"}` any number of times,
`{"do": "profile"}` for a step's operators, `{"do": "free"}` to give the memory back, `{"do": "peak"}` for the most
memory so far. The end of stdin ends it.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contenders import MODULES, Shape, batch_of
from torch import Tensor


def status_mb(field: str) -> float:
    """A line of /proc/self/status. Not getrusage: a child's ru_maxrss begins at its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class Worker:
    def __init__(self, name: str) -> None:
        self.contender: Any = importlib.import_module(MODULES[name])
        self.step: Callable[[Tensor], float] | None = None
        self.shape = Shape(1, 1, 1, 1)
        self.device = torch.device("cpu")
        self.number = 0

    def do_setup(self, request: dict[str, Any]) -> dict[str, Any]:
        self.shape, self.device, self.number = Shape(*request["shape"]), torch.device(request["device"]), 0
        imported = status_mb("VmRSS")
        torch.manual_seed(0)
        self.step = self.contender.build(self.shape, self.device).step
        return {
            "version": version(self.contender.DISTRIBUTION),
            "comprises": self.contender.COMPRISES,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "data": batch_of(self.shape, 0, self.device).sum().item(),
            "imported_mb": imported,
        }

    def prepared(self) -> tuple[Callable[[Tensor], float], Tensor]:
        """The step and its next batch, which is made outside of the time."""
        if self.step is None:
            raise RuntimeError("step before setup")
        batch = batch_of(self.shape, self.number, self.device)
        self.number += 1
        self.synchronize()
        return self.step, batch

    def do_step(self, _: dict[str, Any]) -> dict[str, Any]:
        step, batch = self.prepared()
        started = time.perf_counter()
        loss = step(batch)
        self.synchronize()
        return {"seconds": time.perf_counter() - started, "loss": loss}

    def do_profile(self, _: dict[str, Any]) -> dict[str, Any]:
        """Seconds that each operator of a step took itself, without those that it called."""
        step, batch = self.prepared()
        with torch.profiler.profile() as record:
            step(batch)
            self.synchronize()
        events = record.key_averages()
        cuda = self.device.type == "cuda"
        return {"parts": {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6 for e in events}}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def do_free(self, _: dict[str, Any]) -> dict[str, Any]:
        self.step = None
        gc.collect()
        return {}

    def do_peak(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"peak_mb": status_mb("VmHWM")}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, f"do_{request['do']}")(request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
