"""The study of k-SAEs on a tiny setting: all of its cells, and that none is measured twice."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "sae_study.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sae_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sae_study"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_all_cells_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(script.QUICK, ks=(4,), expansions=(1, 2), steps=3, limit=40)
    study = script.Study(plan, tmp_path)
    result = script.results(study, workers=1)
    cells = {(run["method"], run["backbone"], run["k"], run["expansion"], run["seed"]) for run in result["runs"]}
    assert len(cells) == len(result["runs"])
    of_sae = {cell for cell in cells if cell[:2] == ("k-sae", "trained")}
    assert of_sae == {("k-sae", "trained", 4, expansion, seed) for expansion in (1, 2) for seed in (0, 1)}
    assert ("k-sae", "random-weights", 4, 2, 0) in cells
    assert {cell[0] for cell in cells} == {
        *("k-sae", "k-sae-pursuit", "pca", "nmf-pursuit", "k-means", "k-means-pursuit", "random", "random-pursuit")
    }
    centre = next(entry for entry in result["summary"] if entry["method"] == "k-sae" and entry["expansion"] == 2)
    assert centre["seeds"] == 2
    assert centre["fvu"]["std"] > 0
    assert result["rows"] == {"train": 640, "validation": 640, "test": 640}
    assert script.sae_study_figure(result).axes

    monkeypatch.setattr(script, "work", None)  # nothing is left to do
    script.carry_out(study, 96, workers=1)
    assert script.collect(study, 96) == result["runs"]
    changed = script.Study(dataclasses.replace(plan, steps=4), tmp_path)
    assert changed.file(script.Cell("pca", "trained", 4, None, 0)).exists()
    with pytest.raises(TypeError, match="NoneType"):  # k-SAEs of another recipe are not taken for these
        script.carry_out(changed, 96, workers=1)
