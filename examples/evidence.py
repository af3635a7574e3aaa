"""What the embedded models know: linear probes on mean-pooled features beside raw pixels, VAE latents, random weights.

    python examples/evidence.py --model tiny-sd --out docs/results/evidence-tiny-sd.json

Protocol: layer and timestep are chosen by validation accuracy with seed 0, for the trained and for the randomly
initialised network alike. Then each contestant is fitted with five seeds, where a seed draws the noise, the random
weights and the 90 % of the training images that are used; the L2 strength is chosen on validation, and the 1,000 test
images are measured once a fit.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae._files import write_json
from diffusion_sae.analysis.probing import best_cell, fit_linear, latent_features, layer_timestep_scores, pixel_features
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.features import FeatureSet
from diffusion_sae.zoo import IMAGES

TIMESTEPS = (10, 50, 100, 200)
# the blocks, and the hidden units of transformer MLPs, which are four times as wide as their block
LAYERS = {
    "tiny-sd": (
        "down_ft2",
        "bottleneck",
        "up_ft1",
        "up_ft2",
        *(f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.ff.net.0" for i in (1, 2) for j in (0, 1)),
    ),
    "tiny-dit": (
        *(f"block{i}" for i in (3, 5)),
        *(f"transformer_blocks.{i}.ff.net.0" for i in (2, 3, 4, 5)),
    ),
}
SPLITS = ("train", "validation", "test")
SEEDS = range(5)


def subset(features: FeatureSet, seed: int) -> FeatureSet:
    """90 % of the rows."""
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[: round(0.9 * len(features))]
    assert features.labels is not None
    return FeatureSet.from_tensor(features[rows], features.labels[rows], features.class_names)


def measure(sets: dict[str, FeatureSet], seed: int) -> dict[str, float]:
    score = fit_linear(subset(sets["train"], seed), sets["validation"], sets["test"])
    return {"validation": score.validation, "test": score.test, "l2": score.l2}


def summary(runs: list[dict[str, float]]) -> dict:
    tests = [run["test"] for run in runs]
    return {"test_mean": statistics.mean(tests), "test_std": statistics.stdev(tests), "runs": runs}


def network(model: str, folder: Path, *, random_weights: bool, quick: bool) -> dict:
    """The network's best cell on validation, then its five seeds there."""

    def extract(layers: tuple[str, ...], timesteps: tuple[int, ...], seed: int, splits: tuple[str, ...]) -> dict:
        extractor = DiffusionFeatureExtractor.from_pretrained(
            model, layers=layers, timesteps=timesteps, seed=seed, random_weights=random_weights
        )
        name = f"{'random' if random_weights else 'trained'}-{len(layers)}-{seed}"
        limit = 200 if quick else None
        return {
            s: extractor.extract(IMAGES, folder / name / s, split=s, batch_size=100, limit=limit, progress=False)
            for s in splits
        }

    layers, timesteps = (LAYERS[model][:2], (25, 100)) if quick else (LAYERS[model], TIMESTEPS)
    stores = extract(layers, timesteps, 0, SPLITS[:2])
    scores = layer_timestep_scores(stores["train"], stores["validation"])
    layer, t = best_cell(scores)
    print(f"{model} random={random_weights}: best {layer} t={t} {scores[layer, t].validation:.3f}", flush=True)
    runs = []
    for seed in SEEDS:
        stores = extract((layer,), (t,), seed, SPLITS)
        runs.append(measure({s: store.select(layer, t) for s, store in stores.items()}, seed))
    grid = {name: {str(u): scores[name, u].validation for u in timesteps} for name in layers}
    return {"layer": layer, "timestep": t, "validation_grid": grid, **summary(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd", choices=sorted(LAYERS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--quick", action="store_true", help="200 images a split, 2 × 2 cells: the same path, for tests"
    )
    args = parser.parse_args()
    started = time.time()
    extractor = DiffusionFeatureExtractor.from_pretrained(args.model, layers=LAYERS[args.model][:1])
    size = extractor.backbone.image_size
    images = {s: open_images(IMAGES, s).first(200 if args.quick else None) for s in SPLITS}
    pixels = {s: pixel_features(images[s], size) for s in SPLITS}
    latents = {s: latent_features(extractor, images[s]) for s in SPLITS}
    results = {
        "raw_pixels": summary([measure(pixels, seed) for seed in SEEDS]),
        "vae_latents": summary([measure(latents, seed) for seed in SEEDS]),
    }
    print({name: round(r["test_mean"], 4) for name, r in results.items()}, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, random_weights in (("trained", False), ("random_weights", True)):
            results[name] = network(args.model, Path(folder), random_weights=random_weights, quick=args.quick)
    trained = results["trained"]["test_mean"]
    margins = {name: trained - r["test_mean"] for name, r in results.items() if name != "trained"}
    command = f"python examples/evidence.py --model {args.model} --out {args.out}"
    write_json(args.out, {"model": args.model, "command": command, "margins": margins, "results": results})
    for name, r in results.items():
        print(f"{name:15} {r['test_mean']:.4f} ± {r['test_std']:.4f}")
    print({name: round(m, 4) for name, m in margins.items()}, f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
