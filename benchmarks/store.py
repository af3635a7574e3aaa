"""Millions of rows in a feature store: memory while writing and reading, and random batches against a plain memory map.

    python benchmarks/store.py --out docs/results/store.json          # about 0.6 GB on the disk, a few minutes

Two stores of synthetic features with d = 64 in fp16: `tokens`, 64 rows an image, and `pooled`, where every row is an
image with an id and a label of its own. Each phase runs in a process of its own, so that a peak is that phase's. Peaks
are of anonymous memory, that is without the pages of mapped files, which the system drops when it needs the room; the
peak with these pages stands beside. Batches of both sides take turns; their ratio is one of medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from diffusion_sae._files import write_json
from diffusion_sae.features import FeatureStore, StoreWriter
from diffusion_sae.features.columns import StringColumn
from diffusion_sae.provenance import Provenance

KEY, WIDTH, BATCH, TOKENS = ("up_ft1", 25), 64, 4096, 64
IMAGES = {"tokens": 32_768, "pooled": 2_097_152}  # 2,097,152 rows each
SHARD_IMAGES = {"tokens": 1024, "pooled": 65_536}  # 8 MiB of features a shard


def memory(field: str) -> float:
    """MB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@contextmanager
def peaks(result: dict[str, Any]) -> Iterator[None]:
    """Growth of memory over the block, in MB: peak of anonymous memory, sampled every 5 ms, and of the resident set."""
    done, before, most = threading.Event(), memory("RssAnon"), [memory("RssAnon")]

    def sample() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], memory("RssAnon"))

    resident = memory("VmRSS")
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    result["peak_mb"] = round(most[0] - before, 1)
    result["peak_with_mapped_files_mb"] = round(memory("VmHWM") - resident, 1)


def values(kind: str, rows: range) -> torch.Tensor:
    """(images, 64) or (images, 64, 64) in fp16, from the rows' numbers alone."""
    generator = torch.Generator().manual_seed(rows.start)
    shape = (len(rows), TOKENS, WIDTH) if kind == "tokens" else (len(rows), WIDTH)
    return torch.randn(*shape, generator=generator).half()


def write(folder: Path, kind: str, images: int) -> dict[str, Any]:
    pooling = "tokens" if kind == "tokens" else "mean"
    record = Provenance(model="synthetic", layers=KEY[:1], timesteps=KEY[1:], pooling=pooling, weights="none")
    labels = np.arange(images) % 10
    result: dict[str, Any] = {"images": images}
    started = time.perf_counter()
    with peaks(result):
        writer = StoreWriter(
            folder,
            record,
            source_names=StringColumn.numbers(images),
            labels=labels,  # type: ignore[arg-type]
            class_names=None,
            shard_size=SHARD_IMAGES[kind],
            store_dtype="float16",
        )
        for number in writer.missing:
            shard, rows = writer.new_shard(), writer.part.rows(number)
            names = [str(row) for row in rows]
            shard.add({KEY: values(kind, rows)}, [f"{row:032x}" for row in rows], names, labels[rows].tolist())
            writer.write(number, shard)
        writer.finish()
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def batches(count: int, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(rows, (BATCH,), generator=generator) for _ in range(count)]


def read(folder: Path, _: str, count: int) -> dict[str, Any]:
    """Open, select, random batches."""
    result: dict[str, Any] = {}
    wanted: list[torch.Tensor] = []
    with peaks(result):
        started = time.perf_counter()
        features = FeatureStore(folder).select(*KEY)
        result["seconds_to_open"] = round(time.perf_counter() - started, 2)
        wanted = batches(count, len(features))
        for rows in wanted:
            features[rows]
    result["rows"] = len(features)
    return result


def compare(folder: Path, _: str, count: int) -> dict[str, Any]:
    """Random batches of the store and of one plain file with the same rows, in turns, as tensors in fp32."""
    features = FeatureStore(folder).select(*KEY)
    plain_file = folder.parent / "plain.bin"
    with plain_file.open("wb") as file:
        for batch in features.batches(65_536):
            file.write(batch.half().numpy().tobytes())
    plain = np.memmap(plain_file, np.float16, "r", shape=(len(features), WIDTH))

    def of_the_store(rows: torch.Tensor) -> torch.Tensor:
        return features[rows]

    def of_the_plain_map(rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(plain[rows.numpy()]).float()

    sides: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"store": of_the_store, "memmap": of_the_plain_map}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, rows in enumerate(batches(count, len(features))):
        got = {}
        for name in sides if number % 2 else reversed(sides):
            started = time.perf_counter()
            got[name] = sides[name](rows)
            seconds[name].append(time.perf_counter() - started)
        if not torch.equal(got["store"], got["memmap"]):
            raise ValueError(f"Batch {number} of the store is not that of the plain file.")
    plain_file.unlink()
    medians = {name: statistics.median(times[count // 5 :]) for name, times in seconds.items()}
    return {
        "rows_per_second": {name: round(BATCH / median) for name, median in medians.items()},
        "throughput_over_memmap": round(medians["memmap"] / medians["store"], 3),
    }


PHASES = {"write": write, "read": read, "compare": compare}


def in_a_process(phase: str, folder: Path, kind: str, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--phase", phase, str(folder), kind, str(count)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def run(kind: str, part: int, count: int) -> dict[str, Any]:
    """All phases on a store, and the peaks on one of an eighth of the images, to see what grows with them."""
    result: dict[str, Any] = {}
    for name, images in (("eighth", IMAGES[kind] // 8 // part), ("whole", IMAGES[kind] // part)):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work, "store")
            result[name] = {"write": in_a_process("write", folder, kind, images)}
            result[name]["read"] = in_a_process("read", folder, kind, count)
            result[name]["disk_mb"] = round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20, 1)
            if name == "whole":
                result |= in_a_process("compare", folder, kind, count)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--batches", type=int, default=200, help="random batches (default: 200)")
    parser.add_argument("--part", type=int, default=1, help="only one part in so many of the rows, to try it out")
    parser.add_argument("--phase", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.phase:
        phase, folder, kind, count = args.phase
        print(json.dumps(PHASES[phase](Path(folder), kind, int(count))))
        return
    result: dict[str, Any] = {"machine": machine(), "width": WIDTH, "dtype": "float16", "batch_rows": BATCH}
    print(json.dumps(result["machine"], indent=2))
    for kind in IMAGES:
        result[kind] = run(kind, args.part, args.batches)
        print(kind, json.dumps(result[kind], indent=2))
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
