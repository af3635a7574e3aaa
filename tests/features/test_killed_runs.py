"""kill -9 at any moment: the next run gives, byte for byte, what an undisturbed run gives."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

SHARD_SIZE = 2
RENAMES = 2 + 3 * (12 // SHARD_SIZE)  # two manifests, and three files a shard


def kill_myself_at(rename):
    """The process dies as `kill -9` would have it when it has renamed so many files, the next one written in full."""
    original, done = Path.replace, [0]

    def replace(self, target):
        if done[0] == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        return original(self, target)

    Path.replace = replace


def extract(model, images, output_dir, rename=None, started=None):
    from diffusion_sae import DiffusionFeatureExtractor

    torch.set_num_threads(1)
    settings = {"layers": ["bottleneck", "up_ft1"], "timesteps": [25, 100], "pooling": "tokens"}
    extractor = DiffusionFeatureExtractor.from_pretrained(model, **settings)
    extractor.provenance  # noqa: B018  hashed beforehand, so that a kill hits the extraction
    if rename is not None:
        kill_myself_at(rename)
    if started is not None:
        started.touch()
    extractor.extract(images, output_dir, batch_size=1, shard_size=SHARD_SIZE, progress=False)


@pytest.fixture(scope="module")
def processes():
    """Processes that are forked off a server with the libraries loaded and nothing run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusion_sae.extraction.extractor", "diffusers", "datasets"])
    return context


@pytest.fixture(scope="module")
def undisturbed(processes, tiny_sd_folder, image_folder, tmp_path_factory):
    """The bytes of a store, and the seconds that the extraction took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    started = folder / "started"
    process = processes.Process(target=extract, args=(tiny_sd_folder, image_folder, folder / "store", None, started))
    process.start()
    process.join()
    assert process.exitcode == 0
    seconds = (folder / "store" / "manifest.json").stat().st_mtime - started.stat().st_mtime
    return contents(folder / "store"), seconds


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_and_kill(processes, arguments, started, delay):
    """Start a run and kill it `delay` seconds after its extraction began; whether it was still going."""
    started.unlink(missing_ok=True)
    process = processes.Process(target=extract, args=(*arguments, None, started))
    process.start()
    while not started.exists() and process.is_alive():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def finish(processes, arguments):
    process = processes.Process(target=extract, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_three_kills_in_a_row(processes, undisturbed, tiny_sd_folder, image_folder, tmp_path):
    """Between a shard's index and its data, between the data and the mark that counts it, and at a random time."""
    expected, seconds = undisturbed
    arguments = (tiny_sd_folder, image_folder, tmp_path / "store")
    for rename, finished in ((5, ["shard-00000"]), (2, ["shard-00000"])):
        process = processes.Process(target=extract, args=(*arguments, rename))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert sorted(path.stem for path in (tmp_path / "store").glob("shard-*.json")) == finished
        assert list((tmp_path / "store").glob(".*.tmp"))  # what the dead process was about to rename
    run_and_kill(processes, arguments, tmp_path / "started", random.Random(0).uniform(0.2, 0.8) * seconds)
    finish(processes, arguments)
    assert contents(tmp_path / "store") == expected


@pytest.mark.slow
def test_many_kills_at_random_moments(processes, undisturbed, tiny_sd_folder, image_folder, tmp_path):
    """Two dozen kills that hit a run, over as many stores as that takes; each store ends undisturbed."""
    expected, seconds = undisturbed
    chance = random.Random(1)
    hits = stores = 0
    while hits < 24 and stores < 200:
        folder = tmp_path / f"store-{stores}"
        arguments = (tiny_sd_folder, image_folder, folder)
        for _ in range(chance.randint(1, 4)):
            hits += run_and_kill(processes, arguments, tmp_path / "started", chance.uniform(0, seconds))
        finish(processes, arguments)
        assert contents(folder) == expected, folder.name
        stores += 1
    assert hits >= 24


@pytest.mark.slow
def test_a_kill_before_every_rename(processes, undisturbed, tiny_sd_folder, image_folder, tmp_path):
    expected, _ = undisturbed
    for rename in range(RENAMES):
        arguments = (tiny_sd_folder, image_folder, tmp_path / f"store-{rename}")
        process = processes.Process(target=extract, args=(*arguments, rename))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        finish(processes, arguments)
        assert contents(arguments[2]) == expected, rename
