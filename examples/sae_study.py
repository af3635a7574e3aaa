"""FVU, dead latents and probe accuracy of k-SAEs against k and expansion, beside PCA, k-means, NMF, random directions.

    python examples/sae_study.py --out docs/results/sae-study.json --figure docs/figures/sae-study.png --workers 2
    python examples/sae_study.py --out docs/results/sae-study.json --figure docs/figures/sae-study.png --draw-only

The protocol is in docs/sae-study.md. Each finished cell is kept in the folder `--runs` and not repeated. Progress goes
to stderr.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_sae import DiffusionFeatureExtractor, FeatureStore, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae._files import fingerprint_of, read_json, write_json
from diffusion_sae.analysis.dictionaries import SparseDictionary, fit_kmeans, fit_nmf, fit_pca, random_dictionary
from diffusion_sae.analysis.probing import pixel_features
from diffusion_sae.analysis.readout import Dictionary, mean_features, probe_splits, read_out, with_shuffled_labels
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.features import FeatureSet
from diffusion_sae.report.figures.study import sae_study_figure
from diffusion_sae.report.figures.style import save_figure
from diffusion_sae.sae.trainer import SAETrainer, train_together
from diffusion_sae.sae.training_args import SAETrainingArguments
from diffusion_sae.zoo import IMAGES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import command, machine

ARTIFACT = "tiny-sd-up1-t50"  # says which model, layer and timestep
SPLITS = ("train", "validation", "test")
BACKBONES = ("trained", "random-weights")
PURSUIT = "-pursuit"  # ends the names of the methods that are coded by matching pursuit


@dataclass(frozen=True)
class Plan:
    ks: tuple[int, ...] = (8, 16, 32, 64, 128)
    expansions: tuple[int, ...] = (4, 8, 16, 32, 64)
    k: int = 32
    """While the expansion varies."""
    expansion: int = 16
    """While k varies."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the k-SAEs, and of the baselines at (k, expansion); elsewhere these, and the control, have the first alone."""
    steps: int = 1000
    batch_size: int = 1024
    nmf_expansion: int = 4
    """One size of NMF: its time grows with rows × width × components."""
    l2_path: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    limit: int | None = None
    """Images a split; None: all."""

    def grid(self) -> list[tuple[int, int]]:
        across = [(k, self.expansion) for k in self.ks]
        return across + [(self.k, e) for e in self.expansions if (self.k, e) not in across]


QUICK = Plan((2, 4), (1, 2), 4, 2, (0, 1), steps=10, batch_size=256, nmf_expansion=1, l2_path=(1e-1,), limit=60)


@dataclass(frozen=True)
class Cell:
    method: str
    backbone: str
    k: int
    expansion: int | None
    """None for PCA, which has k directions."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.backbone}-k{self.k}-x{self.expansion}-s{self.seed}"


@dataclass(frozen=True)
class Study:
    plan: Plan
    runs: Path

    def features(self, backbone: str) -> dict[str, FeatureSet]:
        found = {}
        for split in SPLITS:
            store = FeatureStore(self.runs / "features" / backbone / split)
            found[split] = store.select(store.layers[0], store.timesteps[0])
        return found

    def arguments(self, seed: int, output_dir: str = "unused") -> SAETrainingArguments:
        """The library's default recipe, but for how long."""
        length = {"batch_size": self.plan.batch_size, "max_steps": self.plan.steps}
        return SAETrainingArguments(output_dir=output_dir, eval_fraction=0, seed=seed, **length)

    def key(self, cell: Cell) -> str:
        """Of all that a cell's numbers depend on but the code: another recipe is another cell."""
        extraction = FeatureStore(self.runs / "features" / cell.backbone / "train").provenance.fingerprint
        plan = {name: getattr(self.plan, name) for name in ("l2_path", "limit", "nmf_expansion", "k", "expansion")}
        defaults = KSparseAutoencoderConfig(d_in=1, num_latents=1, k=1).record()
        recipe = [self.arguments(cell.seed).to_dict(), defaults] if cell.method.startswith("k-sae") else None
        return fingerprint_of({"cell": dataclasses.asdict(cell), "plan": plan, "of": extraction, "recipe": recipe})

    def file(self, cell: Cell) -> Path:
        return self.runs / "cells" / f"{cell.name}-{self.key(cell)}.json"

    @property
    def controls_file(self) -> Path:
        key = fingerprint_of({"l2_path": self.plan.l2_path, "limit": self.plan.limit})
        return self.runs / "cells" / f"controls-{key}.json"

    def keep(self, cell: Cell, **measured: Any) -> None:
        write_json(self.file(cell), dataclasses.asdict(cell) | measured)
        test = measured["metrics"]["test"]
        accuracy = measured["probes"].get("mean", {}).get("test")
        say(f"{cell.name}: fvu {test['fvu']:.4f}, dead {test['dead_latents']:.3f}, probe {accuracy}")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def extract(study: Study) -> None:
    """The artifact's extraction, and the same with random weights; stores that are there are not made again."""
    settings = DiffusionFeatureExtractor.from_pretrained(ARTIFACT).config
    common = {name: getattr(settings, name) for name in ("layers", "timesteps", "pooling", "prompt", "seed")}
    for backbone in BACKBONES:
        extractor = DiffusionFeatureExtractor.from_pretrained(
            settings.model, **common, random_weights=backbone == "random-weights"
        )
        for split in SPLITS:
            folder = study.runs / "features" / backbone / split
            extractor.extract(IMAGES, folder, split=split, batch_size=100, limit=study.plan.limit, progress=False)
    say("features are extracted")


def probe(splits: Mapping[str, FeatureSet], plan: Plan) -> dict[str, float]:
    return dataclasses.asdict(probe_splits(splits, l2_path=plan.l2_path))


def measure(study: Study, cell: Cell, dictionary: Dictionary, poolings: Sequence[str], **more: Any) -> None:
    """Reads a dictionary out and keeps the cell; without poolings there is no probe, and test images are enough."""
    features = study.features(cell.backbone)
    if not poolings:
        features = {"test": features["test"]}
    read = {split: read_out(dictionary, rows) for split, rows in features.items()}
    pooled = {name: {split: r.pooled[name] for split, r in read.items()} for name in poolings}
    probes = {name: probe(splits, study.plan) for name, splits in pooled.items()}
    centre = (cell.k, cell.expansion, cell.seed) == (study.plan.k, study.plan.expansion, study.plan.seeds[0])
    if poolings and centre:
        probes["mean, shuffled labels"] = probe(with_shuffled_labels(pooled["mean"]), study.plan)
    metrics = {split: dataclasses.asdict(r.metrics) for split, r in read.items()}
    study.keep(cell, metrics=metrics, probes=probes, num_latents=len(dictionary.W_dec), **more)


def train_saes(study: Study, cells: Sequence[Cell]) -> None:
    """All k-SAEs of one backbone and seed in one pass over the features."""
    features = study.features(cells[0].backbone)
    trainers = []
    for cell in cells:
        shape = KSparseAutoencoderConfig(
            d_in=features["train"].d_in, k=cell.k, expansion_factor=cell.expansion, init_seed=cell.seed
        )
        args = study.arguments(cell.seed, str(study.runs / "saes" / study.file(cell).stem))
        sae = KSparseAutoencoder(shape)
        trainers.append(SAETrainer(sae, features["train"], args, eval_features=features["validation"]))
    say(f"training {len(cells)} k-SAEs on {cells[0].backbone} features, seed {cells[0].seed}")
    results = train_together(trainers, progress=False)
    say(f"trained in {results[0].seconds:.0f} s")
    for cell, trainer in zip(cells, trainers, strict=True):
        sae, first = trainer.sae, cell.seed == study.plan.seeds[0]
        if first and cell.backbone == "trained" and cell.k < sae.config.d_in:
            same = SparseDictionary(sae.W_dec.detach(), sae.b_dec.detach(), cell.k)
            measure(study, dataclasses.replace(cell, method=cell.method + PURSUIT), same, ())
        measure(study, cell, sae, ("mean", "reconstruction", *(("max",) if first else ())))


def fit_baseline(study: Study, cell: Cell) -> None:
    rows = study.features(cell.backbone)["train"][:]
    num_latents = round(rows.shape[1] * (cell.expansion or 0))
    coder = "matching_pursuit" if cell.method.endswith(PURSUIT) else "top_k"
    name = cell.method.removesuffix(PURSUIT)
    if name == "pca":
        dictionary = fit_pca(rows, cell.k)
    else:
        fit = {"k-means": fit_kmeans, "nmf": fit_nmf, "random": random_dictionary}[name]
        dictionary = fit(rows, num_latents, cell.k, cell.seed, coder=coder)
    more: dict[str, Any] = {}
    if coder == "top_k" and name != "pca":
        bare = read_out(dataclasses.replace(dictionary, scale=1.0), study.features(cell.backbone)["test"])
        more = {"scale": dictionary.scale, "test_fvu_without_scale": bare.metrics.fvu}
    measure(study, cell, dictionary, () if cell.method == "random" + PURSUIT else ("mean", "reconstruction"), **more)


def fit_controls(study: Study) -> None:
    """Probes without any dictionary; they have no k and no seed."""
    size = DiffusionFeatureExtractor.from_pretrained(ARTIFACT).backbone.image_size
    images = {s: open_images(IMAGES, s).first(study.plan.limit) for s in SPLITS}
    raw = {b: {s: mean_features(f) for s, f in study.features(b).items()} for b in BACKBONES}
    sets = {
        "features": raw["trained"],
        "features, random weights": raw["random-weights"],
        "features, shuffled labels": with_shuffled_labels(raw["trained"]),
        "pixels": {s: pixel_features(images[s], size) for s in SPLITS},
    }
    write_json(study.controls_file, {name: probe(splits, study.plan) for name, splits in sets.items()})
    say("controls are fitted")


def sae_groups(plan: Plan) -> list[list[Cell]]:
    groups = [*(("trained", seed) for seed in plan.seeds), ("random-weights", plan.seeds[0])]
    return [[Cell("k-sae", backbone, k, e, seed) for k, e in plan.grid()] for backbone, seed in groups]


def baseline_cells(plan: Plan, d_in: int) -> list[Cell]:
    """From k = d_in on matching pursuit leaves nothing, whatever the directions are: it stays below."""
    cells = [Cell("pca", "trained", k, None, 0) for k in plan.ks]
    cells += [Cell("nmf" + PURSUIT, "trained", k, plan.nmf_expansion, plan.seeds[0]) for k in plan.ks if k < d_in]
    for method in ("k-means" + PURSUIT, "k-means", "random", "random" + PURSUIT):
        for k, e in plan.grid():
            seeds = plan.seeds if (k, e) == (plan.k, plan.expansion) else plan.seeds[:1]
            if k < d_in or not method.endswith(PURSUIT):
                cells += [Cell(method, "trained", k, e, seed) for seed in seeds]
    return cells


def work(study: Study, item: Sequence[Cell] | Cell | None) -> None:
    """A group of k-SAEs, a baseline, or the controls."""
    torch.set_num_threads(1)  # a worker a core
    if item is None:
        fit_controls(study)
    elif isinstance(item, Cell):
        fit_baseline(study, item)
    else:
        train_saes(study, item)


def carry_out(study: Study, d_in: int, workers: int) -> None:
    plan = study.plan
    items: list[Any] = [[c for c in group if not study.file(c).exists()] for group in sae_groups(plan)]
    items = [group for group in items if group]  # first: they take longest
    items += [] if study.controls_file.exists() else [None]
    items += [cell for cell in baseline_cells(plan, d_in) if not study.file(cell).exists()]
    say(f"{len(items)} groups of k-SAEs, controls and baselines to do")
    if workers == 1:
        for item in items:
            work(study, item)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(work, study, item) for item in items]:
            future.result()


def collect(study: Study, d_in: int) -> list[dict[str, Any]]:
    trained = [cell for group in sae_groups(study.plan) for cell in group]
    pursued = [dataclasses.replace(cell, method=cell.method + PURSUIT) for cell in trained]
    cells = [*trained, *(c for c in pursued if study.file(c).exists()), *baseline_cells(study.plan, d_in)]
    return [read_json(study.file(cell)) for cell in cells]


def summarise(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, on test images."""
    names = ("method", "backbone", "k", "expansion", "num_latents")
    by_cell: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        by_cell.setdefault(tuple(run[name] for name in names), []).append(run)
    table = []
    for cell, own in by_cell.items():
        values = {name: [run["metrics"]["test"][name] for run in own] for name in ("fvu", "dead_latents", "l0")}
        for pooling in own[0]["probes"]:
            values[f"accuracy, {pooling}"] = [r["probes"][pooling]["test"] for r in own if pooling in r["probes"]]
        line = {name: spread(numbers) for name, numbers in values.items()}
        table.append(dict(zip(names, cell, strict=True)) | {"seeds": len(own)} | line)
    return table


def spread(numbers: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(numbers), "std": statistics.stdev(numbers) if len(numbers) > 1 else None}


def results(study: Study, workers: int) -> dict[str, Any]:
    started, record = time.time(), machine() | {"threads_of_a_run": 1, "workers": workers}
    extract(study)
    first = study.features("trained")["train"]
    carry_out(study, first.d_in, workers)
    runs = collect(study, first.d_in)
    assert first.provenance is not None
    return {
        "command": command(),
        "machine": record,
        "seconds_of_this_call": round(time.time() - started),
        "settings": dataclasses.asdict(study.plan) | {"d_in": first.d_in, "images": IMAGES},
        "rows": {split: len(rows) for split, rows in study.features("trained").items()},
        "extraction": first.provenance.to_dict(),
        "training": study.arguments(study.plan.seeds[0]).to_dict(),
        "controls": read_json(study.controls_file),
        "runs": runs,
        "summary": summarise(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--figure", type=Path, help="PNG file, drawn from the JSON file alone")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing")
    parser.add_argument("--runs", type=Path, help="folder of what is finished (default: runs/sae-study)")
    parser.add_argument("--steps", type=int, default=Plan.steps, help=f"of a training (default: {Plan.steps})")
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size, help=f"default: {Plan.batch_size}")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument(
        "--quick", action="store_true", help="60 images a split, 10 steps, 3 shapes: the same path, for tests"
    )
    args = parser.parse_args()
    if not args.draw_only:
        plan = QUICK if args.quick else Plan(steps=args.steps, batch_size=args.batch_size)
        runs = args.runs or Path("runs", "sae-study-quick" if args.quick else "sae-study")
        write_json(args.out, results(Study(plan, runs), args.workers))
    if args.figure is not None:
        save_figure(sae_study_figure(read_json(args.out)), args.figure)


if __name__ == "__main__":
    main()
