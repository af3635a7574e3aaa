"""A script: train without a disturbance in one folder; in another be killed again and again, then finish.

    python train_and_kill.py (sae | probe) FOLDER KILLS SEED SAVE_STEPS

The trainings are forked from this process, which imports torch once, and end by SIGKILL at random moments. Prints, as
JSON, how far the checkpoint was after each kill.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors import safe_open

from conftest import draw_superposition
from diffusion_sae import (
    DiffusionProbe,
    DiffusionProbeConfig,
    KSparseAutoencoder,
    KSparseAutoencoderConfig,
    ProbeTrainer,
    ProbeTrainingArguments,
    SAETrainer,
    SAETrainingArguments,
)
from diffusion_sae._training import CHECKPOINT
from diffusion_sae.features import FeatureSet


def train_sae(output_dir: Path, save_steps: int) -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=16, num_latents=64, k=4))
    args = SAETrainingArguments(
        output_dir=str(output_dir),
        learning_rate=3e-3,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        batch_size=64,
        max_steps=300,
        dead_after_rows=256,
        auxk=8,  # its counters are part of the state
        ema_decay=0.9,
        normalize_input="scalar",
        k_anneal_start=16,
        k_anneal_steps=100,
        eval_steps=40,
        keep_best=True,
        logging_steps=9,
        save_steps=save_steps,
    )
    SAETrainer(sae, draw_superposition(1000), args).train(progress=False)


def train_probe(output_dir: Path, save_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    features = torch.randn(48, 6, 4, 4, generator=generator) + labels[:, None, None, None]
    config = DiffusionProbeConfig(d_in=6, head="diff-c", width=8, dropout=0.5, num_labels=3)
    args = ProbeTrainingArguments(output_dir=str(output_dir), learning_rate=1e-3, batch_size=8, num_train_epochs=40)
    ProbeTrainer(DiffusionProbe(config), FeatureSet.from_tensor(features, labels), args).train(progress=False)


def start(train, *args) -> int:
    if pid := os.fork():
        return pid
    try:
        train(*args)
    except BaseException:  # noqa: BLE001  the child must not go on as the parent
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(pid: int) -> None:
    status = os.waitpid(pid, 0)[1]
    if status:
        sys.exit(f"a training that nobody killed ended with status {status}")


def progress_of(folder: Path) -> int:
    """Steps or epochs in the checkpoint, which must be whole whenever it exists."""
    if not (folder / CHECKPOINT).exists():
        return 0
    with safe_open(folder / CHECKPOINT, "pt") as file:
        names = set(file.keys())
        return int(file.get_tensor("extra.step") if "extra.step" in names else file.get_tensor("extra.state")[0])


def main() -> None:
    kind, folder, kills, seed, save_steps = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    train = {"sae": train_sae, "probe": train_probe}[kind]
    started = time.monotonic()
    finish(start(train, folder / "undisturbed", save_steps))
    duration = time.monotonic() - started
    rng, progress = random.Random(seed), []
    end = progress_of(folder / "undisturbed")
    for at_least in sorted(rng.uniform(0, 0.8 * end) for _ in range(kills)):
        pid = start(train, folder / "killed", save_steps)
        while progress_of(folder / "killed") < at_least - save_steps and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1) * duration)
        os.kill(pid, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            sys.exit(f"the training ended before it was killed {len(progress) + 1} times")
        progress.append(progress_of(folder / "killed"))
    finish(start(train, folder / "killed", save_steps))
    sys.stdout.write(json.dumps(progress))


main()
