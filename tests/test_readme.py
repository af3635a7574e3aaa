"""README's code runs, and its numbers are those of the committed results."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (shown,) = re.findall(r"^# (\[\{'label'.*)…", README, flags=re.MULTILINE)
    assert shown in done.stdout
    assert "up_ft3" in done.stdout


def test_python_blocks_of_the_page_on_saes_run_in_order(tmp_path: Path) -> None:
    page = (ROOT / "docs/saes.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, several, at_25, steps = done.stdout.splitlines()
    assert alone.startswith("SAEMetrics(fvu=0.")
    assert len(several.split(",")) == 4
    assert 0 < float(at_25) < 1
    assert int(steps) < 200, "the callback had nothing to do"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", blocks("bash")[0], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_command_line_block_runs(tmp_path: Path) -> None:
    lines = blocks("bash")[1].strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line)
        done = subprocess.run(
            [Path(sys.executable).parent / program, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert (tmp_path / "runs/cli/report/index.html").is_file()


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-dit"])
def test_evidence_table_is_the_committed_result(model: str) -> None:
    results = json.loads((ROOT / f"docs/results/evidence-{model}.json").read_text())["results"]
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {model} ")]
    numbers = re.findall(r"(\d+\.\d) ± (\d+\.\d)", row)
    names = ("trained", "raw_pixels", "vae_latents", "random_weights")
    expected = [(f"{100 * results[n]['test_mean']:.1f}", f"{100 * results[n]['test_std']:.1f}") for n in names]
    assert numbers == expected
    assert f"`{results['trained']['layer']}`" in README


def test_speed_is_the_committed_result() -> None:
    models = json.loads((ROOT / "docs/results/extraction-speed.json").read_text())["models"]
    ratios = [measures[name]["ratio"] for measures in models.values() for name in ("overhead", "sweep")]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} of the time of the bare modules" in README


def test_training_speed_is_the_committed_result() -> None:
    shapes = json.loads((ROOT / "docs/results/sae-training-speed.json").read_text())["shapes"].values()
    seconds = [{name: c["median_seconds"] for name, c in shape["contenders"].items()} for shape in shapes]
    over_limit = [shape["ours"] / shape["limit"] for shape in seconds]
    ours = ("ours", "ours-fp32", "limit")
    others = [{n: s / shape["ours"] for n, s in shape.items() if n not in ours} for shape in seconds]
    assert {len(ratios) for ratios in others} == {6}  # sae-lens with both of its ways
    fastest = [min(ratios.values()) for ratios in others]
    assert f"takes {min(over_limit):.2f} to {max(over_limit):.2f} times as long as one product" in README
    assert f"libraries the fastest takes {min(fastest):.2f} to {max(fastest):.2f} times as long as ours" in README
