"""The examples run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=EXAMPLES.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("script", "lines"), [("01_features.py", 4), ("02_latents.py", 3), ("03_probe.py", 3)])
def test_numbered_examples(script: str, lines: int) -> None:
    assert len(run(str(EXAMPLES / script)).strip().splitlines()) == lines


@pytest.mark.slow
def test_training_script_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """Stopped after the VAE and gone on with, the run ends with the very files of an undisturbed one."""
    script = str(EXAMPLES / "train_tiny_diffusion.py")
    run(script, "--quick", "--threads", "1", "--out", str(tmp_path / "whole"))
    run(script, "--quick", "--threads", "1", "--out", str(tmp_path / "parts"), "--stages", "vae")
    run(script, "--quick", "--threads", "1", "--out", str(tmp_path / "parts"), "--stages", "tiny-sd")
    run(script, "--quick", "--threads", "1", "--out", str(tmp_path / "parts"))
    for name in ("tiny-sd.safetensors", "tiny-dit.safetensors", "tiny-sd-samples.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


@pytest.mark.slow
def test_the_study_of_latents_takes_its_path(tmp_path: Path) -> None:
    """On few images; its result has all that the page's tables ask for."""
    out = tmp_path / "quick.json"
    run(str(EXAMPLES / "latent_study.py"), "--quick", "--out", str(out), "--runs", str(tmp_path / "runs"))
    made, committed = (
        json.loads(path.read_text()) for path in (out, EXAMPLES.parent / "docs/results/latent-study.json")
    )

    def names(content: object) -> object:
        return {key: names(value) for key, value in content.items()} if isinstance(content, dict) else None

    for part in ("interpretability", "reconstruction", "splicing", "timesteps", "matching", "few_shot"):
        assert names(made[part]) == names(committed[part]), part


@pytest.mark.slow
def test_figures_of_the_docs_are_drawn(tmp_path: Path) -> None:
    run(str(EXAMPLES / "make_figures.py"), "--quick", "--out", str(tmp_path))
    docs = EXAMPLES.parent / "docs"
    shown = re.findall(r"]\(figures/([\w-]+\.png)\)", (docs / "figures.md").read_text(encoding="utf-8"))
    assert {path.name for path in tmp_path.iterdir()} == set(shown)
    for name in shown:
        assert (docs / "figures" / name).stat().st_size < 200_000


@pytest.mark.slow
def test_evidence_script_runs(tmp_path: Path) -> None:
    run(str(EXAMPLES / "evidence.py"), "--quick", "--out", str(tmp_path / "evidence.json"))
    results = json.loads((tmp_path / "evidence.json").read_text())["results"]
    assert set(results) == {"raw_pixels", "vae_latents", "trained", "random_weights"}
    assert all(len(r["runs"]) == 5 for r in results.values())


@pytest.mark.slow
def test_table_of_families_is_what_the_script_finds(tmp_path: Path) -> None:
    run("benchmarks/families.py", "--out", str(tmp_path / "families.md"))
    committed = (EXAMPLES.parent / "docs" / "families.md").read_text(encoding="utf-8")
    assert (tmp_path / "families.md").read_text(encoding="utf-8") == committed
