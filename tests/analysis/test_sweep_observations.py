"""Observations: which cells of a hand-made grid are compared, and with what difference."""

import torch
from test_sweep_margins import result

from diffusion_sae.analysis.sweep.cells import CellResult
from diffusion_sae.analysis.sweep.observations import observations
from diffusion_sae.report.sweep_observations import HEADER, observation_table

IMAGES = 40
SHARES = {"down": (0.2, 0.1, 0.1), "mid": (0.6, 0.9, 0.3), "up": (0.5, 0.4, 0.2)}
TIMESTEPS = (10, 25, 500)


def cell(share: float, **settings: object) -> CellResult:
    """Two fits that are right on the first images, `share` of them."""
    hits = (torch.arange(IMAGES) < share * IMAGES).expand(2, -1)
    return result(hits, validation=share, **({"label": "fine"} | settings))


def grid(label: str = "fine", shift: float = 0.0) -> list[CellResult]:
    return [
        cell(share + shift * (layer == "up"), layer=layer, timestep=t, label=label)
        for layer, shares in SHARES.items()
        for t, share in zip(TIMESTEPS, shares, strict=True)
    ]


def test_the_best_cell_is_compared_with_outer_layers_and_other_timesteps() -> None:
    (answer,) = observations(grid())
    assert (answer["layer"], answer["timestep"], answer["cells"], answer["fits"]) == ("mid", 25, 9, 2)
    assert answer["first layer"]["other"]["layer"] == "down"
    assert answer["first layer"]["other"]["timestep"] == 10
    assert abs(answer["first layer"]["difference"] - 0.7) < 1e-9
    assert abs(answer["last layer"]["difference"] - 0.4) < 1e-9
    assert [one["other"]["timestep"] for one in answer["timesteps"]] == [10, 500]
    assert [round(one["difference"], 6) for one in answer["timesteps"]] == [0.3, 0.6]
    assert answer["tied"] == 0
    assert answer["prompts"] == answer["labels"] == answer["prompts over the grid"] == []


def test_cells_that_are_as_good_are_counted() -> None:
    as_good = cell(0.9, layer="up", timestep=800)
    (answer,) = observations([*grid(), as_good])
    assert (answer["tied"], answer["cells"]) == (1, 10)


def test_the_outermost_layer_may_be_the_best() -> None:
    (answer,) = observations(grid(shift=0.45))
    assert answer["layer"] == "up"
    assert "last layer" not in answer
    assert answer["first layer"]["mine"]["layer"] == "up"


def test_prompts_are_compared_at_the_best_place_and_never_taken_for_it() -> None:
    told = cell(1.0, layer="mid", timestep=25, prompt="class template", prompt_of="own")
    elsewhere = cell(1.0, layer="up", timestep=25, prompt="class template", prompt_of="own")
    (answer,) = observations([*grid(), told, elsewhere])
    assert answer["layer"] == "mid"
    (prompt,) = answer["prompts"]
    assert prompt["mine"]["prompt"] == "class template"
    assert abs(prompt["difference"] - 0.1) < 1e-9


def test_prompts_are_compared_over_the_whole_grid() -> None:
    """At the best cell the wrong class is 0.1 better, at two others 0.2 and 0.5 worse: 0.2 worse in the mean."""
    wrong = {"prompt": "wrong class", "prompt_of": "other"}
    shares = {("mid", 25): 1.0, ("mid", 10): 0.4, ("up", 10): 0.0}
    others = [cell(share, layer=layer, timestep=t, **wrong) for (layer, t), share in shares.items()]
    alone = cell(1.0, layer="elsewhere", timestep=25, **wrong)  # the other prompt has no such cell
    (answer,) = observations([*grid(), *others, alone])
    (prompt,) = answer["prompts over the grid"]
    assert (prompt["mine"]["prompt"], prompt["cells"], prompt["lower"]) == ("wrong class", 3, 2)
    assert abs(prompt["difference"] + 0.2) < 1e-9
    assert abs(prompt["mine"]["accuracy"] - 1.4 / 3) < 1e-9
    assert prompt["low"] < prompt["difference"] < prompt["high"]
    _, rows = observation_table([answer])
    assert any(row[1] == "prompt wrong class against empty, mean of 3 cells" for row in rows)


def test_a_prompt_made_of_a_class_is_compared_with_every_other_one() -> None:
    wrong, text = {"prompt": "wrong class", "prompt_of": "other"}, {"prompt": "other text"}
    others = [cell(share, layer="mid", timestep=25, **which) for share, which in ((0.5, wrong), (0.7, text))]
    (answer,) = observations([*grid(), *others])
    found = {(one["mine"]["prompt"], one["other"]["prompt"]): one for one in answer["prompts over the grid"]}
    assert list(found) == [("wrong class", "empty"), ("other text", "empty"), ("wrong class", "other text")]
    assert abs(found["wrong class", "other text"]["difference"] + 0.2) < 1e-9


def test_labels_are_compared_at_each_others_best_cell() -> None:
    fine, coarse = observations([*grid(), *grid("coarse", shift=0.45)])
    assert (coarse["layer"], coarse["timestep"]) == ("up", 10)
    (of_coarse,) = fine["labels"]  # the coarse label where the fine one is best
    assert of_coarse["mine"]["label"] == "coarse"
    assert of_coarse["other"]["layer"] == "mid"
    assert abs(of_coarse["difference"] - 0.05) < 1e-9
    (of_fine,) = coarse["labels"]
    assert abs(of_fine["difference"] - 0.4) < 1e-9


def test_the_table_says_both_sides() -> None:
    header, rows = observation_table(observations([*grid(), *grid("coarse", shift=0.45)]))
    assert header == HEADER
    assert {len(row) for row in rows} == {len(HEADER)}
    assert rows[0] == [
        "m, fine",
        "mid, t = 25 against the first layer: down, t = 10",
        "90.0 against 20.0",
        rows[0][3],
        "yes",
    ]
    assert rows[0][3].startswith("+70.0 [+")
    assert any(row[1] == "its best, up, t = 10, against the best of fine, mid, t = 25" for row in rows)
