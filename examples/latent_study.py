"""Every metric of docs/metrics.md on the embedded SAE, each beside its baselines.

    python examples/latent_study.py --out docs/results/latent-study.json
    python examples/latent_study.py --out /tmp/quick.json --quick          # 60 images, few steps: the same path

What is compared is in docs/latent-study.md. Stores and trained SAEs are kept in the folder `--runs` and not made again.
Progress goes to stderr.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_sae import (
    DiffusionFeatureExtractor,
    DiffusionProbe,
    DiffusionProbeConfig,
    FeatureStore,
    KSparseAutoencoder,
    KSparseAutoencoderConfig,
    ProbeTrainer,
    ProbeTrainingArguments,
    SAETrainer,
    SAETrainingArguments,
)
from diffusion_sae._files import write_json
from diffusion_sae.analysis.few_shot import few_shot
from diffusion_sae.analysis.metrics.baselines import (
    UnitScores,
    latent_units,
    neuron_units,
    pca_units,
    random_units,
    score_units,
)
from diffusion_sae.analysis.metrics.matching import (
    Matching,
    match_activations,
    match_decoders,
    matching_by_chance,
)
from diffusion_sae.analysis.metrics.probes import (
    accuracy,
    expected_calibration_error,
    per_class_accuracy,
    reconstructed_accuracy,
)
from diffusion_sae.analysis.metrics.reconstruction import cosine, explained_variance, uncentred_explained_variance
from diffusion_sae.analysis.metrics.splicing import SplicingLosses, loss_recovered, splicing_losses
from diffusion_sae.analysis.metrics.timesteps import evaluate_timesteps
from diffusion_sae.analysis.probing import class_config, pixel_features
from diffusion_sae.analysis.readout import mean_features, read_out
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.features import FeatureSet, ImageSubset
from diffusion_sae.sae.evaluation import evaluate_sae
from diffusion_sae.zoo import IMAGES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import command, machine

ARTIFACT = "tiny-sd-up1-t50"
LAYER, TIMESTEP = "up_ft1", 50
TIMESTEPS = (10, 50, 200, 500, 800)
OTHER_MODEL, OTHER_LAYER, OTHER_TIMESTEP = "tiny-dit", "transformer_blocks.4.ff.net.0", 10
"""Where a probe knows most in the other embedded model, chosen on validation images (evidence-tiny-dit.json)."""
SEEDS = (1, 2, 3)
COARSE = {"Sandal": "footwear", "Sneaker": "footwear", "Ankle boot": "footwear", "Bag": "bag"}  # all else: clothes
TOP = 16
"""Images of which a latent is judged."""


@dataclass(frozen=True)
class Plan:
    steps: int = 1250
    """20 epochs, as the embedded SAE's recipe."""
    limit: int | None = None
    spliced_images: int = 256
    episodes: int = 600
    queries: int = 15


QUICK = Plan(steps=20, limit=60, spliced_images=8, episodes=5, queries=1)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Study:
    def __init__(self, plan: Plan, runs: Path) -> None:
        self.plan, self.runs = plan, runs
        self.embedded = KSparseAutoencoder.from_pretrained(ARTIFACT)

    @cache  # noqa: B019  one study a process
    def store(self, name: str, split: str) -> FeatureStore:
        settings = {
            "trained": {"model": "tiny-sd", "layers": LAYER, "timesteps": TIMESTEPS},
            "random weights": {"model": "tiny-sd", "layers": LAYER, "timesteps": (TIMESTEP,), "random_weights": True},
            OTHER_MODEL: {"model": OTHER_MODEL, "layers": OTHER_LAYER, "timesteps": (OTHER_TIMESTEP,)},
        }[name]
        extractor = DiffusionFeatureExtractor.from_pretrained(settings.pop("model"), pooling="tokens", **settings)
        folder = self.runs / "features" / name.replace(" ", "-") / split
        return extractor.extract(IMAGES, folder, split=split, batch_size=100, limit=self.plan.limit, progress=False)

    def features(self, split: str, name: str = "trained", timesteps: int | Sequence[int] = TIMESTEP) -> FeatureSet:
        store = self.store(name, split)
        return store.select(store.layers[0], timesteps)

    def of_other_model(self, split: str) -> FeatureSet:
        return self.features(split, OTHER_MODEL, OTHER_TIMESTEP)

    @cache  # noqa: B019
    def sae(self, seed: int, name: str = "trained", timesteps: tuple[int, ...] = (TIMESTEP,)) -> KSparseAutoencoder:
        """By the embedded SAE's recipe, but for the seed and the features; of several timesteps one for all."""
        features = self.features("train", name, timesteps if len(timesteps) > 1 else timesteps[0])
        several = list(timesteps) if len(timesteps) > 1 else None
        config = KSparseAutoencoderConfig(
            d_in=features.d_in, expansion_factor=16, k=16, init_seed=seed, timesteps=several
        )
        folder = self.runs / "saes" / f"{name.replace(' ', '-')}-t{'-'.join(map(str, timesteps))}-s{seed}"
        args = SAETrainingArguments(
            output_dir=str(folder), batch_size=1024, max_steps=self.plan.steps, seed=seed, eval_fraction=0
        )
        trainer = SAETrainer(KSparseAutoencoder(config), features, args)
        trainer.train(progress=False)
        say(f"SAE of {name} features at {timesteps}, seed {seed}")
        return trainer.sae.eval()

    @cache  # noqa: B019
    def untrained(self, seed: int = 1) -> KSparseAutoencoder:
        """What a training starts from: random unit directions, the encoder their transpose, b_dec the mean row."""
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(**(self.embedded.config.record() | {"init_seed": seed})))
        with torch.no_grad():
            sae.b_dec.copy_(self.features("train").mean())
        return sae.eval()


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values), "n": len(values)}


# ---------------------------------------------------------------------------------------------- reconstruction


def reconstruction(study: Study) -> dict[str, Any]:
    test = study.features("test")

    def measured(sae: KSparseAutoencoder) -> dict[str, float]:
        rows = test[:]
        with torch.no_grad():
            rebuilt = sae(rows).reconstruction
        found = dataclasses.asdict(evaluate_sae(sae, test, allow_mismatch=True))
        functions = (explained_variance, uncentred_explained_variance, cosine)
        return found | {function.__name__: function(rebuilt, rows).item() for function in functions}

    rows = test[:]
    mean = study.features("train").mean().expand_as(rows)
    seeds = [measured(study.sae(seed)) for seed in SEEDS]
    return {
        "embedded": measured(study.embedded),
        "seeds": {name: spread([one[name] for one in seeds]) for name in seeds[0]},
        "untrained SAE": measured(study.untrained()),
        "mean row": {
            "uncentred_explained_variance": uncentred_explained_variance(mean, rows).item(),
            "cosine": cosine(mean, rows).item(),
        },
    }


# ---------------------------------------------------------------------------------------------- interpretability


def interpretability(study: Study) -> dict[str, Any]:
    test = study.features("test")
    labels, names = test.image_labels, test.class_names
    assert labels is not None
    assert names is not None
    groups = ["clothes", "footwear", "bag"]
    coarse = torch.tensor([groups.index(COARSE.get(name, "clothes")) for name in names])
    pixels = pixel_features(open_images(IMAGES, "test").first(study.plan.limit), 32)
    other = mean_features(study.of_other_model("test"))
    embeddings = {"pixels": centred(pixels[:]), OTHER_MODEL: centred(other[:])}
    order = torch.arange(len(labels))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def scores(units: Any, order: Tensor = order) -> dict[str, float]:
        given = labels[order]
        found: UnitScores | None = None
        means: dict[str, float] = {}
        for name, embedding in embeddings.items():
            found = score_units(units, given, coarse=coarse[given], embeddings=embedding[order], n=TOP)
            means |= {k: v for k, v in found.means.items() if k != "monosemanticity"}
            means[f"monosemanticity, {name}"] = found.means["monosemanticity"]
        assert found is not None
        return {"measured": found.measured, "units": found.num_units, **means}

    seeds = [scores(latent_units(study.sae(seed), test)) for seed in SEEDS]
    untrained_backbone = study.features("test", "random weights")
    return {
        "SAE latents": scores(latent_units(study.embedded, test)),
        "SAE latents, three other seeds": {name: spread([one[name] for one in seeds]) for name in seeds[0]},
        "raw neurons": scores(neuron_units(test)),
        "PCA directions": scores(pca_units(test)),
        "random directions": scores(random_units(test)),
        "untrained SAE": scores(latent_units(study.untrained(), test)),
        "SAE latents, untrained model": scores(latent_units(study.sae(SEEDS[0], "random weights"), untrained_backbone)),
        "raw neurons, untrained model": scores(neuron_units(untrained_backbone)),
        "SAE latents, shuffled labels": scores(latent_units(study.embedded, test), shuffled),
    }


def centred(rows: Tensor) -> Tensor:
    """Cosines of embeddings around a common mean would all be near 1."""
    return rows - rows.mean(0)


# ---------------------------------------------------------------------------------------------- downstream


def downstream(study: Study) -> dict[str, Any]:
    """A linear probe on mean-pooled features, and what it says of reconstructions that it was not fitted on."""
    splits = {split: mean_features(study.features(split)) for split in ("train", "validation", "test")}
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=splits["train"].d_in, **class_config(splits["train"])))
    args = ProbeTrainingArguments(output_dir=str(study.runs / "probe"))
    ProbeTrainer(probe, splits["train"], args, validation_features=splits["validation"]).fit(progress=False)
    labels = splits["test"].labels
    assert labels is not None
    logits = probe.predict(splits["test"])
    said = logits.argmax(1)

    def rebuilt(sae: KSparseAutoencoder) -> dict[str, Any]:
        pooled = read_out(sae, study.features("test")).pooled["reconstruction"]
        return dataclasses.asdict(reconstructed_accuracy(said, probe.predict(pooled).argmax(1), labels))

    seeds = [rebuilt(study.sae(seed)) for seed in SEEDS]
    return {
        "probe": {
            "accuracy": dataclasses.asdict(accuracy(said, labels)),
            "largest_base_rate": (torch.bincount(labels).max() / len(labels)).item(),
            "calibration_error": expected_calibration_error(logits.softmax(1), labels),
            "per_class": dict(
                zip(
                    splits["test"].class_names or [],
                    per_class_accuracy(said, labels, logits.shape[1]).tolist(),
                    strict=True,
                )
            ),
        },
        "embedded": rebuilt(study.embedded),
        "seeds, difference": spread([one["difference"]["value"] for one in seeds]),
        "untrained SAE": rebuilt(study.untrained()),
    }


def splicing(study: Study) -> dict[str, Any]:
    images = open_images(IMAGES, "test").first(study.plan.spliced_images)
    extractor = DiffusionFeatureExtractor.from_pretrained(
        "tiny-sd", layers=LAYER, timesteps=TIMESTEPS, pooling="tokens"
    )
    saes = {
        "embedded": study.embedded,
        "seed 1": study.sae(SEEDS[0]),
        "untrained SAE": study.untrained(),
        "one SAE of all timesteps": study.sae(SEEDS[0], "trained", TIMESTEPS),
    }
    found = {}
    for name, sae in saes.items():
        losses = splicing_losses(sae, extractor, images, allow_mismatch=True, batch_size=64)
        found[name] = {str(t): one.summary() | {"intervals": recovered_intervals(one)} for t, one in losses.items()}
        say(f"spliced: {name}")
    return found


def recovered_intervals(losses: SplicingLosses, resamples: int = 1000) -> dict[str, list[float]]:
    """95 % percentile intervals of what is recovered, over images drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    count = len(losses.original)
    found: dict[str, list[float]] = {"zero": [], "mean": []}
    for _ in range(resamples):
        rows = torch.randint(count, (count,), generator=generator)
        for name in found:
            ablated = getattr(losses, name)[rows]
            found[name].append(loss_recovered(losses.original[rows], losses.spliced[rows], ablated))
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: torch.tensor(values).double().quantile(quantiles).tolist() for name, values in found.items()}


# ---------------------------------------------------------------------------------------------- timesteps, matching


def over_timesteps(study: Study) -> dict[str, Any]:
    features = study.features("test", timesteps=TIMESTEPS)
    saes = {
        "one SAE of all timesteps": study.sae(SEEDS[0], "trained", TIMESTEPS),
        "SAE of t = 50": study.sae(SEEDS[0]),
    }
    found: dict[str, Any] = {}
    for name, sae in saes.items():
        found[name] = {}
        for t, one in evaluate_timesteps(sae, features, allow_mismatch=True).items():
            drift = None if one.drift is None else one.drift[~one.drift.isnan()]
            found[name][str(t)] = {
                "fvu": one.sae.fvu,
                "l0": one.sae.l0,
                "active_latents": (one.density > 0).float().mean().item(),
                "drift": None if drift is None else {"median": drift.median().item(), "latents": len(drift)},
            }
    own = {
        str(t): evaluate_sae(study.sae(SEEDS[0], "trained", (t,)), study.features("test", timesteps=t))
        for t in TIMESTEPS
    }
    found["an SAE of each timestep"] = {t: {"fvu": one.fvu, "l0": one.l0} for t, one in own.items()}
    return found


def matching(study: Study) -> dict[str, Any]:
    test, first = study.features("test"), study.sae(SEEDS[0])
    chance = matching_by_chance(len(first.W_dec), len(first.W_dec), first.config.d_in)
    decoders = {
        f"seeds {SEEDS[0]} and {seed}": match_decoders(first.W_dec, study.sae(seed).W_dec) for seed in SEEDS[1:]
    }
    decoders |= {
        f"t = {TIMESTEP} and {t}": match_decoders(first.W_dec, study.sae(SEEDS[0], "trained", (t,)).W_dec)
        for t in TIMESTEPS
        if t != TIMESTEP
    }
    decoders["random directions"] = chance
    say("decoders are matched")
    second = study.sae(SEEDS[1])
    sides: dict[str, tuple[KSparseAutoencoder, FeatureSet]] = {
        f"seeds {SEEDS[0]} and {SEEDS[1]}": (second, test),
        f"t = {TIMESTEP} and 500": (study.sae(SEEDS[0], "trained", (500,)), study.features("test", timesteps=500)),
        f"tiny-sd and {OTHER_MODEL}": (
            study.sae(SEEDS[0], OTHER_MODEL, (OTHER_TIMESTEP,)),
            study.of_other_model("test"),
        ),
    }
    for name, (sae, features) in list(sides.items()):
        sides[f"{name}, shuffled images"] = (sae, shuffled_images(features))
    activations = {name: match_activations(first, test, *side) for name, side in sides.items()}
    say("activations are matched")
    return {
        "decoders": {name: of_matching(one) for name, one in decoders.items()},
        "activations": {name: of_matching(one) for name, one in activations.items()},
    }


def shuffled_images(features: FeatureSet) -> FeatureSet:
    order = torch.randperm(features.num_images, generator=torch.Generator().manual_seed(0))
    mixed = ImageSubset(features, order)
    mixed.image_ids = None  # they would say that these are other images
    return mixed


def of_matching(one: Matching) -> dict[str, float]:
    return {
        "pairs": len(one.first),
        "mean": one.mean,
        "above_0.7": one.share_above(0.7),
        "above_0.9": one.share_above(0.9),
    }


# ---------------------------------------------------------------------------------------------- few images


def few(study: Study) -> dict[str, Any]:
    """Nearest class mean by cosine on test images, as they are and around the mean of the training images."""
    test, train = study.features("test"), study.features("train")
    sets: dict[str, tuple[FeatureSet, FeatureSet]] = {"features": (mean_features(test), mean_features(train))}
    random = [study.features(split, "random weights") for split in ("test", "train")]
    sets["features, random weights"] = (mean_features(random[0]), mean_features(random[1]))
    sources = [open_images(IMAGES, split).first(study.plan.limit) for split in ("test", "train")]
    sets["pixels"] = (pixel_features(sources[0], 32), pixel_features(sources[1], 32))
    codes = [read_out(study.embedded, features).pooled for features in (test, train)]
    for pooling in ("mean", "max"):
        sets[f"SAE code, {pooling}"] = (codes[0][pooling], codes[1][pooling])
    codes = [read_out(study.untrained(), features).pooled for features in (test, train)]
    sets["untrained SAE's code, mean"] = (codes[0]["mean"], codes[1]["mean"])
    ways = 5 if study.plan.limit is None else 2
    common = {"episodes": study.plan.episodes, "queries": study.plan.queries, "ways": ways}
    found: dict[str, Any] = {}
    for name, (features, base) in sets.items():
        found[name] = {}
        for shots in (1, 5):
            for norm in ("none", "center"):
                result = few_shot(features, shots=shots, base=base, feature_norm=norm, **common)
                found[name][f"{shots}-shot, {norm}"] = {"mean": result.mean, "interval": result.interval}
    return found


PARTS = {
    "reconstruction": reconstruction,
    "interpretability": interpretability,
    "downstream": downstream,
    "splicing": splicing,
    "timesteps": over_timesteps,
    "matching": matching,
    "few_shot": few,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--runs", type=Path, help="folder of what is finished (default: runs/latent-study)")
    parser.add_argument("--quick", action="store_true", help="60 images, 20 steps: the same path, for tests")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    study = Study(plan, args.runs or Path("runs", "latent-study-quick" if args.quick else "latent-study"))
    started, record = time.time(), machine()
    result: dict[str, Any] = {"command": command(), "machine": record, "settings": dataclasses.asdict(plan)}
    for name, part in PARTS.items():
        result[name] = part(study)
        say(f"{name} is measured")
    result["seconds_of_this_call"] = round(time.time() - started)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
