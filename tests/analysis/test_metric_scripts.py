"""Every metric as an `evaluate.Metric`: by name and by path, without network, with the numbers of its function."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion_sae
from diffusion_sae.analysis.metrics import metric_names, metric_path

CODE = {"top_acts": [[2.0, 1.0], [3.0, 0.0]], "top_indices": [[0, 2], [2, 0]]}
ROWS = {"predictions": [[3.0, 2.0], [3.0, 2.0]], "references": [[3.0, 4.0], [3.0, 0.0]]}
SAID = {"predictions": [0, 1, 1, 1, 0], "references": [0, 0, 1, 1, 1]}
TOP = {"predictions": [[0, 0, 0, 0], [0, 0, 3, 3]]}
RATE = {"base_rate": [0.5, 0.25, 0.125, 0.125]}

# by name: what `compute` is given, and some of what it must say, worked out by hand
EXAMPLES: dict[str, tuple[dict, dict]] = {
    "activation_matching": (
        {"predictions": [[0.0, 5.0], [1.0, 0.0], [2.0, 0.0]], "references": [[9.0, 0.0], [0.0, 2.0], [0.0, 4.0]]},
        {"first": [0, 1], "second": [1, 0], "mean_similarity": 1.0},
    ),
    "calibration_error": (
        {"predictions": [[0.75, 0.25], [0.125, 0.875]], "references": [0, 0], "bins": 2},
        {"calibration_error": 0.3125},
    ),
    "confusion_matrix": (SAID | {"classes": 2}, {"confusion_matrix": [[1, 1], [1, 2]]}),
    "cosine": (ROWS, {"cosine": (17 / 5 + 3) / 13**0.5 / 2}),
    "dead_latents": (CODE | {"num_latents": 4}, {"dead_latents": 0.5}),
    "decoder_matching": (
        {"predictions": [[1.0, 0.0], [0.0, 2.0]], "references": [[0.0, 3.0, 1.0], [1.0, 0.0, 1.0]]},
        {"first": [0, 1], "second": [1, 0], "similarity": [1.0, 1.0]},
    ),
    "density_by_timestep": (
        CODE | {"timesteps": [5, 9], "num_latents": 3},
        {"density_by_timestep": {"5": [1.0, 0.0, 1.0], "9": [0.0, 0.0, 1.0]}},
    ),
    "explained_variance": (ROWS, {"explained_variance": 0.0}),
    "fvu": (ROWS, {"fvu": 1.0}),
    "fvu_by_timestep": (
        {
            "predictions": [[0.0], [12.0], [2.0], [12.0]],
            "references": [[0.0], [10.0], [2.0], [14.0]],
            "timesteps": [5, 9, 5, 9],
        },
        {"fvu_by_timestep": {"5": 0.0, "9": 1.0}},
    ),
    "hierarchical_agreement": (TOP | {"coarse": [[0] * 4, [0, 0, 1, 1]]}, {"per_unit": [1.0, 1 / 3]}),
    "l0": (CODE, {"l0": 1.5}),
    "label_divergence": (TOP | RATE, {"per_unit": [1.0, 1.0]}),
    "label_entropy": (TOP | RATE, {"per_unit": [0.0, 1 / 1.75]}),
    "label_purity": (TOP, {"per_unit": [1.0, 0.5], "label_purity": 0.75}),
    "label_std": (TOP, {"per_unit": [0.0, 1.5]}),
    "latent_density": (CODE | {"num_latents": 3}, {"per_unit": [0.5, 0.0, 1.0]}),
    "latent_drift": (
        CODE | {"other_top_acts": [[4.0, 0.0], [0.0, 0.0]], "other_top_indices": [[0, 0], [0, 0]], "num_latents": 3},
        {"latent_drift": 0.5},  # latent 0 stays in proportion, latent 2 goes, latent 1 is never there
    ),
    "loss_recovered": (
        {"predictions": [1.0, 3.0], "originals": [0.5, 1.5], "ablated": [4.0, 6.0]},
        {"loss_recovered": 0.75, "increase": 1.0},
    ),
    "monosemanticity": (
        {"predictions": [[2.0], [1.0], [0.0]], "embeddings": [[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]},
        {"monosemanticity": 0.6},
    ),
    "per_class_accuracy": (SAID | {"classes": 2}, {"per_class_accuracy": [1 / 2, 2 / 3]}),
    "probe_accuracy": (SAID | {"seed": 1}, {"accuracy": 0.6}),
    "reconstructed_accuracy": (
        SAID | {"originals": [0, 0, 1, 1, 1]},
        {"original": 1.0, "reconstructed": 0.6, "difference": -0.4, "agreement": 0.6},
    ),
    "uncentred_explained_variance": (ROWS, {"uncentred_explained_variance": 1 - (4 / 25 + 4 / 9) / 2}),
}

SCRIPT = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from diffusion_sae.analysis.metrics import load_metric, metric_path

found = {}
for name, given in json.load(sys.stdin).items():
    by_name = load_metric(name).compute(**given)
    by_path = evaluate.load(str(metric_path(name)))
    half = {key: value for key, value in given.items() if key in by_path.features}
    rows = len(next(iter(half.values())))
    for part in (slice(0, 1), slice(1, rows)):
        by_path.add_batch(**{key: value[part] for key, value in half.items()})
    in_parts = by_path.compute(**{key: value for key, value in given.items() if key not in half})
    found[name] = [by_name, in_parts, by_path.description]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(home)}
    source = str(Path(diffusion_sae.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps({name: given for name, (given, _) in EXAMPLES.items()}),
        env=os.environ | offline | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_metric_has_an_example():
    assert sorted(EXAMPLES) == metric_names()


def flat(value):
    """Numbers in order, so that approx compares lists within dicts."""
    if isinstance(value, dict):
        return [item for key in sorted(value) for item in flat(value[key])]
    return [item for part in value for item in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_number_by_hand(name, found):
    by_name, in_parts, description = found[name]
    expected = EXAMPLES[name][1]
    for key, value in expected.items():
        assert flat(by_name[key]) == pytest.approx(flat(value), abs=1e-6), key
    assert flat(by_name) == pytest.approx(flat(in_parts), nan_ok=True)
    assert len(description) > 20


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"metric must be .*'fvu'.*got 'fuv'"):
        metric_path("fuv")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_table_of_metrics_names_it(name):
    table = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert f"| `{name}` |" in table.read_text(encoding="utf-8")
