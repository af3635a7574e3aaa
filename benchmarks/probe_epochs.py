"""Thirty epochs of Revelio's Diff-C recipe: on cached features, and as Revelio's code does it, on the SD1.5 shape.

    python benchmarks/probe_epochs.py --out docs/results/probe-epochs.json      # about half an hour on two busy cores

Revelio makes the features of every image anew in every epoch: VAE, then the whole U-Net whatever the layer. Here they
are extracted once, up to the layer, or once for each augmented view, and every epoch reads them. What is measured is
one forward of each kind and one training step of Diff-C (batch 16, width 1024, AdamW, fp32) at the true sizes of Stable
Diffusion 1.5 at 512 pixels, weights random; their seconds an image are then added up for 30 epochs, so that the totals
are an extrapolation and no run. Left out, to Revelio's favour: its passes over the test images after every epoch. Left
out, to ours: reading the cached features, which is measured beside and takes a thousandth of a step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from machine import command, machine
from torch import Tensor

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig
from diffusion_sae._files import write_json

EPOCHS, BATCH, VIEWS, TARGET = 30, 16, 8, 20
LAYERS = {"bottleneck": ("mid_block", 8), "up_ft1": ("up_blocks.1", 32)}
WIDTH = 1280  # channels of both
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


class StopError(Exception):
    """The layer is reached."""


def timed(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median seconds of the clock and of the processor."""
    clock, processor = [], []
    for _ in range(rounds):
        begin, cpu = time.perf_counter(), time.process_time()
        call()
        clock.append(time.perf_counter() - begin)
        processor.append(time.process_time() - cpu)
    return {"seconds": statistics.median(clock), "processor_seconds": statistics.median(processor)}


def built(kind: type[Any], **config: Any) -> Any:
    """A model with weights of no meaning; torch's own initialisation takes longer than what is measured."""
    with torch.device("meta"):
        model = kind(**config)
    model = model.to_empty(device="cpu").eval()
    for tensor in model.state_dict().values():
        tensor.uniform_(-0.02, 0.02)
    return model


def up_to(unet: UNet2DConditionModel, path: str | None, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    def stop(*_: Any) -> None:
        raise StopError

    handle = None if path is None else unet.get_submodule(path).register_forward_hook(stop)
    try:
        unet(*inputs)
    except StopError:
        pass
    finally:
        if handle is not None:
            handle.remove()


def extraction(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds an image of the VAE's encoder and of the U-Net, whole and up to each layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        vae = built(AutoencoderKL, **VAE)
        pixels = torch.rand(1, 3, 512, 512, generator=generator) * 2 - 1
        found = {"vae": timed(partial(vae.encode, pixels), rounds)}
        unet = built(UNet2DConditionModel, sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        latents = torch.randn(1, 4, 64, 64, generator=generator)
        inputs = (latents, torch.tensor(25), torch.randn(1, 77, 768, generator=generator))
        found["unet"] = timed(lambda: up_to(unet, None, inputs), rounds)
        for layer, (path, _) in LAYERS.items():
            found[layer] = timed(lambda path=path: up_to(unet, path, inputs), rounds)
    print(json.dumps(found), flush=True)
    return found


def training(side: int, rounds: int, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds an image of a step of Diff-C, and of reading its features from the disk."""
    generator = torch.Generator().manual_seed(0)
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=WIDTH, head="diff-c", num_labels=37)).train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-4)
    features = torch.randn(BATCH, WIDTH, side, side, generator=generator)
    labels = torch.randint(0, 37, (BATCH,), generator=generator)

    def step() -> None:
        loss = probe(features=features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    file = folder / "features.npy"
    features.numpy().tofile(file)
    reading = timed(lambda: torch.from_file(str(file), size=features.numel()).clone(), rounds)
    step()
    taken = timed(step, rounds)
    file.unlink()
    return ({name: value / BATCH for name, value in one.items()} for one in (taken, reading))  # type: ignore[return-value]


def totals(forward: dict[str, Any], layer: str, step: dict[str, float], clock: str) -> dict[str, float]:
    """Seconds an image of 30 epochs, by the three ways."""
    theirs = EPOCHS * (forward["vae"][clock] + forward["unet"][clock] + step[clock])
    once = forward["vae"][clock] + forward[layer][clock]
    ours, with_views = (count * once + EPOCHS * step[clock] for count in (1, 1 + VIEWS))
    return {
        "recomputed": round(theirs, 2),
        "cached": round(ours, 2),
        "cached_views": round(with_views, 2),
        "ratio": round(theirs / ours, 1),
        "ratio_views": round(theirs / with_views, 1),
        "ratio_of_features": round(EPOCHS * (forward["vae"][clock] + forward["unet"][clock]) / once, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken (default: 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="for the features that are read")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "command": command(),
    }
    result |= {"epochs": EPOCHS, "batch_size": BATCH, "views": VIEWS, "rounds": args.rounds, "target_ratio": TARGET}
    forward = extraction(args.rounds)
    result["forward_of_an_image"] = forward
    result["layers"] = {}
    for layer, (_, side) in LAYERS.items():
        step, reading = training(side, args.rounds, args.folder)
        line: dict[str, Any] = {
            "features": [WIDTH, side, side],
            "step_of_an_image": step,
            "reading_of_an_image": reading,
        }
        line["seconds_of_an_image"] = totals(forward, layer, step, "seconds")
        line["processor_seconds_of_an_image"] = totals(forward, layer, step, "processor_seconds")
        result["layers"][layer] = line
        print(json.dumps({layer: line}), flush=True)
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
