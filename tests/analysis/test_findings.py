"""The page of findings, written from hand-made tables: each verdict is what the margins say."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_sweep_observations import TIMESTEPS, cell, grid

from diffusion_sae._files import write_json
from diffusion_sae.analysis.sweep.cells import CellResult
from diffusion_sae.analysis.sweep.margins import best_cells
from diffusion_sae.analysis.sweep.observations import observations
from diffusion_sae.analysis.sweep.results import RESULTS, SUMMARY, write_table

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("findings", DOCS.parent / "examples" / "findings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables() -> list[CellResult]:
    """Two models, of which the DiT is worse by a tenth; a coarse label that is best known at the last layer."""
    made = []
    for model, less in (("tiny-sd", 0.0), ("tiny-dit", 0.1)):
        for label, shift in (("fine", 0.0), ("coarse", 0.45)):
            for one in grid(label, shift):
                share = one.validation - less
                place = {"layer": one.cell.layer, "timestep": one.cell.timestep, "label": label, "model": model}
                made += [cell(share, **place), cell(max(0.0, share - 0.3), **place, weights="random")]
            place = {"layer": "", "timestep": -1, "label": label, "model": model}
            made += [cell(0.3, **place, kind=kind) for kind in ("pixels", "latents")]
        wrong = {"prompt": "wrong class", "prompt_of": "other", "layer": "mid", "timestep": 25}
        made.append(cell(0.4, **wrong, label="fine", model=model))
    return made


@pytest.fixture(scope="module")
def page(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    docs, results = tmp_path_factory.mktemp("docs"), tables()
    for name in script.SWEEPS:
        folder = docs / "results" / "sweeps" / name
        folder.mkdir(parents=True)
        write_table(folder / RESULTS, results)
        summary: dict[str, Any] = {"config": {"dataset": name}, "fits": 2 * len(results)}
        write_json(folder / SUMMARY, summary | {"best": best_cells(results), "observations": observations(results)})
    script.write(docs / "results" / "sweeps", docs)
    return (docs / "findings.md").read_text(encoding="utf-8"), docs


def row_of(text: str, *parts: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.startswith("|") and all(part in line for part in parts)]
    return [part.strip() for part in found.strip("|").split("|")]


def test_verdicts_say_what_the_margins_say(page: tuple[str, Path]) -> None:
    text = page[0]
    assert row_of(text, "An inner layer", "Fashion-MNIST: tiny-sd, fine")[2] == "yes"
    assert row_of(text, "An inner layer", "Fashion-MNIST: tiny-sd, coarse")[2] == "no"  # the last one is
    assert row_of(text, "A small timestep", "Emoji: tiny-dit, fine")[2] == "yes"
    assert row_of(text, "A small timestep", "Emoji: tiny-dit, coarse")[2] == "no"  # t = 10 begins the grid
    assert (
        row_of(text, "A prompt with a wrong class", "Emoji: tiny-sd")[2:]
        == row_of(text, "A prompt with a wrong class", "Fashion-MNIST: tiny-sd")[2:]
    )
    assert row_of(text, "A prompt with a wrong class", "Emoji: tiny-sd")[2] == "yes"
    assert row_of(text, "Training taught it", "Emoji: tiny-sd, fine")[3].startswith("90.0 against 60.0 %: +30.0 [")
    assert row_of(text, "Better than pixels", "Emoji: tiny-sd, fine")[2] == "yes"
    assert row_of(text, "Coarse and fine", "Emoji: tiny-sd, coarse")[3].startswith("fine at its best, mid, t = 25")
    assert row_of(text, "Fashion-MNIST", "fine", "90.0", "80.0", "+10.0 [")


def test_every_figure_of_the_page_is_there(page: tuple[str, Path]) -> None:
    text, docs = page
    named = {part.split(")")[0] for part in text.split("](figures/")[1:]}
    assert named == {path.name for path in (docs / "figures").iterdir()}
    assert len(named) >= 10


def test_undecided_is_said(script: ModuleType) -> None:
    near = [cell(0.5, layer=layer, timestep=t) for layer in ("down", "mid", "up") for t in TIMESTEPS]
    (answer,) = observations(near)
    assert script.inner_layer(answer)[0] == "no"  # the first of equals is the first layer
    near[4] = cell(0.51, layer="mid", timestep=25)
    (answer,) = observations([*near])
    assert script.inner_layer(answer)[0] == "undecided"
    assert script.small_timestep(answer)[0] == "undecided"


def margin(low: float, high: float, mine: Any = None, other: Any = None) -> dict[str, Any]:
    place = {"layer": "mid", "timestep": 25, "label": "fine", "prompt": "empty"}
    sides = {"mine": place | (mine or {}), "other": place | (other or {})}
    return {"difference": (low + high) / 2, "low": low, "high": high, **sides}


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [(((0.1, 0.2), (0.1, 0.2)), "yes"), (((0.1, 0.2), (-0.2, -0.1)), "no"), (((0.1, 0.2), (-0.1, 0.2)), "undecided")],
)
def test_a_margin_that_is_negative_beyond_the_noise_is_no(script: ModuleType, ends: Any, verdict: str) -> None:
    first, last = (margin(*end) for end in ends)
    cell_of = {"layer": "mid", "timestep": 25}
    assert script.inner_layer(cell_of | {"first layer": first, "last layer": last})[0] == verdict
    timesteps = [margin(*end, other={"timestep": t}) for end, t in zip(ends, (0, 500), strict=True)]
    assert script.small_timestep(cell_of | {"timesteps": timesteps})[0] == verdict


@pytest.mark.parametrize(("timestep", "verdict"), [(250, "yes"), (500, "no")])
def test_a_small_timestep_is_at_most_a_quarter_of_the_schedule(script: ModuleType, timestep: int, verdict: str) -> None:
    timesteps = [margin(0.1, 0.2, other={"timestep": t}) for t in (0, 800)]
    assert script.small_timestep({"layer": "mid", "timestep": timestep, "timesteps": timesteps})[0] == verdict
    assert f"A timestep is small up to {script.SMALL}," in script.PREFACE


@pytest.mark.parametrize(
    ("low", "high", "layer", "verdict"),
    [(0.1, 0.2, "up", "yes"), (-0.1, 0.2, "up", "undecided"), (-0.2, -0.1, "up", "no"), (0.1, 0.2, "mid", "no")],
)
def test_another_layer_for_coarse_classes(
    script: ModuleType, low: float, high: float, layer: str, verdict: str
) -> None:
    answer = {"labels": [margin(low, high, mine={"layer": layer, "label": "coarse"})]}
    assert script.other_granularity(answer)[0][0] == verdict
    assert "both labels are best\nknown at the same layer" in script.PREFACE


def test_the_committed_page_is_of_the_committed_tables(script: ModuleType, tmp_path: Path) -> None:
    script.write(DOCS / "results" / "sweeps", tmp_path)
    assert (tmp_path / "findings.md").read_text() == (DOCS / "findings.md").read_text()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn <= {path.name for path in (DOCS / "figures").iterdir()}
