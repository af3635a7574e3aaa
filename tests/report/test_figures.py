"""The study's figure is drawn from the numbers of its JSON, and says what to install where it cannot be."""

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion_sae.report.figures.study import SAE_STUDY, sae_study_figure
from diffusion_sae.report.figures.style import save_figure


def line(method: str, k: int, expansion: int | None, fvu: float, backbone: str = "trained", **more: Any) -> dict:
    metrics = {"fvu": fvu, "dead_latents": 0.1, "accuracy, mean": 0.8} | more
    values = {name: {"mean": value, "std": 0.01} for name, value in metrics.items()}
    return {"method": method, "backbone": backbone, "k": k, "expansion": expansion} | values


@pytest.fixture
def result() -> dict[str, Any]:
    lines = [line("k-sae", k, x, 0.4 / k) for k, x in ((4, 2), (8, 2), (4, 1))]
    lines += [line("pca", k, None, 0.8 / k) for k in (4, 8)]
    lines += [line("nmf-pursuit", k, 1, 0.6 / k) for k in (4, 8)]
    return {
        "settings": {"ks": [4, 8], "expansions": [1, 2], "k": 4, "expansion": 2, "d_in": 6},
        "controls": {"features": {"test": 0.84}, "pixels": {"test": 0.8}},
        "summary": lines,
    }


def curves(axis: Any) -> list[tuple[list[float], list[float]]]:
    """(x, y) of every series."""
    return [tuple(list(part) for part in drawn.lines[0].get_data()) for drawn in axis.containers]


def test_draws_the_numbers(result: dict[str, Any]) -> None:
    axes = sae_study_figure(result).axes
    assert curves(axes[0]) == [([4, 8], [0.1, 0.05]), ([4, 8], [0.2, 0.1]), ([4, 8], [0.15, 0.075])]
    assert curves(axes[3]) == [([1, 2], [0.1, 0.1]), ([1, 2], [0.2, 0.2]), ([1], [0.15])]
    assert len(curves(axes[1])) == 2  # PCA has no latents that could be dead
    labels = [text.get_text() for text in sae_study_figure(result).legends[0].get_texts()]
    assert labels == ["k-SAE", "PCA, k components", "NMF, pursuit", "features themselves", "raw pixels"]


def test_the_same_numbers_are_the_same_file(result: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        save_figure(sae_study_figure(result), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert Image.open(tmp_path / "one.png").width == 1800


def test_no_two_series_differ_by_colour_alone() -> None:
    assert len({(series.marker, series.pursuit) for series in SAE_STUDY.values()}) == len(SAE_STUDY)


def test_without_matplotlib(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'diffusion-sae\[plots\]'"):
        sae_study_figure(result)
