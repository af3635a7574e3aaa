"""What a probe knows at each layer and timestep, as a report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.sweep.results import SweepResults


@dataclass(frozen=True)
class Grid:
    """Accuracy at each layer (rows) and timestep (columns); None where it was not measured."""

    name: str
    layers: Sequence[str]
    timesteps: Sequence[int]
    accuracy: Sequence[Sequence[float | None]]
    chosen: tuple[str, int] | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        if [len(row) for row in self.accuracy] != [len(self.timesteps)] * len(self.layers):
            raise ValueError(
                f"accuracy has rows of {[len(row) for row in self.accuracy]} cells for {len(self.layers)} layers and "
                f"{len(self.timesteps)} timesteps. Give one row a layer, one cell a timestep, None if not measured."
            )


def sweep_grids(results: SweepResults) -> list[Grid]:
    """A grid for each model, probe, label and prompt of a sweep that has a best cell: mean accuracy of the fits."""
    grids = []
    for best in results.summary["best"]:
        own = {name: best[name] for name in ("model", "head", "label", "prompt")} | {
            "weights": "trained",
            "kind": "cell",
        }
        rows = [row for row in results.rows if all(row[name] == value for name, value in own.items())]
        measured = "test_accuracy" if best["measured_on"] == "test" else "validation_accuracy"
        fits: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            fits.setdefault((row["layer"], row["timestep"]), []).append(row[measured])
        layers, timesteps = list(dict.fromkeys(layer for layer, _ in fits)), sorted({t for _, t in fits})
        means = {cell: sum(values) / len(values) for cell, values in fits.items()}
        grids.append(
            Grid(
                ", ".join([best["model"], best["label"], f"{best['head']} probe", f"prompt: {best['prompt']}"]),
                layers,
                timesteps,
                [[means.get((layer, t)) for t in timesteps] for layer in layers],
                (best["layer"], best["timestep"]),
                f"Accuracy on {best['measured_on']} images, mean of the fits.",
            )
        )
    return grids
