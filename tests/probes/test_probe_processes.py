"""Two processes, started by `torchrun`, train a probe to the loss curve and the weights of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from train_in_processes import CASES, draw, train

from diffusion_sae import DiffusionProbe
from diffusion_sae.probes.heads.shared import BatchNorm2d, Dropout, Dropout2d

SCRIPT = Path(__file__).with_name("train_in_processes.py")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each of the two processes saw."""
    folder = tmp_path_factory.mktemp("launched")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, str(folder)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [count for count, _ in seen] == [2, 2]
    return folder, [made for _, made in seen]


def without_gradient_free(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights on which the training loss depends. On a bias before BatchNorm it does not, nor on that of the keys
    of a softmax: Adam moves them by the signs of rounding errors, and the running mean follows.
    """
    left_out = {"head.key.bias"}
    if "head.features.2.running_mean" in state:  # the convolutions of diff-c, each before its BatchNorm
        for number in (1, 5, 9, 13):
            left_out |= {f"head.features.{number}.bias", f"head.features.{number + 1}.running_mean"}
    return {name: value for name, value in state.items() if name not in left_out}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_curve_and_the_weights_are_those_of_one_process(
    case: str, launched: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, (first, second) = launched
    exact = not case.startswith("diff-c")
    assert first[case] == second[case], "both processes have the same probe and the same history"
    probe, expected = train(case, tmp_path)
    assert first[case]["chosen"] == expected["chosen"]
    assert len(first[case]["history"]) == len(expected["history"])
    for one, two in zip(expected["history"], first[case]["history"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4) if "loss" in one else True
        assert two == pytest.approx(one, abs=1e-4 if exact else 1e-3)
    saved = without_gradient_free(load_file(folder / case / "model.safetensors"))
    for name, value in without_gradient_free(probe.state_dict()).items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-4, msg=name)
    rows = draw(case, 9)[:]
    loaded = DiffusionProbe.from_pretrained(folder / case)
    torch.testing.assert_close(loaded.predict(rows), probe.predict(rows), rtol=0, atol=1e-4 if exact else 2e-3)
    assert not list((folder / case).glob(".*")), "nothing half-written is left"


def test_layers_of_a_single_process_are_torchs_own() -> None:
    values = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for ours, theirs in (
        (BatchNorm2d(4), torch.nn.BatchNorm2d(4)),
        (Dropout(0.5), torch.nn.Dropout(0.5)),
        (Dropout2d(0.5), torch.nn.Dropout2d(0.5)),
    ):
        results = []
        for layer in (ours, theirs):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                results.append(layer(values))
        assert torch.equal(*results)
        assert list(ours.state_dict()) == list(theirs.state_dict())
