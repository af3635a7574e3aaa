"""What extraction costs beside what it cannot avoid: ratios measured side by side in one run.

    python benchmarks/extraction.py --out docs/results/extraction-speed.json    # ten minutes on two cores
    python benchmarks/extraction.py --models tiny-sd --measures overhead sweep  # some of it

Each ratio is a median over rounds in which its two sides take turns. `sd15` is the true architecture with random
weights at 512 px (the sweep at 256 px) in fp32. A target is printed beside its ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# as the command line: of two cores, those that wait for others by spinning are taken from the decoding of images
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from machine import command, machine
from PIL import Image
from torch import Tensor

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae._files import write_json
from diffusion_sae.extraction.images import image_id
from diffusion_sae.extraction.reading import Reading
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.provenance import ExtractorConfig

LAYERS = ("down_ft2", "bottleneck", "up_ft0", "up_ft1", "up_ft2")
TIMESTEPS = (10, 25, 50, 100, 200)
SIZES = {  # images a batch, rounds, rounds of the slowest comparison
    "tiny-sd": (32, 15, 5),
    "sd15": (1, 3, 1),
}


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def medians(rounds: int, **sides: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each side; they take turns, so that a disturbance meets all of them.

    A single round has no warm-up: its sides take long enough that one does not matter.
    """
    for call in sides.values() if rounds > 1 else ():
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


@cache
def sd15_pipeline() -> Any:
    from diffusion_sae.extraction.published import build_published

    return build_published("stable-diffusion-v1-5/stable-diffusion-v1-5")


def make_extractor(
    model: str, layers: tuple[str, ...], timesteps: tuple[int, ...], image_size: int | None = None
) -> DiffusionFeatureExtractor:
    if model == "sd15":
        config = ExtractorConfig(model=model, layers=layers, timesteps=timesteps, image_size=image_size)
        return DiffusionFeatureExtractor(sd15_pipeline(), config)
    return DiffusionFeatureExtractor.from_pretrained(model, layers=layers, timesteps=timesteps)


def random_pixels(extractor: DiffusionFeatureExtractor, count: int) -> Tensor:
    side = extractor.backbone.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return torch.from_numpy(pixels).float() / 127.5 - 1


def modules_until(unet: Any, sample: Tensor, timestep: int, states: Tensor, last_up: int) -> Tensor:
    """The U-Net's own modules called by hand, up to `up_blocks[last_up]`, or to the mid block with −1."""
    time = torch.full((len(sample),), timestep, device=sample.device)
    embedding = unet.time_embedding(unet.time_proj(time).to(sample.dtype))
    hidden = unet.conv_in(sample)
    skips = (hidden,)
    for block in unet.down_blocks:
        crossing = {"encoder_hidden_states": states} if hasattr(block, "attentions") else {}
        hidden, residuals = block(hidden, embedding, **crossing)
        skips += residuals
    hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=states)
    for block in unet.up_blocks[: last_up + 1]:
        mine, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        crossing = {"encoder_hidden_states": states} if hasattr(block, "attentions") else {}
        hidden = block(hidden, mine, embedding, **crossing)
    return hidden


@torch.no_grad()
def bare_minimum(
    extractor: DiffusionFeatureExtractor, pixels: Tensor, states: Tensor, timesteps: tuple[int, ...]
) -> Any:
    """One VAE encode, then a truncated forward a timestep, with noise from one generator and nothing beside it."""
    pipeline = extractor.backbone.pipeline
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(0)
    last_up = {"bottleneck": -1, "up_ft1": 1, "up_ft2": 2}[extractor.config.layers[-1]]
    for t in timesteps:
        alpha = pipeline.scheduler.alphas_cumprod[t].item()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
        hidden = modules_until(pipeline.unet, noisy, t, states, last_up)
    return hidden.mean((2, 3))


@torch.no_grad()
def full_pass(extractor: DiffusionFeatureExtractor, pixels: Tensor, states: Tensor, timestep: int) -> Any:
    """What a script does that extracts one layer at one timestep: its own VAE encode, and the whole U-Net."""
    pipeline = extractor.backbone.pipeline
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    time = torch.full((len(pixels),), timestep)
    noisy = pipeline.scheduler.add_noise(latents, torch.randn(latents.shape, generator=torch.Generator()), time)
    return pipeline.unet(noisy, time, encoder_hidden_states=states, return_dict=False)[0]


def states_of(extractor: DiffusionFeatureExtractor, count: int) -> Tensor:
    return extractor.backbone.conditioning("").batch(count)["encoder_hidden_states"]


def overhead(model: str) -> dict[str, float]:
    """One layer at one timestep, against the bare minimum."""
    count, rounds, _ = SIZES[model]
    extractor = make_extractor(model, ("up_ft1",), (25,))
    pixels = random_pixels(extractor, count)
    states, ids = states_of(extractor, count), [image_id(image) for image in pixels]
    times = medians(
        rounds,
        extractor=lambda: extractor.features_of(pixels, ids),
        minimum=lambda: bare_minimum(extractor, pixels, states, (25,)),
    )
    return times | {"ratio": times["extractor"] / times["minimum"], "target": 1.05}


def early_exit(model: str) -> dict[str, float]:
    """`bottleneck` without the VAE, against the full U-Net."""
    count, rounds, _ = SIZES[model]
    extractor = make_extractor(model, ("bottleneck",), (25,))
    backbone = extractor.backbone
    latents = backbone.encode(random_pixels(extractor, count))
    states = states_of(extractor, count)
    time = torch.full((count,), 25)
    with torch.no_grad():
        times = medians(
            rounds,
            bottleneck=lambda: backbone.activations(latents, 25, {"bottleneck": "mid_block"}),
            full=lambda: backbone.denoiser(latents, time, encoder_hidden_states=states),
        )
    # the target is of Stable Diffusion's proportions: a small U-Net has more of its work before the middle
    target = {"target": 0.55} if model == "sd15" else {}
    return times | {"ratio": times["bottleneck"] / times["full"], **target}


def sweep(model: str) -> dict[str, float]:
    """Five layers at five timesteps in one call, against one full pass a cell, and against the minimum."""
    count, _, rounds = SIZES[model]
    # 25 full passes at 512 px would take a quarter of an hour a round on two cores
    extractor = make_extractor(model, LAYERS, TIMESTEPS, 256 if model == "sd15" else None)
    pixels = random_pixels(extractor, count)
    states, ids = states_of(extractor, count), [image_id(image) for image in pixels]
    times = medians(
        rounds,
        sweep=lambda: extractor.features_of(pixels, ids),
        minimum=lambda: bare_minimum(extractor, pixels, states, TIMESTEPS),
        one_pass_a_cell=lambda: [full_pass(extractor, pixels, states, t) for _ in LAYERS for t in TIMESTEPS],
    )
    return times | {
        "ratio": times["sweep"] / times["minimum"],
        "target": 1.10,
        "times_faster": times["one_pass_a_cell"] / times["sweep"],
        "times_faster_target": 5.0,
    }


def write_jpegs(folder: Path, count: int, side: int) -> None:
    """Smooth random pictures: noise would be five times the bytes of a photograph."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=90)


def folder_throughput(model: str) -> dict[str, float]:
    """`extract` from a folder of JPEG files to a store, against the same features of tensors in memory.

    `decode` reads and prepares the images alone, on all cores. Where decoding has no cores of its own, as beside a
    small model on a CPU, its work comes on top: `share_of_limit` is compute + decode over extract, 1 if nothing else is
    lost.
    """
    images, side, batch, rounds = {"tiny-sd": (1024, 256, 64, 3), "sd15": (4, 512, 1, 3)}[model]
    extractor = make_extractor(model, ("up_ft1",), (25,))
    extractor.provenance  # noqa: B018  hashes the weights, once a model: seconds for gigabytes, whatever the images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "images")
        folder.mkdir()
        write_jpegs(folder, images, side)
        pixels = random_pixels(extractor, images)
        ids = [image_id(image) for image in pixels]

        def compute() -> None:
            for i in range(0, images, batch):
                extractor.features_of(pixels[i : i + batch], ids[i : i + batch])

        def extract() -> None:
            with tempfile.TemporaryDirectory(dir=name) as store:
                extractor.extract(folder, store, batch_size=batch, shard_size=256, progress=False)

        def decode() -> None:
            source = open_images(folder)
            for image in Reading(extractor, source, batch_size=batch).ahead(range(images)):
                if image.error is not None:
                    raise image.error

        times = medians(rounds, extract=extract, compute=compute, decode=decode)
    # on a CPU a small model has to share its cores with the decoding, which takes as long as its own computation
    target = {"target": 0.95} if model == "sd15" or torch.cuda.is_available() else {}
    share = (times["compute"] + times["decode"]) / times["extract"]
    return times | {"ratio": times["compute"] / times["extract"], "share_of_limit": share, **target}


def peak_memory(model: str, images: int) -> float:
    """Peak resident MB of a process that extracts so many images."""
    command = [sys.executable, __file__, "--memory-of", model, str(images)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout.splitlines()[-1])


def extract_for_memory(model: str, images: int) -> None:
    extractor = make_extractor(model, ("up_ft1",), (25,))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "images")
        folder.mkdir()
        write_jpegs(folder, images, 64)
        extractor.extract(folder, Path(name, "store"), batch_size=32, shard_size=256, progress=False)
    # not getrusage: a child's ru_maxrss begins at its parent's
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(int(peak.split()[1]) / 1024)


def memory(model: str) -> dict[str, float]:
    few, many = peak_memory(model, 512), peak_memory(model, 4096)
    return {"512_images_mb": few, "4096_images_mb": many, "ratio": many / few, "target": 1.05}


MEASURES: dict[str, Callable[[str], dict[str, float]]] = {
    "overhead": overhead,
    "early_exit": early_exit,
    "sweep": sweep,
    "folder": folder_throughput,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(SIZES), choices=sorted(SIZES))
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--out", type=Path, help="JSON; measures that it holds already and that are not asked for stay")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        extract_for_memory(args.memory_of[0], int(args.memory_of[1]))
        return
    results: dict[str, Any] = {"models": {}}
    if args.out and args.out.is_file():
        results = json.loads(args.out.read_text())
    print(json.dumps(machine()), flush=True)
    for model in args.models:
        for name in args.measures:
            if model == "sd15" and name == "memory":
                continue  # thousands of images of its size would take hours on two cores
            result = MEASURES[name](model)
            print(f"{model} {name}: {json.dumps({k: round(v, 4) for k, v in result.items()})}", flush=True)
            results["models"].setdefault(model, {})[name] = result
            if args.out:
                results |= {"machine": machine(), "command": command()}
                write_json(args.out, results)


if __name__ == "__main__":
    main()
