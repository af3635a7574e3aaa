"""What a sweep's plan says of time and disk, beside what the sweep then takes.

    python benchmarks/sweep_plan.py --out docs/results/sweep-plan.json    # a few minutes on two cores

The sweeps are of tiny-sd on the two embedded data sets: two layers at three timesteps, every head that a cell can have,
those that are trained in epochs for five and narrow. Fits are timed one by one; extraction is what is left of all.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from machine import command, machine

from diffusion_sae._files import write_json
from diffusion_sae.analysis.sweep import Sweep, SweepConfig
from diffusion_sae.analysis.sweep.plan import plan

HEADS = (
    "linear",
    "knn",
    "prototype",
    {"head": "mlp", "width": 256, "num_train_epochs": 5},
    {"head": "attention", "pooling": "tokens", "width": 64, "num_train_epochs": 5},
    {"head": "diff-c", "pooling": "none", "width": 64, "num_train_epochs": 5},
)
LABELS = {"fashion-mnist-mini": ("label",), "emoji-mini": ("group", "subgroup")}


def compare(dataset: str, images: int, folder: Path) -> dict[str, Any]:
    """{what: {planned, taken, ratio}} in seconds, of the disk in bytes."""
    config = SweepConfig(
        output_dir=str(folder),
        dataset=dataset,
        layers=("bottleneck", "up_ft2"),
        timesteps=(0, 100, 500),
        labels=LABELS[dataset],
        heads=HEADS,
        seeds=(0, 1, 2),
        baselines=(),
        limit=images,
    )
    planned = plan(config)
    started = time.perf_counter()
    Sweep(config).run()
    whole = time.perf_counter() - started
    table = pq.read_table(folder / "results.parquet")
    fits: Counter[str] = Counter()
    for head, seconds in zip(table["head"].to_pylist(), table["seconds"].to_pylist(), strict=True):
        fits[head] += seconds
    pairs = {f"fits: {head}": (planned["fit_seconds"][head], seconds) for head, seconds in fits.items()}
    pairs["extraction"] = (planned["extraction_seconds"], whole - fits.total())
    disk = sum(path.stat().st_size for path in (folder / "features").rglob("*.safetensors"))
    pairs["disk"] = (planned["disk_bytes"], disk)
    return {
        name: {"planned": round(expected, 2), "taken": round(taken, 2), "ratio": round(taken / expected, 2)}
        for name, (expected, taken) in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="of each split (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/sweep-plan.json"))
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine() | {"command": command()}, "images": args.images, "datasets": {}}
    for dataset in LABELS:
        with tempfile.TemporaryDirectory() as folder:
            results["datasets"][dataset] = compare(dataset, args.images, Path(folder))
        for name, one in results["datasets"][dataset].items():
            print(f"{dataset:20}{name:18}{one['planned']:>14}{one['taken']:>14}{one['ratio']:>8}", flush=True)
        write_json(args.out, results)


if __name__ == "__main__":
    main()
