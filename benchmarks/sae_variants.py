"""A training step as it is, with `torch.compile` and in bf16, for each activation, beside that of topk.

    python benchmarks/sae_variants.py --out docs/results/sae-variants.json
    python benchmarks/sae_variants.py --shape 512,64,512,8 --rounds 1       # a trial

The steps of a shape take turns; ratios are of medians. `torch.compile` needs a C++ compiler. It compiles the forward
pass, whose own operators it leaves as they are, and with it the backward pass.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import command, machine

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainingArguments
from diffusion_sae._files import write_json
from diffusion_sae.sae.step import TrainingStep

SHAPES = ("4096,320,5120,32", "1024,1280,20480,32")
HALF = ", half active"
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", f"jumprelu{HALF}", "relu", f"relu{HALF}")
"""Of relu and jumprelu half of the latents are active at the start of a training; otherwise k of a row here."""
WAYS = ("as it is", "compiled", "bf16")


def make(activation: str, way: str, shape: tuple[int, ...]) -> Callable[[], None]:
    rows, d_in, num_latents, k = shape
    config = KSparseAutoencoderConfig(
        d_in=d_in, num_latents=num_latents, k=k, activation=activation.removesuffix(HALF), jumprelu_bandwidth=0.01
    )
    sae = KSparseAutoencoder(config)
    batch = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        few = sae.pre_acts(batch[:64]).quantile(1 - k / num_latents).item()
        if activation == "jumprelu":
            sae.log_threshold.fill_(math.log(few))
        elif activation == "relu":
            sae.b_enc.fill_(-few)
    if way == "compiled":
        sae.forward = torch.compile(sae.forward)
    args = SAETrainingArguments(output_dir="unused", bf16=way == "bf16", max_grad_norm=None)
    step = TrainingStep(sae, args)
    return lambda: step(batch, 1e-7) and None  # by which the number of active latents stays


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step by activation and way."""
    medians: dict[str, dict[str, float]] = {}
    for activation in ACTIVATIONS:
        steps = {way: make(activation, way, shape) for way in WAYS}
        for step in steps.values():
            for _ in range(3):  # compiles, and touches the memory
                step()
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, step in steps.items():
                step()  # the memory for scores is kept for one type: after a step in bf16 that of fp32 is new
                started = time.perf_counter()
                step()
                seconds[way].append(time.perf_counter() - started)
        medians[activation] = {way: statistics.median(times) for way, times in seconds.items()}
        print(shape, activation, {way: round(one, 4) for way, one in medians[activation].items()})
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", help="rows,d_in,num_latents,k; may be given again")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"command": command(), "machine": machine(), "rounds": args.rounds, "shapes": {}}
    for name in args.shape or SHAPES:
        medians = measure(tuple(map(int, name.split(","))), args.rounds)
        result["shapes"][name] = {
            "seconds": {a: {way: round(one, 5) for way, one in ways.items()} for a, ways in medians.items()},
            "over_as_it_is": {
                a: {way: round(ways[way] / ways["as it is"], 3) for way in WAYS[1:]} for a, ways in medians.items()
            },
            "over_topk": {a: round(ways["as it is"] / medians["topk"]["as it is"], 3) for a, ways in medians.items()},
        }
    print(json.dumps(result["shapes"], indent=2))
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
