"""The command line as a user has it: a few environment variables, a recipe, and a Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer

RECIPE = {
    "extraction": {"model": "tiny-sd", "layers": ["up_ft1"], "timesteps": [50], "pooling": "tokens"},
    "data": {"dataset": "fashion-mnist-mini", "test": "test", "limit": 24, "batch_size": 8},
    "sae": {"expansion_factor": 2, "k": 4},
    "training": {"max_steps": 4, "batch_size": 64},
    "latents": {"images_per_latent": 3},
}
NAME, STORE = "revelio/small-up1-t50", "revelio/small-features"


Command = Callable[..., dict[str, Any]]


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Command:
    """Runs `diffusion-sae` in `tmp_path` with what a user would set, and gives its JSON."""
    env = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    env |= {"HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}

    def run(*arguments: str) -> dict[str, Any]:
        program = Path(sys.executable).parent / "diffusion-sae"
        done = subprocess.run(
            [program, *arguments, "--json"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.token not in done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def uploads(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method == "PUT"]


@pytest.mark.slow
def test_from_images_to_the_pushed_card_and_found_again(hub: HubServer, command: Command, tmp_path: Path) -> None:
    (tmp_path / "small-up1-t50.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")  # JSON is YAML
    first = command("train", "--recipe", "small-up1-t50.yaml", "--push", NAME)
    assert first["artifact"] == "runs/small-up1-t50/artifact"
    _, commit = hub.commits(NAME)
    assert first["commit"].endswith(commit.oid)
    artifact = {"config.json", "model.safetensors", "extractor_config.json", "metrics.json", "README.md"}
    assert set(commit.changed) == artifact | {"latents.parquet", "latents.png"}

    before = uploads(hub)
    again = command("train", "--recipe", "small-up1-t50.yaml", "--push", NAME)
    assert again == first
    assert len(hub.commits(NAME)) == 2
    assert uploads(hub) == before

    (found,) = command("list", "--author", "revelio", "--model", "small", "--layer", "up1")["artifacts"]
    assert (found["repo_id"], found["kind"], found["timesteps"]) == (NAME, "sae", [50])
    assert command("list", "--author", "revelio", "--model", "small", "--timestep", "25") == {"artifacts": []}


@pytest.mark.slow
def test_a_store_that_grew_sends_its_new_shards_alone(hub: HubServer, command: Command) -> None:
    extract = ("extract", "fashion-mnist-mini", "store", "--layers", "up_ft1", "--timesteps", "50", "--shard-size", "4")
    command(*extract, "--limit", "8")
    command("push", "store", STORE)
    before = uploads(hub)
    command("push", "store", STORE)
    assert uploads(hub) == before
    assert len(hub.commits(STORE, "dataset")) == 2
    command(*extract, "--limit", "4", "--split", "test", "--append")
    command("push", "store", STORE)
    commit = hub.commits(STORE, "dataset")[-1]
    assert {name for name in commit.changed if name.startswith("shard")} == {
        f"shard-00002.{suffix}" for suffix in ("json", "parquet", "safetensors")
    }
    assert len(uploads(hub)) == len(before) + 2
