"""A training that is killed at any moment ends bit for bit as one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("train_and_kill.py")


def train_and_kill(kind: str, folder: Path, *, kills: int, seed: int, save_steps: int) -> list[int]:
    """How far the checkpoint was after each kill."""
    done = subprocess.run(
        [sys.executable, SCRIPT, kind, str(folder), str(kills), str(seed), str(save_steps)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_run(undisturbed: Path, killed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert {path.name for path in killed.iterdir()} == names, "something was left over, or is missing"
    checkpoints = {name for name in names if name.startswith("checkpoint") and name.endswith(".safetensors")}
    assert checkpoints
    for name in names - checkpoints - {"README.md"}:
        assert (undisturbed / name).read_bytes() == (killed / name).read_bytes(), name
    for checkpoint in checkpoints:
        expected, got = load_file(undisturbed / checkpoint), load_file(killed / checkpoint)
        assert set(expected) == set(got)
        for name, value in expected.items():
            assert torch.equal(value, got[name]), name


@pytest.mark.parametrize(
    ("kind", "save_steps"), [("topk", 10), ("batchtopk", 10), ("jumprelu", 10), ("shards", 5), ("probe", 1)]
)
def test_killed_three_times(kind: str, save_steps: int, tmp_path: Path) -> None:
    """Of a probe the weights, the batch statistics and the dropout are part of it; it saves after every epoch."""
    progress = train_and_kill(kind, tmp_path, kills=3, seed=0, save_steps=save_steps)
    assert len(progress) == 3
    assert progress == sorted(progress)
    assert progress[-1] > 0, "no run was resumed from a checkpoint"
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")
    if kind == "topk":
        history = json.loads((tmp_path / "killed/training_history.json").read_text())
        assert [entry["step"] for entry in history if "loss" in entry] == [1, *range(9, 301, 9), 300]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "save_steps", "kills"),
    [("topk", 1, 30), ("topk", 7, 15), ("batchtopk", 3, 15), ("jumprelu", 7, 15), ("shards", 1, 8), ("probe", 1, 12)],
)
def test_killed_many_times(kind: str, save_steps: int, kills: int, tmp_path: Path) -> None:
    """With a checkpoint every step most kills fall into the writing of one."""
    progress = train_and_kill(kind, tmp_path, kills=kills, seed=save_steps, save_steps=save_steps)
    assert len(progress) == kills
    assert progress[-1] > 0
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")
