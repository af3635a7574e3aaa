"""Margins: against a hand-made case, and intervals that hold what they promise."""

import torch

from diffusion_sae.analysis.sweep.cells import Cell, CellResult, SeedResult, pack, unpack
from diffusion_sae.analysis.sweep.margins import Point, best_cells, margin


def result(hits: torch.Tensor, validation: float = 0.5, **cell: object) -> CellResult:
    """Of (seeds, images)."""
    settings = {
        "kind": "cell",
        "model": "m",
        "weights": "trained",
        "draw": 0,
        "prompt": "empty",
        "prompt_of": "",
        "layer": "up_ft1",
        "timestep": 25,
        "head": "linear",
        "label": "label",
    }
    seeds = [
        SeedResult(number, validation, 1.0, row.double().mean().item(), 0.1, None, 0.0, pack(row))
        for number, row in enumerate(hits)
    ]
    rows = {"train": 10, "validation": 10, "test": hits.shape[1]}
    return CellResult(Cell(**(settings | cell)), 10, rows, 3, seeds)  # type: ignore[arg-type]


def draw(share: float, images: int, seeds: int, seed: int) -> torch.Tensor:
    return torch.rand(seeds, images, generator=torch.Generator().manual_seed(seed)) < share


def test_bits_come_back() -> None:
    bits = draw(0.5, 77, 1, 0)[0]
    assert torch.equal(unpack(pack(bits), 77), bits)


def test_a_large_difference_exceeds_the_noise_and_none_does_not() -> None:
    high, low = (Point([result(draw(share, 400, 3, 0))]) for share in (0.8, 0.6))
    found = margin(high, low)
    assert found["difference"] == (high.hits().double() - low.hits().double()).mean().item()
    assert found["low"] < found["difference"] < found["high"]
    assert found["exceeds_noise"]
    assert not margin(high, high)["exceeds_noise"]
    assert margin(low, high)["exceeds_noise"], "a loss counts as well"


def test_pairing_images_makes_the_interval_narrower() -> None:
    """Two probes that fail on almost the same images can be told apart where unrelated ones cannot."""
    base = draw(0.7, 400, 1, 0)
    better = base.clone()
    better[0, torch.nonzero(~base[0]).flatten()[:12]] = True
    assert margin(Point([result(better)]), Point([result(base)]))["exceeds_noise"]
    unrelated = draw(0.7, 400, 1, 5)
    assert not margin(Point([result(better)]), Point([result(unrelated)]))["exceeds_noise"]


def test_intervals_hold_equal_probes_as_often_as_they_say() -> None:
    covered = 0
    for trial in range(40):
        one, other = (Point([result(draw(0.7, 100, 3, 2 * trial + side))]) for side in (0, 1))
        covered += not margin(one, other)["exceeds_noise"]
    assert covered >= 34


def test_fits_of_other_numbers_are_compared_by_their_means() -> None:
    found = margin(Point([result(draw(0.8, 300, 3, 0))]), Point([result(draw(0.4, 300, 1, 1))]))
    assert found["exceeds_noise"]


def test_the_best_is_chosen_on_validation_and_draws_are_one_cell() -> None:
    weak, strong = draw(0.5, 100, 2, 0), draw(0.9, 100, 2, 1)
    cells = [
        result(weak, 0.9, layer="a"),
        result(weak, 0.7, layer="a", draw=1),
        result(strong, 0.75, layer="b"),
        result(strong, 0.99, layer="c", prompt="class", prompt_of="own"),
        result(strong, 0.95, layer="a", weights="random"),
        result(weak, 0.6, kind="pixels", layer="", timestep=-1, prompt=""),
    ]
    (best,) = best_cells(cells)
    assert (best["layer"], best["validation_accuracy"]) == ("a", 0.8)
    assert set(best["margins"]) == {"second best", "random weights", "pixels"}
    assert best["margins"]["second best"]["layer"] == "b"
    assert best["margins"]["second best"]["difference"] < 0
