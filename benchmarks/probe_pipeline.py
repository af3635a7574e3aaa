"""Throughput of `pipeline("diffusion-probe")` beside its parts called directly: extractor, head, softmax, labels.

    python benchmarks/probe_pipeline.py --out docs/results/probe-pipeline.json     # two minutes on two cores

The embedded model is the hardest case: its forward takes so little that what stands around it shows most. Both ways get
the same PIL images and answer the same; they take turns, and the ratio is the median over rounds of the pipeline's time
by that of the parts right before it. Of the clock, and of the processor, which other work on the machine changes less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from PIL import Image
from transformers import pipeline

from diffusion_sae._files import write_json
from diffusion_sae.extraction.sources import open_images

TARGET = 1.05


def directly(classify: Any, images: list[Image.Image], batch_size: int) -> list[list[dict[str, Any]]]:
    probe = classify.model
    answers = []
    for start in range(0, len(images), batch_size):
        (features,) = probe.extractor(images[start : start + batch_size]).values()
        with torch.no_grad():
            scores = probe(features=features).logits.softmax(1)
        for row in scores.tolist():
            labelled = [{"label": probe.config.id2label[i], "score": score} for i, score in enumerate(row)]
            answers.append(sorted(labelled, key=lambda entry: -entry["score"])[:5])
    return answers


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - clock, time.process_time() - processor


def compare(classify: Any, images: list[Image.Image], batch_size: int, rounds: int) -> dict[str, Any]:
    ways = {
        "parts": lambda: directly(classify, images, batch_size),
        "pipeline": lambda: classify(images, batch_size=batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    answers = {name: call() for name, call in ways.items()}  # a first round that is not counted
    for one, other in zip(answers["parts"], answers["pipeline"], strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(one, other, strict=True))
    for number in range(rounds):
        for name in sorted(ways, reverse=number % 2 == 1):
            _, clock, cpu = timed(ways[name])
            seconds[name].append(clock)
            processor[name].append(cpu)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "batch_size": batch_size,
        "images": len(images),
        "images_a_second": {name: round(len(images) / value, 1) for name, value in median.items()},
        "ratio": round(_ratio(seconds), 3),
        "processor_ratio": round(_ratio(processor), 3),
    }


def _ratio(taken: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(taken["pipeline"], taken["parts"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = open_images("fashion-mnist-mini", "test").first(args.images)
    images = [source.read(i) for i in range(len(source))]
    classify = pipeline("diffusion-probe")
    result: dict[str, Any] = {"machine": machine(), "command": command()}
    result |= {"rounds": args.rounds, "target_ratio": TARGET}
    # fewer images where each takes longer
    parts = {32: images, 8: images[: len(images) // 2], 1: images[: len(images) // 8]}
    result["cells"] = [compare(classify, some, batch_size, args.rounds) for batch_size, some in parts.items()]
    print(json.dumps(result, indent=2))
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
