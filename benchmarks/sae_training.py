"""One training step of a TopK SAE: ours, that of other libraries, and the least that one in fp32 must do.

    python benchmarks/sae_training.py --out docs/results/sae-training-speed.json    # about 45 minutes on two cores
    python benchmarks/sae_training.py --shapes 4096,320,5120,32 --contenders ours sparsify limit --out /tmp/trial.json

A step is everything from a batch to the next weights in fp32: forward, the library's own loss of reconstruction without
AuxK, backward, what its own recipe does to the gradients (clipping, in ours, too), Adam, renormalisation of the
decoder. Each contender is the released package in an environment that is made once (peers/environment.py), in a process
of its own, and gets the same seeded batches. Only one works at a time: a round is one step of each, so that a
disturbance meets all of them; the first step of each is not counted. Where they do not fit into memory together, each
is built, steps once uncounted and once counted, and is freed again, in every round. Times are medians over the rounds.
`limit` is one product of the encoder in fp32 and one fused pass of Adam; ours can take less, where the processor has
bf16, and `ours-fp32` is what it takes where not. Peak memory is of our step alone, in a fresh process with all it has
imported and one batch.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import command, machine

from diffusion_sae._files import read_json, write_json

sys.path.insert(0, str(Path(__file__).with_name("peers")))
from client import Client
from contenders import MODULES, OURS, PEERS, Shape

SHAPES = ("4096,1280,20480,32", "1024,1280,81920,32", "4096,320,5120,32", "8192,640,10240,32")
TARGETS_AT_1280 = {"sparsify": 1.4, "sae-lens": 4.0, "dictionary-learning": 4.0, "revelio": 4.0}
LIMIT_TARGET = 1.35
MEMORY_SHAPES = ("1024,1280,81920,32", "8192,1280,81920,32", "65536,1280,81920,32")
IMPORTS_GB = 0.6  # a process with PyTorch, transformers and a peer


def fit_together(shape: Shape, contenders: Sequence[str], device: str) -> bool:
    """Whether all can keep their weights and moments, by an estimate of what one needs beside them at work."""
    weights = shape.weight_bytes()
    dense = 4 * shape.rows * shape.num_latents
    gathered = 4 * shape.rows * shape.k * shape.d_in
    working = 8 * dense + 2 * gathered + 2 * weights
    held = 3 * weights * len(contenders) + weights  # the limit keeps its gradients
    if device.startswith("cuda"):
        return held + working < 0.9 * torch.cuda.mem_get_info()[0]
    return held + working + IMPORTS_GB * 2**30 * len(contenders) < 0.9 * psutil.virtual_memory().available


def measure(shape: Shape, clients: Sequence[Client], rounds: int, device: str) -> tuple[bool, dict[str, Any]]:
    """Seconds and losses of all contenders; whether they stayed in memory together."""
    together = fit_together(shape, [client.name for client in clients], device)
    steps: dict[str, list[dict[str, float]]] = {client.name: [] for client in clients}
    if together:
        for client in clients:
            client.setup(shape, device)
    for _ in range(rounds):
        for client in clients:
            if not together:
                client.setup(shape, device)
            steps[client.name].append(client.ask("step"))
            if not together:
                client.ask("free")
    for client in clients:
        client.ask("free")
    return together, {client.name: summary(client, steps[client.name]) for client in clients}


def summary(client: Client, steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    losses = [client.about["first_loss"], *(step["loss"] for step in steps)]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"{client.name} diverged, its losses are {losses}; its times mean nothing.")
    seconds = [step["seconds"] for step in steps]
    return {
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def same_data(clients: Sequence[Client]) -> None:
    sums = {client.name: client.about["data"] for client in clients}
    if len(set(sums.values())) > 1:
        raise ValueError(f"The contenders have different data; sums of the first batch: {sums}")


def compare(shape: Shape, results: dict[str, Any]) -> dict[str, Any]:
    """Ratios with their targets: how many times faster ours is than a peer, and ours over the limit."""
    times = {name: result["median_seconds"] for name, result in results.items()}
    if "ours" not in times:
        return {}
    ratios: dict[str, Any] = {}
    for name in (name for name in PEERS if name in times):
        target = TARGETS_AT_1280.get(name, 1.0) if shape.d_in == 1280 else 1.0
        ratio = times[name] / times["ours"]
        ratios[f"{name} / ours"] = {"ratio": ratio, "at_least": target, "met": ratio >= target and ratio > 1}
    for name in OURS if "limit" in times else ():
        if name in times:
            ratio = times[name] / times["limit"]
            ratios[f"{name} / limit"] = {"ratio": ratio, "at_most": LIMIT_TARGET, "met": ratio <= LIMIT_TARGET}
    return ratios


def print_table(shape: Shape, together: bool, results: dict[str, Any], ratios: dict[str, Any]) -> None:
    times = {name: result["median_seconds"] for name, result in results.items()}
    kept = "kept in memory together" if together else "built anew in every round"
    print(f"\nrows, d_in, num_latents, k = {shape} ({kept})")
    print(f"{'contender':22}{'seconds':>9}{'over limit':>12}{'over ours':>11}  target")
    for name, time in sorted(times.items(), key=lambda item: item[1]):
        over_limit = f"{time / times['limit']:.2f}" if "limit" in times else ""
        over_ours = f"{time / times['ours']:.2f}" if "ours" in times else ""
        row = ratios.get(f"{name} / limit" if name in OURS else f"{name} / ours", {})
        bound = f"over limit ≤ {row['at_most']}" if "at_most" in row else f"≥ {row['at_least']}" if row else ""
        verdict = ("" if row["met"] else "   MISSED") if row else ""
        print(f"{name:22}{time:9.3f}{over_limit:>12}{over_ours:>11}  {bound}{verdict}", flush=True)


def peak_memory(shape: Shape, device: str) -> dict[str, Any]:
    """Our peak over two steps in a fresh process, against weights, two moments and 1 GB."""
    client = Client("ours")
    client.setup(shape, device)
    client.ask("step")
    peak = client.ask("peak")["peak_mb"]
    client.close()
    allowed = 3 * shape.weight_bytes() / 2**20 + 1e9 / 2**20
    return {
        "peak_mb": peak,
        "imported_mb": client.about["imported_mb"],
        "weights_mb": shape.weight_bytes() / 2**20,
        "at_most_mb": allowed,
        "met": peak <= allowed,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = "ROWS,D_IN,NUM_LATENTS,K"
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar=shape, help="none: memory alone")
    parser.add_argument("--contenders", nargs="+", default=list(MODULES), choices=list(MODULES))
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each contender (default: 5)")
    parser.add_argument("--memory-shapes", nargs="*", default=MEMORY_SHAPES, metavar=shape, help="none: no memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--profile", type=Path, help="JSON file for the operators of one step of ours; then nothing else is measured"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/results/sae-training-speed.json"),
        help="JSON; shapes that it holds already and that are not asked for stay (default: %(default)s)",
    )
    return parser.parse_args()


def profile(shapes: Sequence[str], device: str, out: Path) -> None:
    """Seconds of each operator of one step, without those that it called."""
    results: dict[str, Any] = {"machine": machine() | {"command": command()}, "shapes": {}}
    for text in shapes:
        client = Client("ours")
        client.setup(Shape.parse(text), device)
        parts = client.ask("profile")["parts"]
        client.close()
        print(f"\nrows, d_in, num_latents, k = {text}")
        for name, seconds in sorted(parts.items(), key=lambda item: -item[1])[:20]:
            print(f"{name:48}{seconds:9.4f} s{seconds / sum(parts.values()):8.1%}")
        kept = {name: round(seconds, 5) for name, seconds in sorted(parts.items()) if seconds > 0}
        results["shapes"][text] = {"parts": kept}
        write_json(out, results)


def main() -> None:
    args = parse_arguments()
    if args.profile is not None:
        profile(args.shapes, args.device, args.profile)
        return
    results: dict[str, Any] = {"shapes": {}, "memory": {}, "contenders": {}}
    if args.out.is_file():
        results = read_json(args.out)
    here = machine() | {"rounds": args.rounds, "device": args.device, "command": command()}
    print(json.dumps(here), flush=True)
    with ExitStack() as stack:
        clients = [Client(name) for name in args.contenders] if args.shapes else []
        for client in clients:
            stack.callback(client.close)
        for text in args.shapes:
            shape = Shape.parse(text)
            together, times = measure(shape, clients, args.rounds, args.device)
            same_data(clients)
            ratios = compare(shape, times)
            print_table(shape, together, times, ratios)
            results["shapes"][text] = {
                "machine": here,
                "kept_together": together,
                "contenders": times,
                "ratios": ratios,
            }
            for client in clients:
                kept = ("version", "comprises", "torch", "threads")
                results["contenders"][client.name] = {key: client.about[key] for key in kept}
            write_json(args.out, results)
    for text in args.memory_shapes if "ours" in args.contenders else ():
        memory = peak_memory(Shape.parse(text), args.device)
        print(f"\npeak memory at {text}: {memory['peak_mb']:.0f} MB, at most {memory['at_most_mb']:.0f}", flush=True)
        results["memory"][text] = {"machine": here, **memory}
        write_json(args.out, results)


if __name__ == "__main__":
    main()
