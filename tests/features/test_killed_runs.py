"""kill -9 at any moment: the next run gives, byte for byte, what an undisturbed run gives."""

import multiprocessing
import os
import random
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch

SHARD_SIZE = 2
RENAMES = 2 + 3 * (12 // SHARD_SIZE)  # two manifests, and three files a shard
RENAMES_OF_APPEND = 2 + 3 * (4 // SHARD_SIZE)  # to the manifest, two shards, and to the manifest again
KILLS = 50


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def require_equal(folder, expected):
    found = contents(folder)
    differing = [name for name in found | expected if found.get(name) != expected.get(name)]
    assert not differing, (folder.name, differing)


def kill_myself_at(rename):
    """The process dies as `kill -9` would have it when it has renamed so many files, the next one written in full."""
    original, done = Path.replace, [0]

    def replace(self, target):
        if done[0] == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        return original(self, target)

    Path.replace = replace


class Runs:
    """Extractions in processes that are forked off this one, which has the extractor and has never run it."""

    def __init__(self, model, **more):
        from diffusion_sae import DiffusionFeatureExtractor

        torch.set_num_threads(1)
        settings = {"layers": ["bottleneck", "up_ft1"], "timesteps": [25, 100], "pooling": "tokens"}
        self.extractor = DiffusionFeatureExtractor.from_pretrained(model, **settings, **more)
        self.extractor.provenance  # noqa: B018  hashed beforehand, so that a kill hits the extraction

    def start(self, images, folder, rename=None, **options):
        """Process id of a run; it dies at the given rename."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            if rename is not None:
                kill_myself_at(rename)
            self.extractor.extract(images, folder, batch_size=1, shard_size=SHARD_SIZE, progress=False, **options)
            code = 0
        finally:  # a forked process must not go on into the test's own code
            if code:
                traceback.print_exc()
            os._exit(code)

    def finish(self, *arguments, **options):
        """Seconds that a run took which no one disturbed."""
        started = time.perf_counter()
        _, status = os.waitpid(self.start(*arguments, **options), 0)
        assert status == 0, status
        return time.perf_counter() - started

    def die_at(self, rename, *arguments, **options):
        _, status = os.waitpid(self.start(*arguments, rename=rename, **options), 0)
        assert os.WIFSIGNALED(status), (rename, status)
        assert os.WTERMSIG(status) == signal.SIGKILL

    def kill_after(self, delay, *arguments, **options):
        """Whether the run was still going."""
        child = self.start(*arguments, **options)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)


@pytest.fixture(scope="module")
def in_a_process(tiny_sd_folder):
    """Calls a function of this module as f(Runs(**settings), *arguments) in a process that has run nothing before.

    The threads that torch and Arrow start here would not be there after a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusion_sae.extraction.extractor", "diffusers", "datasets"])

    def call(function, *arguments, **settings):
        process = context.Process(target=_call, args=(function, tiny_sd_folder, settings, *arguments))
        process.start()
        process.join()
        assert process.exitcode == 0, function.__name__

    return call


def _call(function, model, settings, *arguments):
    function(Runs(model, **settings), *arguments)


def three_kills_in_a_row(runs, images, work):
    runs.finish(images, work / "undisturbed")
    expected = contents(work / "undisturbed")
    seconds = runs.finish(images, work / "timed")
    for rename, finished in ((5, ["shard-00000"]), (2, ["shard-00000"])):
        runs.die_at(rename, images, work / "store")
        assert sorted(path.stem for path in (work / "store").glob("shard-*.json")) == finished
        assert list((work / "store").glob(".*.tmp"))  # what the dead process was about to rename
    runs.kill_after(random.Random(0).uniform(0.2, 0.8) * seconds, images, work / "store")
    runs.finish(images, work / "store")
    require_equal(work / "store", expected)


def test_three_kills_in_a_row(in_a_process, image_folder, tmp_path):
    """Between a shard's index and its data, between the data and the mark that counts it, and at a random time."""
    in_a_process(three_kills_in_a_row, image_folder, tmp_path)


def random_kills(runs, images, work):
    runs.finish(images, work / "undisturbed")
    expected = contents(work / "undisturbed")
    seconds = min(runs.finish(images, work / f"timed-{i}") for i in range(2))
    chance = random.Random(1)
    hits = stores = 0
    while hits < KILLS and stores < 4 * KILLS:
        folder = work / f"store-{stores}"
        # spread over the whole run, the first moments and the end included
        while True:
            hit = runs.kill_after(chance.uniform(0, 1.05 * seconds), images, folder)
            hits += hit
            if not hit or chance.random() < 0.7:  # else the resumed run is killed as well
                break
        runs.finish(images, folder)
        require_equal(folder, expected)
        stores += 1
    assert hits >= KILLS


@pytest.mark.slow
def test_fifty_kills_at_random_moments(in_a_process, image_folder, tmp_path):
    """Kills that hit a run, over as many stores as that takes; each store then ends as the undisturbed one."""
    in_a_process(random_kills, image_folder, tmp_path)


def a_kill_before_every_rename(runs, images, work):
    runs.finish(images, work / "undisturbed")
    for rename in range(RENAMES):
        folder = work / f"store-{rename}"
        runs.die_at(rename, images, folder)
        runs.finish(images, folder)
        require_equal(folder, contents(work / "undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize("views", [0, 2])
def test_a_kill_before_every_rename(in_a_process, image_folder, tmp_path, views):
    in_a_process(a_kill_before_every_rename, image_folder, tmp_path, views=views)


def kills_while_appending(runs, images, work):
    """Class by class, with equal names and labels: a list a class."""
    first, second = (sorted((images / name).iterdir()) for name in ("bag", "dress"))
    runs.finish(first, work / "undisturbed")
    runs.finish(second, work / "undisturbed", append=True)
    for rename in range(RENAMES_OF_APPEND):
        folder = work / f"store-{rename}"
        runs.finish(first, folder)
        runs.die_at(rename, second, folder, append=True)
        runs.finish(first, folder)  # as a script that is started again
        runs.finish(second, folder, append=True)
        require_equal(folder, contents(work / "undisturbed"))


@pytest.mark.slow
def test_kills_while_appending(in_a_process, image_folder, tmp_path):
    in_a_process(kills_while_appending, image_folder, tmp_path)
