"""A script for `accelerate launch`: train probes with several heads, and say what came of it.

accelerate launch --cpu --num_processes 2 train_in_processes.py FOLDER
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig, ProbeTrainer, ProbeTrainingArguments
from diffusion_sae.features import FeatureSet

# diff-c at Revelio's rate: a higher one amplifies the rounding by which Adam moves biases before BatchNorm.
# 51 rows to train on: of batches of 8 the last has 3, which two processes cannot share equally; of 5 the last has 1
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"dropout": 0.5, "class_weights": "balanced"},
    "diff-c": {"learning_rate": 1e-4, "dropout": 0.4},
    "diff-c-uneven": {"learning_rate": 1e-4, "dropout": 0.4, "batch_size": 5, "early_stopping_patience": 2},
    "diff-c-views": {"learning_rate": 1e-4, "views": 2},
    "attention": {"num_attention_heads": 2},
    "linear": {},
    "knn": {},
}
CONFIG = ("dropout", "num_attention_heads")


def draw(case: str, seed: int) -> FeatureSet:
    """Classes that overlap, with channels of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (57,), generator=generator)
    maps = torch.randn(57, 6, 4, 4, generator=generator) + labels[:, None, None, None]
    maps = maps * 10 ** torch.linspace(-1, 1, 6)[:, None, None] + 20
    features = maps.flatten(2).transpose(1, 2) if case == "attention" else maps
    return FeatureSet.from_tensor(maps.mean((2, 3)) if case in ("mlp", "linear", "knn") else features, labels)


def train(case: str, output_dir: Path) -> tuple[DiffusionProbe, dict[str, Any]]:
    head = next(head for head in ("mlp", "diff-c", "attention", "linear", "knn") if case.startswith(head))
    given = dict(CASES[case])
    features, count = draw(case, 0), given.pop("views", 0)
    views = [draw(case, seed).with_labels(features.image_labels) for seed in range(1, count + 1)]
    config = DiffusionProbeConfig(
        d_in=6, head=head, width=8, num_labels=3, **{key: given.pop(key) for key in CONFIG if key in given}
    )
    settings: dict[str, Any] = {"num_train_epochs": 5, "learning_rate": 1e-3, "batch_size": 8} | given
    args = ProbeTrainingArguments(output_dir=str(output_dir / case), neighbors_path=(1, 3), **settings)
    probe = DiffusionProbe(config)
    result = ProbeTrainer(probe, features, args, views=views).train(progress=False)
    return probe, {"history": result.history, "chosen": result.chosen, "validation": asdict(result.validation)}


def main() -> None:
    from accelerate import PartialState

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    made = {}
    for case in CASES:
        probe, made[case] = train(case, folder)
        made[case]["sums"] = {name: value.double().sum().item() for name, value in probe.state_dict().items()}
        DiffusionProbe.from_pretrained(folder / case)  # it is there for every process
    state = PartialState()
    (folder / f"seen-{state.process_index}.json").write_text(json.dumps([state.num_processes, made]))


if __name__ == "__main__":
    main()
