"""Every family of figures: that it draws the numbers, what it refuses, and that no text is cut off or hidden."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from figure_checks import check_text, drawn_texts, texts
from PIL import Image

from diffusion_sae.analysis.maps import ColourMaps, ImageMap, PositionColours
from diffusion_sae.report.figures.curves import Curve, curves, draw_curves, read_history, training_curves
from diffusion_sae.report.figures.densities import density_histogram
from diffusion_sae.report.figures.grids import heat_map
from diffusion_sae.report.figures.maps import colour_map_figure, image_map_figure
from diffusion_sae.report.figures.style import (
    figure_bytes,
    ink_on,
    plain_text,
    save_figure,
    series_style,
    shortened,
    text_width,
)

LAYERS = ("down_ft0", "bottleneck", "transformer_blocks.5.attn1.to_out.0.of.a.very.deep.module", "up_ft1")
TIMESTEPS = (1, 50, 500)
GRID = np.array([[0.5, 0.612, math.nan], [0.7, 0.9, 0.8], [math.nan] * 3, [0.1, 0.2, 0.3]])
HOSTILE = "$\\frac{<script>$ \n" * 40
HISTORY = [{"step": i, "loss": 1 / i, "fvu": 0.5} for i in range(10, 400, 10)] + [
    {"step": s, "eval_fvu": 0.6, "eval_l0": 16.0} for s in (200, 400)
]
POINTS = ImageMap(np.random.default_rng(0).normal(size=(300, 2)), {"method": "pca", "explained": [0.4, 0.1]})


def colour_maps(images: int = 2) -> dict[tuple[str, int], ColourMaps]:
    colours = PositionColours.fit(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))
    cells = [(layer, t) for layer in LAYERS[:3] for t in (25, 500)]
    return {cell: ColourMaps(np.full((images, 4, 4, 3), 0.1 * i), colours) for i, cell in enumerate(cells)}


PICTURES = [Image.new("RGB", (40, 30), "white"), Image.new("L", (200, 200), 90)]
CURVE = Curve([1, 10, 100], [0.5, math.nan, 0.7], [0.4, math.nan, 0.6], [0.6, math.nan, 0.8])
FIGURES: dict[str, Callable[[], Any]] = {
    "heat map": lambda: heat_map(GRID, LAYERS, TIMESTEPS, title="a", label="accuracy", chosen=("bottleneck", 50)),
    "heat map, one row": lambda: heat_map(GRID[:1], LAYERS[:1], TIMESTEPS, title=HOSTILE, label=HOSTILE),
    "heat map, nothing": lambda: heat_map([[math.nan]], ["a"], [1]),
    "heat map, large": lambda: heat_map(np.eye(70, 60), [f"block{i}" for i in range(70)], range(0, 960, 16)),
    "curves": lambda: curves({f"layer {i}": CURVE for i in range(9)}, x_scale="even", levels={"pixels": 0.3}),
    "curves, hostile": lambda: curves({"_" + HOSTILE: CURVE}, title=HOSTILE, x_scale="log", x_label=HOSTILE[:20]),
    "training": lambda: training_curves(HISTORY, title=HOSTILE),
    "trainings": lambda: training_curves({"k = 16": HISTORY, HOSTILE: HISTORY}, metrics=["loss"]),
    "density": lambda: density_histogram(np.array([0, 0, 1e-5, 1e-3, 0.5]), title=HOSTILE),
    "density, none": lambda: density_histogram(torch.zeros(4), of="images"),
    "densities": lambda: density_histogram({"one": np.full(9, 1e-3), HOSTILE: np.geomspace(1e-6, 1, 9)}),
    "image map": lambda: image_map_figure(POINTS, np.arange(300) % 10, [f"{HOSTILE}{i}" for i in range(10)], title="a"),
    "image map, many": lambda: image_map_figure(POINTS, np.arange(300) % 90, [f"class {i}" for i in range(90)]),
    "image map, bare": lambda: image_map_figure(ImageMap(POINTS.points[:4], {"method": "umap"})),
    "colour maps": lambda: colour_map_figure(colour_maps(), PICTURES, title=HOSTILE),
    "colour maps, one": lambda: colour_map_figure(colour_maps(), PICTURES, image=1, title="an image"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_whole_and_apart(name: str) -> None:
    check_text(FIGURES[name]())


def test_a_heat_map_writes_hatches_and_outlines() -> None:
    axes = (figure := FIGURES["heat map"]()).axes[0]
    assert {"50.0", "61.2", "90.0", "accuracy", "timestep", "bottleneck"} <= set(texts(figure))
    assert [t for t in texts(figure) if t.startswith("…") and LAYERS[2].endswith(t[1:])]
    assert texts(figure).count("–") == 4
    assert sum(bool(patch.get_hatch()) for patch in axes.patches) == 4
    outline = axes.patches[-1]
    assert (round(outline.get_x() + outline.get_width() / 2), round(outline.get_y() + 0.46)) == (1, 1)
    by_place = {text.get_position(): text for text in axes.texts}
    assert (by_place[1, 1].get_color(), by_place[0, 3].get_color()) == ("black", "white")  # 90 % is light, 10 % dark
    large = FIGURES["heat map, large"]()
    assert not large.axes[0].texts
    assert large.get_figheight() < 13
    assert "0.123" in texts(heat_map([[0.1234]], ["a"], [1], share=False))


def test_heat_maps_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"4 layers, 2 timesteps, values of the shape \(4, 3\)"):
        heat_map(GRID, LAYERS, (1, 2))
    with pytest.raises(ValueError, match=r"chosen is \('up_ft9', 1\); choose a layer of"):
        heat_map(GRID, LAYERS, TIMESTEPS, chosen=("up_ft9", 1))


def test_curves_have_bands_breaks_and_levels() -> None:
    axes = FIGURES["curves"]().axes[0]
    assert len(axes.collections) == 9
    first = axes.lines[0]
    assert np.isnan(first.get_ydata()[1])
    assert list(first.get_xdata()) == [0, 1, 2]
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in axes.lines[:9]}
    assert len(looks) == 9
    assert axes.lines[9].get_ydata()[0] == 0.3
    legend = FIGURES["curves"]().legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [*(f"layer {i}" for i in range(9)), "pixels"]
    assert len({(s["color"], s["marker"]) for s in map(series_style, range(49))}) == 49


def test_curves_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="series is empty"):
        curves({})
    with pytest.raises(ValueError, match="The curve 'a' must have as many x as y"):
        curves({"a": Curve([1, 2], [1])})
    with pytest.raises(ValueError, match="as many low and high or neither"):
        curves({"a": Curve([1], [1], low=[0])})
    with pytest.raises(ValueError, match="x_scale must be one of 'linear', 'log', 'even', got 'cubic'"):
        draw_curves(mpl.figure.Figure().subplots(), {"a": CURVE}, x_scale="cubic")


def test_a_training_has_a_panel_a_metric() -> None:
    figure = training_curves(HISTORY)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "fvu", "l0"]
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 1]
    assert figure.axes[0].get_yscale() == "log"
    held_out = figure.axes[1].lines[1]
    assert (list(held_out.get_xdata()), held_out.get_linestyle()) == ([200, 400], "--")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "held out"]
    with pytest.raises(ValueError, match=r"The log has no accuracy. It has: loss, fvu, l0"):
        training_curves(HISTORY, metrics=["accuracy"])
    with pytest.raises(ValueError, match=r"The log has no metrics. It has: nothing"):
        training_curves([])


def test_logs(tmp_path: Path) -> None:
    (tmp_path / "training_history.json").write_text(json.dumps(HISTORY))
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, HISTORY)) + "\n")
    assert read_history(tmp_path) == read_history(tmp_path / "log.jsonl") == HISTORY
    with pytest.raises(FileNotFoundError, match=r"There is no log of a training at .*elsewhere"):
        read_history(tmp_path / "elsewhere")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2 is not valid JSON"):
        read_history(tmp_path / "log.jsonl")


def test_a_histogram_counts_every_latent() -> None:
    figure = density_histogram(np.array([0, 0, 1e-5, 1e-3, 0.5]), title="an SAE")
    dead, living = figure.axes
    assert dead.patches[0].get_height() == 2
    assert living.patches[0].get_data().values.sum() == 3
    assert "an SAE; 40.0% of 5 latents are dead" in texts(figure)
    several = FIGURES["densities"]()
    assert [patch.get_data().values.sum() for patch in several.axes[1].patches] == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="Densities of 'b' must be shares in 0…1 of one latent at least"):
        density_histogram({"a": np.ones(2), "b": np.array([2.0])})


def test_a_map_has_all_images() -> None:
    figure = FIGURES["image map"]()
    assert sum(len(drawn.get_offsets()) for drawn in figure.axes[0].collections) == 300
    assert len(figure.legends[0].get_texts()) == 10
    assert "first component (40 % of the variance)" in texts(figure)
    looks = {(len(c.get_facecolor()), len(c.get_paths()[0].vertices)) for c in figure.axes[0].collections}
    assert {filled for filled, _ in looks} == {0, 1}  # after seven classes the markers are open
    many = FIGURES["image map, many"]()
    assert not many.legends
    assert 3 < sum(text.startswith("class ") for text in texts(many)) <= 40
    with pytest.raises(ValueError, match="There are 300 images in the map and 2 labels"):
        image_map_figure(POINTS, np.zeros(2, np.int64))


def test_colours_stand_in_their_cells() -> None:
    figure = FIGURES["colour maps"]()
    pictures = figure.axes[0].images
    assert len(pictures) == 2 * (1 + 6)
    assert pictures[0].get_array().shape == (30, 30, 3)
    assert pictures[3].get_array()[0, 0, 0] == pytest.approx(0.2)
    assert texts(figure).count("t = 25") == 3
    one = FIGURES["colour maps, one"]()
    assert len(one.axes[0].images) == 1 + 6
    assert {"down_ft0", "bottleneck", "t = 500", "image"} <= set(texts(one))
    with pytest.raises(ValueError, match=r"The maps are of \[2\] images; got 1 pictures and image=None"):
        colour_map_figure(colour_maps(), PICTURES[:1])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_are_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    paths = [save_figure(FIGURES["curves"](), tmp_path / f"{name}.{suffix}") for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert paths[0].read_bytes().startswith(starts[suffix])


def test_what_files_cannot_be(tmp_path: Path) -> None:
    figure = FIGURES["density"]()
    with pytest.raises(ValueError, match=r"the suffix of 'a.jpg' must be one of 'png', 'svg', 'pdf'"):
        save_figure(figure, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="colours are of PNG files, got 16 for svg"):
        save_figure(figure, tmp_path / "a.svg", colours=16)
    with pytest.raises(ValueError, match="kind must be one of 'png', 'svg', 'pdf', got 'gif'"):
        figure_bytes(figure, "gif")
    small = save_figure(figure, tmp_path / "a.png", colours=16, dpi=50)
    assert Image.open(small).mode == "P"
    assert Image.open(small).width == 450


def test_the_users_style_does_not_change_a_figure(tmp_path: Path) -> None:
    plain = save_figure(FIGURES["density"](), tmp_path / "plain.png").read_bytes()
    with mpl.rc_context({"text.color": "white", "axes.facecolor": "black", "lines.linewidth": 9, "font.size": 20}):
        assert save_figure(FIGURES["density"](), tmp_path / "own.png").read_bytes() == plain
        assert mpl.rcParams["font.size"] == 20


def test_text_is_measured_and_shortened() -> None:
    line = "an ankle boot with a heel"
    assert shortened(line, 5) == line
    for end in (False, True):
        short = shortened(line, 1.0, end=end)
        assert text_width(short) <= 1.0 < text_width(short + line[:2])
        assert line.endswith(short[1:]) if end else line.startswith(short[:-1])
        assert "…" in short
    assert shortened("x" * 100_000, 1.0) == shortened("x" * 90_000, 1.0)
    assert plain_text("a\x00b\n$c$") == "a\ufffdb \\$c\\$"
    drawn = drawn_texts(curves({"costs 5 $ or $": CURVE}))
    assert any(text.get_text() == r"costs 5 \$ or \$" for text in drawn)
    assert (ink_on((1, 1, 0)), ink_on((0, 0, 0.6))) == ("black", "white")
