"""The observations of a sweep as a table of text."""

from collections.abc import Sequence
from typing import Any

Answer = dict[str, Any]
HEADER = ["model, label", "compared", "accuracy (%)", "margin in points [95 % interval]", "exceeds the noise"]


def place(cell: Answer, *, prompt: bool = False) -> str:
    """`up_ft1, t = 25`, with the prompt's name behind it if asked for."""
    return f"{cell['layer']}, t = {cell['timestep']}" + (f", {cell['prompt']}" if prompt else "")


def interval(answer: Answer) -> str:
    return f"{100 * answer['difference']:+.1f} [{100 * answer['low']:+.1f}, {100 * answer['high']:+.1f}]"


def _row(of: str, what: str, answer: Answer) -> list[str]:
    mine, other = (100 * answer[side]["accuracy"] for side in ("mine", "other"))
    return [of, what, f"{mine:.1f} against {other:.1f}", interval(answer), "yes" if answer["exceeds_noise"] else "no"]


def observation_table(answers: Sequence[Answer]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): of each model, head and label the best cell against outer layers, the grid's first and last
    timestep, other prompts, and the best cells of other labels. The head is named where there are several.
    """
    heads = len({answer["head"] for answer in answers}) > 1
    header = ["model, label, head", *HEADER[1:]] if heads else HEADER
    rows: list[list[str]] = []
    for answer in answers:
        head = f", {answer['head']} probe" if heads else ""
        of = f"{answer['model']}, {answer['label']}{head}"
        rows += [
            _row(of, f"{place(answer)} against the {name}: {place(answer[name]['other'])}", answer[name])
            for name in ("first layer", "last layer")
            if name in answer
        ]
        ends = answer["timesteps"][:1] + answer["timesteps"][1:][-1:]
        rows += [_row(of, f"{place(answer)} against t = {one['other']['timestep']}", one) for one in ends]
        rows += [
            _row(of, f"prompt {one['mine']['prompt']} against {one['other']['prompt']}, at {place(answer)}", one)
            for one in answer["prompts"]
        ]
        rows += [
            _row(
                of,
                f"prompt {one['mine']['prompt']} against {one['other']['prompt']}, mean of {one['cells']} cells",
                one,
            )
            for one in answer["prompts over the grid"]
        ]
        rows += [
            _row(
                f"{answer['model']}, {one['mine']['label']}{head}",
                f"its best, {place(one['mine'])}, against the best of {answer['label']}, {place(answer)}",
                one,
            )
            for one in answer["labels"]
        ]
    return header, rows
