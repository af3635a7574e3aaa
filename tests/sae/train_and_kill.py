"""A script: train without a disturbance in one folder; in another be killed again and again, then finish.

    python train_and_kill.py KIND FOLDER KILLS SEED SAVE_STEPS

The trainings are forked from this process, which imports torch once, and end by SIGKILL at random moments, the last
ones also while the finished model is written, or after that. Prints, as JSON, how far the checkpoint was after each.
"""

import json
import os
import random
import signal
import socket
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
from diffusion_sae._training import CHECKPOINT, CHECKPOINT_INDEX, hold_out_images
from diffusion_sae.features import FeatureSet, FeatureStore, ShuffledBatches, StoreWriter
from diffusion_sae.provenance import Provenance

TRAINING = {
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "batch_size": 64,
    "max_steps": 300,
    "dead_after_rows": 256,
    "logging_steps": 9,
    "eval_steps": 40,
    "keep_best": True,
}


def sae(**config) -> KSparseAutoencoder:
    return KSparseAutoencoder(KSparseAutoencoderConfig(**{"d_in": 16, "num_latents": 64, "k": 4, **config}))


def train_topk(output_dir: Path, save_steps: int) -> None:
    settings = {
        "lr_scheduler_type": "cosine",
        "auxk": 8,  # its counters are part of the state
        "ema_decay": 0.9,
        "normalize_input": "scalar",
        "k_anneal_start": 16,
        "k_anneal_steps": 100,
    }
    args = SAETrainingArguments(output_dir=str(output_dir), save_steps=save_steps, **(TRAINING | settings))
    SAETrainer(sae(), draw_superposition(1000), args).train(progress=False)


def store_beside(output_dir: Path) -> FeatureStore:
    """100 images of 5 positions at two timesteps, written by the training that is not killed."""
    folder, images = output_dir.parent / "store", 100
    if not folder.exists():
        record = Provenance(model="m", layers=("mid",), timesteps=(1, 2), pooling="tokens", weights="abc")
        names = [str(i) for i in range(images)]
        no_labels = [None] * images
        writer = StoreWriter(folder, record, source_names=names, labels=no_labels, class_names=None, shard_size=20)
        rows = {("mid", t): draw_superposition(5 * images, seed=t).unflatten(0, (images, 5)) * t for t in (1, 2)}
        for number in writer.missing:
            shard, own = writer.new_shard(), writer.part.rows(number)
            some = [names[i] for i in own]
            shard.add({key: values[list(own)] for key, values in rows.items()}, some, some, no_labels[: len(own)])
            writer.write(number, shard)
        writer.finish()
    return FeatureStore(folder)


def train_batchtopk(output_dir: Path, save_steps: int) -> None:
    """Of two timesteps, from a store that does not fit into a buffer; the threshold is a mean over the steps."""
    features = store_beside(output_dir).select("mid", (1, 2))
    train_rows, _ = hold_out_images(features, 10, seed=0)
    source = ShuffledBatches(features, 64, rows=train_rows, buffer_bytes=2**15, block_bytes=2**11)
    settings = {"micro_batch_size": 24, "multi_topk_alpha": 0.125, "resample_steps": 40, "dead_latent_boost": 0.0}
    args = SAETrainingArguments(output_dir=str(output_dir), save_steps=save_steps, **(TRAINING | settings))
    model = sae(activation="batchtopk", matryoshka_sizes=[16, 64], timesteps=[1, 2])
    SAETrainer(model, source, args).train(progress=False)


def train_jumprelu(output_dir: Path, save_steps: int) -> None:
    """By torch's optimiser, and with draws of random numbers on the way."""
    settings = {"optimizer": "adamw", "resample_steps": 25, "sparsity_coefficient": 0.3}
    args = SAETrainingArguments(output_dir=str(output_dir), save_steps=save_steps, **(TRAINING | settings))
    SAETrainer(sae(activation="jumprelu", jumprelu_bandwidth=0.1), draw_superposition(1000), args).train(progress=False)


def train_shards(output_dir: Path, save_steps: int) -> None:
    settings = {"shard_latents": True, "auxk": 8, "ema_decay": 0.9, "max_steps": 100}
    args = SAETrainingArguments(output_dir=str(output_dir), save_steps=save_steps, **(TRAINING | settings))
    with torch.device("meta"):
        model = sae()
    SAETrainer(model, draw_superposition(1000), args).train(progress=False)


def train_probe(output_dir: Path, save_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    features = torch.randn(48, 6, 4, 4, generator=generator) + labels[:, None, None, None]
    config = DiffusionProbeConfig(d_in=6, head="diff-c", width=8, dropout=0.5, num_labels=3)
    args = ProbeTrainingArguments(output_dir=str(output_dir), learning_rate=1e-3, batch_size=8, num_train_epochs=40)
    ProbeTrainer(DiffusionProbe(config), FeatureSet.from_tensor(features, labels), args).train(progress=False)


PROCESSES = {"shards": 2}
TRAIN = {
    "topk": train_topk,
    "batchtopk": train_batchtopk,
    "jumprelu": train_jumprelu,
    "shards": train_shards,
    "probe": train_probe,
}


def start(kind: str, *args) -> list[int]:
    """The processes of a training."""
    count = PROCESSES.get(kind, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": count}
    pids = []
    for rank in range(count):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            if count > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "ACCELERATE_USE_CPU": "true"}
                os.environ.update({name: str(value) for name, value in {**address, **place}.items()})
            TRAIN[kind](*args)
        except BaseException:  # noqa: BLE001  the child must not go on as the parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pids


def finish(pids: list[int]) -> None:
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        if status:
            sys.exit(f"a training that nobody killed ended with status {status}")


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def progress_of(folder: Path) -> int:
    """Steps or epochs in the checkpoint, which must be whole whenever it exists."""
    if (folder / CHECKPOINT_INDEX).exists():
        step = json.loads((folder / CHECKPOINT_INDEX).read_text())["step"]
        parts = sorted(folder.glob(f"checkpoint-{step}-*.safetensors"))
        if len(parts) != 2 and json.loads((folder / CHECKPOINT_INDEX).read_text())["step"] == step:
            sys.exit(f"the index names step {step}, of which there is {parts}")
        return step
    if not (folder / CHECKPOINT).exists():
        return 0
    with safe_open(folder / CHECKPOINT, "pt") as file:
        names = set(file.keys())
        return int(file.get_tensor("extra.step") if "extra.step" in names else file.get_tensor("extra.state")[0])


def main() -> None:
    kind, folder, kills, seed, save_steps = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    started = time.monotonic()
    finish(start(kind, folder / "undisturbed", save_steps))
    duration = time.monotonic() - started
    rng, progress = random.Random(seed), []
    end = progress_of(folder / "undisturbed")
    for at_least in sorted(rng.uniform(0, end) for _ in range(kills)):
        pids = start(kind, folder / "killed", save_steps)
        while progress_of(folder / "killed") < at_least - save_steps and not has_ended(pids[0]):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1) * duration)
        rng.shuffle(pids)
        kill(pids)
        progress.append(progress_of(folder / "killed"))
    finish(start(kind, folder / "killed", save_steps))
    sys.stdout.write(json.dumps(progress))


main()
