"""Figures of a sweep: that they show the numbers, that no text is cut off, and the page of what is best."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from figure_checks import check_text, texts

from diffusion_sae import Sweep, SweepConfig
from diffusion_sae.analysis.sweep.results import SweepResults
from diffusion_sae.cli.main import main
from diffusion_sae.report.figures import sweeps as draw
from diffusion_sae.report.grids import sweep_grids
from diffusion_sae.report.sweep import sweep_figures
from diffusion_sae.report.sweep_observations import observation_table

Row = dict[str, Any]
LAYERS, TIMESTEPS = ("down_ft0", "bottleneck", "transformer_blocks.5.ff.net.0.proj"), (10, 100, 500)


def rows(**changes: Any) -> list[Row]:
    """Three fits a cell; accuracy falls with the timestep, more so for the fine label."""
    made = []
    for model in ("model-a", "model-b"):
        for weights in ("trained", "random"):
            for prompt in ("empty", "class template"):
                for label, classes, slope in (("breed", 37, 0.3), ("species", 2, 0.1)):
                    for i, layer in enumerate(LAYERS):
                        for j, timestep in enumerate(TIMESTEPS):
                            for seed in range(3):
                                value = 0.9 - slope * j / 3 - 0.05 * abs(i - 1) - 0.2 * (weights == "random")
                                value += 0.01 * seed
                                made.append(
                                    {
                                        "kind": "cell",
                                        "model": model,
                                        "weights": weights,
                                        "prompt": prompt,
                                        "prompt_of": "" if prompt == "empty" else "own",
                                        "layer": layer,
                                        "timestep": timestep,
                                        "head": "linear",
                                        "label": label,
                                        "num_labels": classes,
                                        "seed": seed,
                                        "validation_accuracy": value,
                                        "test_accuracy": value - 0.01,
                                    }
                                )
    return draw.pick(made, **changes)


CELLS = {"model": "model-a", "weights": "trained", "prompt": "empty", "label": "breed"}
FIGURES: dict[str, Callable[[], Any]] = {
    "accuracy_map": lambda: draw.accuracy_map(rows(**CELLS), title="model-a", chosen=("bottleneck", 10)),
    "layer_curves": lambda: draw.layer_curves(rows(**CELLS), title="model-a", levels={"raw pixels": 0.5}),
    "prompt_comparison": lambda: draw.prompt_comparison(rows(weights="trained", label="breed")),
    "architecture_comparison": lambda: draw.architecture_comparison(rows(prompt="empty", label="breed"), title="x"),
    "granularity_profile": lambda: draw.granularity_profile(rows(model="model-a", weights="trained", prompt="empty")),
}


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_whole_and_apart(name: str) -> None:
    check_text(FIGURES[name]())


def test_the_heat_map_writes_the_means_and_outlines_the_choice() -> None:
    figure = FIGURES["accuracy_map"]()
    assert {"90.0", "80.0", "70.0"} <= set(texts(figure))
    assert "…mer_blocks.5.ff.net.0.proj"[-21:] in " ".join(texts(figure))
    outline = figure.axes[0].patches[-1]
    assert (outline.get_x(), outline.get_y()) == (-0.48, 0.54)


def test_curves_have_intervals_and_differ_by_more_than_colour() -> None:
    figure = FIGURES["layer_curves"]()
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(LAYERS) == len(lines)
    assert len(figure.axes[0].collections) == len(LAYERS)
    mean, half = draw.mean_and_interval([0.89, 0.9, 0.91])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.30 * 0.01 / 3**0.5, rel=1e-3)  # Student's t, two degrees of freedom


def test_only_the_best_layers_are_drawn_where_there_are_many() -> None:
    figure = draw.layer_curves(rows(**CELLS), most=1)
    assert "bottleneck" in texts(figure)
    assert "down_ft0" not in texts(figure)


def measured(label: str, classes: int, accuracies: dict[tuple[str, int], tuple[float, float]]) -> list[Row]:
    """Three fits a cell, of (validation, test) accuracy by (layer, timestep); the tests are 0.01 apart."""
    named = {"label": label, "num_labels": classes}
    return [
        named | {"layer": layer, "timestep": t, "validation_accuracy": validation, "test_accuracy": test + 0.01 * seed}
        for (layer, t), (validation, test) in accuracies.items()
        for seed in (-1, 0, 1)
    ]


# where validation and test disagree: validation chooses a, t = 10; test is best at b, t = 100
DISAGREE = {("a", 10): (0.9, 0.7), ("a", 100): (0.6, 0.8), ("b", 10): (0.5, 0.6), ("b", 100): (0.4, 0.9)}


def test_the_layers_drawn_are_chosen_on_validation_and_the_rest_is_counted() -> None:
    figure = draw.layer_curves(measured("x", 4, DISAGREE), most=1)
    assert "a" in texts(figure)
    assert "b" not in texts(figure)
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([70, 80])  # test
    assert "timestep (of 2 layers the best 1 on validation images)" in texts(figure)
    assert "timestep" in texts(draw.layer_curves(measured("x", 4, DISAGREE)))


def test_granularity_is_relative_to_the_cell_chosen_on_validation_and_to_the_base_rate() -> None:
    share = draw.relative_accuracy(measured("x", 4, DISAGREE))
    assert share["a", 10][0] == pytest.approx(1)
    assert share["b", 100][0] == pytest.approx((0.9 - 0.25) / (0.7 - 0.25))
    share = draw.relative_accuracy(measured("x", 4, DISAGREE), base_rate=0.5)
    assert share["b", 10] == pytest.approx((0.5, 4.30 * 0.01 / 3**0.5 / 0.2), rel=1e-3)
    below = draw.relative_accuracy(measured("x", 4, DISAGREE), base_rate=0.75)
    assert all(math.isnan(value) for value, _ in below.values())


def test_the_granularity_profile_chooses_on_validation_and_names_its_base_rates() -> None:
    own = measured("kind", 4, DISAGREE) + measured("fine", 10, DISAGREE)
    figure = draw.granularity_profile(own, base_rates={"kind": 0.5})
    check_text(figure)
    assert {"kind (4 classes, shuffled: 50.0 %)", "fine (10 classes, 1/classes: 10.0 %)"} <= set(texts(figure))
    left, right = figure.axes
    assert left.lines[0].get_ydata() == pytest.approx([100, 50])  # a at t = 10; b at t = 10, not at 100
    assert right.lines[0].get_ydata() == pytest.approx([100, 150])  # a both times, though b is better on test
    assert len(left.collections) == len(right.collections) == 2  # intervals


def test_the_head_is_named_where_there_are_several() -> None:
    cell = {"layer": "up", "timestep": 10, "label": "fine", "prompt": "empty", "accuracy": 0.9}
    margin = {"mine": cell, "other": cell, "difference": 0.1, "low": 0.0, "high": 0.2, "exceeds_noise": False}
    answers = [
        cell
        | {"model": "m", "head": head, "first layer": margin, "timesteps": [], "labels": [margin]}
        | {"prompts": [], "prompts over the grid": []}
        for head in ("linear", "mlp")
    ]
    header, lines = observation_table(answers)
    assert header[0] == "model, label, head"
    assert [line[0] for line in lines] == ["m, fine, linear probe"] * 2 + ["m, fine, mlp probe"] * 2
    header, lines = observation_table(answers[:1])
    assert (header[0], lines[0][0]) == ("model, label", "m, fine")


def test_a_sweeps_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    groups = {"shoes": ["sandal", "sneaker", "ankle boot"], "bags": ["bag"], "trousers": ["trouser"]}
    groups["tops"] = ["T-shirt", "pullover", "dress", "coat", "shirt"]
    config = SweepConfig(
        output_dir=str(folder),
        timesteps=(25, 300),
        limit=40,
        seeds=(0, 1),
        weights=("trained", "random"),
        prompts=("", "a photo of a {}"),
        labels=("label", {"name": "kind", "groups": groups}),
    )
    Sweep(config, progress=False).run()
    assert main(["report", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = {Path(path).stem for path in result["figures"]}
    kinds = {name.split("-")[0] for name in names}
    assert kinds == {"map", "curves", "prompts", "models", "granularity"}
    findings = Path(result["findings"]).read_text()
    best = json.loads((folder / "sweep.json").read_text())["best"][0]
    assert f"{best['layer']} at t = {best['timestep']}" in findings
    assert f"{100 * best['accuracy']:.1f}" in findings
    assert "exceeds the noise" in findings
    assert re.search(r"\| pixels \| [\d.]+ \| [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] \| (yes|no) \|", findings)
    page = Path(result["page"]).read_text()
    for path in result["figures"]:
        assert f'src="{Path(path).name}"' in page
        assert Path(path).stat().st_size > 5000
    (profile,) = [figure for name, (_, figure) in sweep_figures(SweepResults.read(folder)).items() if "granul" in name]
    assert {text.split(", ")[1].split(":")[0] for text in texts(profile) if " classes, " in text} == {"shuffled"}
    grids = sweep_grids(SweepResults.read(folder))
    assert grids[0].chosen == (best["layer"], best["timestep"])
    row, column = grids[0].layers.index(best["layer"]), list(grids[0].timesteps).index(best["timestep"])
    assert grids[0].accuracy[row][column] == pytest.approx(best["accuracy"])
    assert main(["report", str(folder), str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "findings.md").read_text() == findings


def test_of_prompts_that_are_all_made_of_the_class_no_cell_is_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"timesteps": (25, 300), "limit": 40, "seeds": (0,), "baselines": ()}
    Sweep(SweepConfig(output_dir=str(tmp_path), prompts=("a photo of a {}",), **settings), progress=False).run()
    assert main(["report", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in result["figures"]] == ["map-tiny-sd-linear-label-a-photo-of-a.png"]
    for path in (result["page"], result["findings"]):
        text = Path(path).read_text()
        assert "No cell is the best: every prompt is made of the image" in text
        assert "Observations" not in text


def test_a_report_of_nothing_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "SAE STORE DATASET OUTPUT_DIR; or the folder of a finished sweep" in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "from diffusion_sae.report.figures.sweeps import accuracy_map\n"
        "try: accuracy_map([{'layer': 'a', 'timestep': 1, 'validation_accuracy': 1.0, 'test_accuracy': 1.0}])\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'diffusion-sae[plots]'" in done.stdout
