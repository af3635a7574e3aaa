"""Several processes write one store: the bytes are those of one process, and no one waits for ever for a failed one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae._processes import Processes
from diffusion_sae.features import FeatureStore

SETTINGS = {"layers": ["bottleneck", "up_ft1"], "timesteps": [25, 100], "pooling": "tokens"}
OPTIONS = {"batch_size": 2, "shard_size": 2}
PROCESS = f"""
    import json, sys
    from pathlib import Path
    import torch
    from accelerate import PartialState
    from diffusion_sae import DiffusionFeatureExtractor

    torch.set_num_threads(1)
    model, work, *stores = sys.argv[1:]
    extractor = DiffusionFeatureExtractor.from_pretrained(model, **{SETTINGS!r})
    seen = {{}}
    for store in stores:
        images, folder, append = store.split(":")
        try:
            opened = extractor.extract(images, folder, append=bool(append), **{OPTIONS!r})
            seen[folder] = [len(opened), opened.complete]
        except (ValueError, RuntimeError) as error:
            seen[folder] = [type(error).__name__, str(error)]
    state = PartialState()
    Path(work, f"seen-{{state.process_index}}.json").write_text(json.dumps([state.num_processes, seen]))
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def launch(count, *arguments):
    """What torchrun does, and accelerate with it: the processes find each other by these variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "OMP_WAIT_POLICY": "passive"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), *map(str, arguments)],
            env=os.environ | {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def extractor(tiny_sd_folder):
    return DiffusionFeatureExtractor.from_pretrained(tiny_sd_folder, **SETTINGS)


@pytest.fixture(scope="module")
def alone(extractor, image_folder, tmp_path_factory):
    """The store of one process, and the same with three of the images appended."""
    folder = tmp_path_factory.mktemp("alone")
    extractor.extract(image_folder, folder / "store", **OPTIONS, progress=False)
    shutil.copytree(folder / "store", folder / "appended")
    extractor.extract(image_folder / "bag", folder / "unlabelled", **OPTIONS, progress=False)
    extractor.extract(image_folder / "shoe", folder / "unlabelled", append=True, **OPTIONS, progress=False)
    return folder


def begun(extractor, images, folder, shards, monkeypatch):
    """A store whose run stopped when it had so many shards."""
    rename, done = Path.replace, [0]

    def stop(self, target):
        done[0] += 1
        if done[0] > 1 + 3 * shards:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            extractor.extract(images, folder, **OPTIONS, progress=False)
    assert len(list(folder.glob("shard-*.json"))) == shards


def test_two_processes_write_the_bytes_of_one(extractor, alone, image_folder, tiny_sd_folder, tmp_path, monkeypatch):
    """Fresh, resumed after one process, with a damaged shard to make anew, appending, and with an image that fails."""
    begun(extractor, image_folder, tmp_path / "resumed", 3, monkeypatch)
    shutil.copytree(alone / "store", tmp_path / "repaired")
    for path in (tmp_path / "repaired").glob("shard-00002.*"):
        path.unlink()
    broken = shutil.copytree(image_folder, tmp_path / "broken")
    (broken / "bag" / "image-02.png").write_text("no image")  # of the second shard: of process 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{")
    jobs = [f"{image_folder}:{tmp_path / name}:" for name in ("fresh", "resumed", "repaired")]
    jobs += [f"{image_folder / 'bag'}:{tmp_path / 'unlabelled'}:", f"{broken}:{tmp_path / 'failed'}:"]
    jobs += [f"{image_folder}:{tmp_path / 'other'}:"]
    processes = launch(2, tiny_sd_folder, tmp_path, *jobs)
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    for name in ("fresh", "resumed", "repaired"):
        assert contents(tmp_path / name) == contents(alone / "store"), name
    for count, results in seen:
        assert count == 2
        assert all(results[str(tmp_path / name)] == [12, True] for name in ("fresh", "resumed", "repaired"))
    # the bar is the main process's
    assert "extract (1 of 2 processes)" in outputs[0][1]
    assert "extract" not in outputs[1][1]

    failed = [results[str(tmp_path / "failed")] for _, results in seen]
    assert failed[1][0] == "ImageError"
    assert "image-02.png" in failed[1][1]
    assert failed[0] == [
        "ProcessesFailedError",
        "Process 1 of 2 failed; see its own error. What the others made is kept: start again to go on.",
    ]
    assert sorted(path.name for path in (tmp_path / "failed").glob("*.json")) == [
        "manifest.json",
        *(f"shard-0000{i}.json" for i in (0, 2, 4)),
    ]
    other = [results[str(tmp_path / "other")] for _, results in seen]
    assert (other[0][0], other[1][0]) == ("ValueError", "ProcessesFailedError")
    assert other[1][1] == "The main process failed; process 1 stops with it."

    # and back: what two began, one finishes
    shutil.copy(image_folder / "bag" / "image-02.png", broken / "bag" / "image-02.png")
    extractor.extract(broken, tmp_path / "failed", **OPTIONS, progress=False)
    assert contents(tmp_path / "failed") == contents(alone / "store")
    extractor.extract(image_folder / "shoe", tmp_path / "unlabelled", append=True, **OPTIONS, progress=False)
    assert contents(tmp_path / "unlabelled") == contents(alone / "unlabelled")


@pytest.mark.slow
def test_accelerate_launch(alone, image_folder, tiny_sd_folder, tmp_path):
    """--multi_gpu, as with --cpu it starts several processes only where there is MPI; without GPUs they use the CPU."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PROCESS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
    command += ["--main_process_port", str(port), str(script)]
    arguments = [str(tiny_sd_folder), str(tmp_path), f"{image_folder}:{tmp_path / 'store'}:"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*command, *arguments], env=environment, check=True, capture_output=True, timeout=240)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert seen == [[2, {str(tmp_path / "store"): [12, True]}]] * 2
    assert contents(tmp_path / "store") == contents(alone / "store")


@pytest.mark.slow
def test_killed_processes_are_gone_on_with_by_another_number(extractor, alone, image_folder, tiny_sd_folder, tmp_path):
    for count in (2, 3):
        folder = tmp_path / f"store-{count}"
        processes = launch(count, tiny_sd_folder, tmp_path, f"{image_folder}:{folder}:")
        while not list(folder.glob("shard-*.json")) and processes[0].poll() is None:
            time.sleep(0.002)
        for process in processes:
            process.kill()
        assert -signal.SIGKILL in [process.wait() for process in processes]
        for process in processes:
            process.communicate()
        extractor.extract(image_folder, folder, **OPTIONS, progress=False)
        assert contents(folder) == contents(alone / "store")


def test_one_process_initialises_nothing(extractor, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "accelerate", None)  # an import would fail
    processes = Processes(cpu=True)
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert processes.from_main(lambda: 5) == 5
    with processes.together():
        pass
    extractor.extract(image_folder, tmp_path / "store", limit=1, progress=False)
    assert FeatureStore(tmp_path / "store").complete


def test_shards_are_dealt_out_in_turn():
    processes = Processes(cpu=True)
    processes.rank, processes.count = 1, 3
    assert processes.share_of(list(range(8))) == [1, 4, 7]
    assert processes.share_of([0, 5, 6]) == [5]
