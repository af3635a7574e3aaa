"""Does an SAE find the truth? Share of the directions of a known dictionary that recipes recover at equal steps.

    python benchmarks/sae_recovery.py --search                                   # the search alone
    python benchmarks/sae_recovery.py --out docs/results/sae-recovery.json       # search and comparison

Features are superpositions of known directions with power-law frequencies (`SyntheticDictionary`); every seed has a
dictionary, rows and initial weights of its own. A recipe is a config and `SAETrainingArguments`; all take the same
rows, batch size and number of steps. The search and the comparison have different seeds.
`found` is the share of true directions with a cosine above 0.9 to some decoder row, `dead` that of latents which are
active in none of 65,536 held-out rows, `explained` 1 − FVU on these.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import machine

from diffusion_sae._files import write_json
from diffusion_sae.analysis.recovery import SyntheticDictionary, recovery
from diffusion_sae.sae.configuration import KSparseAutoencoderConfig
from diffusion_sae.sae.modeling import KSparseAutoencoder
from diffusion_sae.sae.schedule import learning_rate_factor
from diffusion_sae.sae.step import TrainingStep
from diffusion_sae.sae.training_args import SAETrainingArguments

BATCH, STEPS, HELD_OUT, PART = 1024, 2000, 65_536, 8192
LOOKS = (125, 250, 500, 1000)  # steps at which a run is looked at on its way
SEARCH_SEEDS, SEEDS = (0, 1), (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Setting:
    d_in: int
    num_features: int
    num_latents: int
    k: int

    @property
    def name(self) -> str:
        return f"d{self.d_in} n{self.num_latents} k{self.k}"


@dataclass(frozen=True)
class Recipe:
    """None: the library's default."""

    name: str
    learning_rate: float | None = None
    warmup_steps: int | None = None
    auxk: int | None = None
    dead_after_rows: int | None = None
    lr_scheduler_type: str | None = None
    encoder_init: str = "tied"
    activation: str = "topk"

    def arguments(self) -> SAETrainingArguments:
        names = ("learning_rate", "warmup_steps", "auxk", "dead_after_rows", "lr_scheduler_type")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SAETrainingArguments(output_dir="unused", batch_size=BATCH, **given)


def train(recipe: Recipe, setting: Setting, seed: int, steps: int = STEPS) -> dict[str, Any]:
    torch.set_num_threads(1)
    truth = SyntheticDictionary(num_features=setting.num_features, d_in=setting.d_in, seed=seed)
    config = KSparseAutoencoderConfig(
        d_in=setting.d_in,
        num_latents=setting.num_latents,
        k=setting.k,
        encoder_init=recipe.encoder_init,
        activation=recipe.activation,
        init_seed=seed,
    )
    sae, args = KSparseAutoencoder(config), recipe.arguments()
    held_out = torch.cat([truth.rows(PART, STEPS + part) for part in range(HELD_OUT // PART)])
    with torch.no_grad():
        sae.b_dec.copy_(truth.rows(PART, 2 * STEPS).mean(0))
    step = TrainingStep(sae, args)
    rate = args.peak_learning_rate(setting.d_in)
    factor = learning_rate_factor(args, step.optimizer, steps)
    started = time.perf_counter()
    on_the_way = {}
    for number in range(steps):
        step(truth.rows(BATCH, number), rate * factor(number + 1))
        if number + 1 in LOOKS:
            dead = float((step.rows_since_active >= HELD_OUT).float().mean())
            on_the_way[str(number + 1)] = [round(recovery(sae.W_dec, truth.directions).found, 4), round(dead, 4)]
    seconds = time.perf_counter() - started
    sae.eval()
    active, error = torch.zeros(setting.num_latents, dtype=torch.bool), 0.0
    with torch.no_grad():
        for rows in held_out.split(PART):
            code = sae.encode(rows)
            active[code.top_indices[code.top_acts != 0]] = True
            error += float((sae.decode(code) - rows).pow(2).sum())
    variance = float((held_out - held_out.mean(0)).pow(2).sum())
    found = recovery(sae.W_dec, truth.directions)
    return {
        "setting": setting.name,
        "recipe": recipe.name,
        "seed": seed,
        "found": round(found.found, 4),
        "mean_max_cosine": round(found.mean_max_cosine, 4),
        "dead": round(1 - active.float().mean().item(), 4),
        "explained": round(1 - error / variance, 4),
        "found_and_dead_on_the_way": on_the_way,
        "learning_rate": rate,
        "steps": steps,
        "seconds": round(seconds, 1),
    }


# d_in, true directions, latents, k; 8 directions in a row on average
SETTINGS = [
    Setting(64, 512, 2048, 8),
    Setting(64, 512, 1024, 8),
    Setting(64, 512, 1024, 16),
    Setting(128, 1024, 2048, 8),
    Setting(64, 512, 2048, 16),
]
REVELIO = Recipe("revelio", 4e-4, 500, 0, encoder_init="kaiming", activation="signed_topk")
REVELIO_AUXK = replace(REVELIO, name="revelio + AuxK", auxk=None, dead_after_rows=100_000)
DEFAULT = Recipe("default")


def tied(rate: float, warmup: int = 0, **changes: Any) -> Recipe:
    extra = "".join(f", {name} {value}" for name, value in changes.items())
    return Recipe(f"tied, lr {rate:g}, warm-up {warmup}{extra}", rate, warmup, **changes)


Run = tuple[Recipe, Setting, int, int]


def search_runs() -> list[Run]:
    """Of a constant learning rate 500 steps are the beginning of 2,000."""
    seed = SEARCH_SEEDS[0]
    first, narrow, _, wide, _ = SETTINGS
    short = [(tied(rate), s, seed, 500) for rate in (1e-3, 2e-3) for s in (first, wide, narrow)]
    short.append((tied(4e-3), first, seed, 500))
    at_width = 1.41e-3  # 2e-3 · √(64 / 128)
    whole = [
        (tied(at_width), wide, seed, STEPS),
        (tied(at_width, dead_after_rows=100_000), wide, seed, STEPS),
        (tied(2e-3), first, seed, STEPS),
        (tied(2e-3, lr_scheduler_type="linear"), first, seed, STEPS),
        (tied(1e-3, dead_after_rows=100_000), wide, seed, STEPS),
    ]
    return [(REVELIO, first, seed, STEPS), *whole, *short]


def missing(runs: list[Run], done: list[dict[str, Any]]) -> list[Run]:
    have = {(run["recipe"], run["setting"], run["seed"], run["steps"]) for run in done}
    return [run for run in runs if (run[0].name, run[1].name, *run[2:]) not in have]


def carry_out(runs: list[Run], done: list[dict[str, Any]], workers: int, out: Path | None) -> None:
    """Adds to `done`, and keeps it in the file after every run, so that a run that was cut off goes on."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(train, *run) for run in missing(runs, done)]):
            done.append(future.result())
            print(json.dumps(done[-1]), flush=True)
            if out is not None:
                write_json(out, done)


def comparison_runs(seeds: int, settings: list[Setting]) -> list[Run]:
    """Seed by seed, so that a comparison that is cut off has whole seeds."""
    recipes = (DEFAULT, REVELIO, REVELIO_AUXK)
    return [(recipe, s, seed, STEPS) for seed in SEEDS[:seeds] for s in settings for recipe in recipes]


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and most over the seeds, by setting and recipe."""
    table = []
    for setting, recipe in dict.fromkeys((run["setting"], run["recipe"]) for run in runs):
        own = [run for run in runs if (run["setting"], run["recipe"]) == (setting, recipe)]
        line: dict[str, Any] = {"setting": setting, "recipe": recipe, "seeds": sorted(run["seed"] for run in own)}
        for name in ("found", "dead", "explained"):
            values = [run[name] for run in own]
            line[name] = {"mean": round(statistics.mean(values), 4), "min": min(values), "max": max(values)}
        table.append(line)
    return table


def show(table: list[dict[str, Any]]) -> None:
    print("| setting | recipe | seeds | found | dead | explained |\n|---|---|---|---|---|---|")
    for line in sorted(table, key=lambda line: line["setting"]):
        parts = [f"{line[n]['mean']:.1%} ({line[n]['min']:.1%} to {line[n]['max']:.1%})" for n in ("found", "dead")]
        print(f"| {line['setting']} | {line['recipe']} | {len(line['seeds'])} | {' | '.join(parts)} ", end="")
        print(f"| {line['explained']['mean']:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--runs", type=Path, help="folder of single runs; what is in it is not repeated")
    parser.add_argument("--search", action="store_true", help="the search alone")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"of the comparison (default: {len(SEEDS)})")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    args = parser.parse_args()
    parts = {"search": search_runs()}
    if not args.search:
        parts["comparison"] = comparison_runs(args.seeds, SETTINGS[: args.settings])
    result: dict[str, Any] = {
        "command": f"python benchmarks/sae_recovery.py {' '.join(sys.argv[1:])}",
        "machine": machine() | {"threads_of_a_run": 1},
        "batch_rows": BATCH,
        "held_out_rows": HELD_OUT,
        "active_directions": SyntheticDictionary().active,
        "frequency_exponent": SyntheticDictionary().exponent,
    }
    for name, runs in parts.items():
        file = args.runs / f"{name}.json" if args.runs else None
        done = json.loads(file.read_text()) if file and file.is_file() else []
        carry_out(runs, done, args.workers, file)
        result[name] = done
    result["summary"] = summary(result.get("comparison", []))
    show(result["summary"])
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
