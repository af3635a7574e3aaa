"""Two processes train one SAE to the single process's loss curve and weights."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROCESS = """
    import json, sys
    import torch
    sys.path.insert(0, sys.argv[1])
    from conftest import draw_superposition
    from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainer, SAETrainingArguments
    from diffusion_sae._training import MetricsLogger

    torch.set_num_threads(1)
    folder, config, changes = sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
    with torch.device("meta" if changes.get("shard_latents") else "cpu"):
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(**{"d_in": 16, "num_latents": 64, "k": 4, **config}))
    settings = {"learning_rate": 3e-3, "warmup_steps": 5, "batch_size": 64, "max_steps": 30, "dead_after_rows": 64,
                "logging_steps": 5, "save_steps": 25, "auxk": 8}
    SAETrainer(sae, draw_superposition(1000), SAETrainingArguments(output_dir=folder, **(settings | changes))).train(
        progress=False
    )
"""


def train(folder: Path, count: int, config: dict, changes: dict) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "OMP_WAIT_POLICY": "passive"}
    arguments = [str(Path(__file__).parent), str(folder), json.dumps(config), json.dumps(changes)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), *arguments],
            env=os.environ | {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {}),
        ({"matryoshka_sizes": [16, 64]}, {"optimizer": "adamw", "ema_decay": 0.9}),
        ({"activation": "batchtopk"}, {}),
        ({"activation": "batchtopk"}, {"multi_topk_alpha": 0.125, "optimizer": "adamw", "micro_batch_size": 20}),
        (
            {"activation": "jumprelu", "jumprelu_bandwidth": 0.1},
            {"sparsity_coefficient": 0.3, "auxk": 0, "micro_batch_size": 20},
        ),
        ({"activation": "relu"}, {"auxk": 0}),
    ],
    ids=[
        "fused",
        "another optimiser, nested, averaged",
        "batchtopk",
        "batchtopk, not fused, in parts",
        "jumprelu, in parts",
        "relu",
    ],
)
def test_two_processes_give_the_curve_of_one(config: dict, changes: dict, tmp_path: Path) -> None:
    _require_same_training(tmp_path, config, changes, {})


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {}),
        ({"activation": "batchtopk"}, {"micro_batch_size": 20}),
        (
            {"num_latents": 61},
            {"ema_decay": 0.9, "normalize_input": "scalar", "micro_batch_size": 20},
        ),
        (
            {"activation": "signed_topk", "matryoshka_sizes": [16, 64]},
            {"multi_topk_alpha": 0.125, "optimizer": "adamw"},
        ),
    ],
    ids=["topk", "batchtopk, in parts", "odd shares, averaged, in parts", "signed, nested, another optimiser"],
)
def test_latents_shared_out_over_two_processes(config: dict, changes: dict, tmp_path: Path) -> None:
    """Each holds half of the dictionary, which is never made in full; the files are those of one process."""
    _require_same_training(tmp_path, config, changes, {"shard_latents": True})


def _require_same_training(tmp_path: Path, config: dict, changes: dict, of_two: dict) -> None:
    """Curve and weights of one process and of two, which have these changes as well."""
    curves = {}
    for count in (1, 2):
        train(tmp_path / str(count), count, config, changes | (of_two if count == 2 else {}))
        curves[count] = json.loads((tmp_path / str(count) / "training_history.json").read_text())
    assert [entry["step"] for entry in curves[2]] == [1, *range(5, 31, 5)]
    for one, two in zip(curves[1], curves[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["fvu"] == pytest.approx(one["fvu"], abs=1e-4)
        assert two["dead_latents"] == one["dead_latents"]
    if changes.get("auxk") != 0:
        assert any(entry["dead_latents"] > 0 for entry in curves[1]), "AuxK had nothing to do"
    weights = [load_file(tmp_path / str(count) / "model.safetensors") for count in (1, 2)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-3, msg=name)
