"""KSparseAutoencoderConfig and SAETrainingArguments: what they accept, what they refuse, and that JSON keeps them."""

import json
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from diffusion_sae import KSparseAutoencoderConfig, SAETrainingArguments

KIND = {"model_type": "k-sparse-autoencoder"}


def test_defaults_are_the_papers() -> None:
    config = KSparseAutoencoderConfig(d_in=1280)
    assert (config.expansion_factor, config.num_latents, config.k) == (64, 81_920, 32)


@pytest.mark.parametrize(
    ("given", "num_latents", "expansion_factor"),
    [
        ({"expansion_factor": 4}, 40, 4),
        ({"expansion_factor": 2.5}, 25, 2.5),
        ({"num_latents": 37}, 37, 3.7),
        ({"num_latents": 40, "expansion_factor": 4}, 40, 4),
    ],
)
def test_one_of_the_sizes_gives_the_other(given: dict[str, Any], num_latents: int, expansion_factor: float) -> None:
    config = KSparseAutoencoderConfig(d_in=10, k=2, **given)
    assert (config.num_latents, config.expansion_factor) == (num_latents, expansion_factor)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_latents": 4, "k": 5}, "k must be at most num_latents = 4, got k = 5"),
        ({"k": 0}, "k must be an integer ≥ 1, got 0"),
        ({"d_in": 0}, "d_in must be an integer ≥ 1, got 0"),
        ({"num_latents": 0}, "num_latents must be an integer ≥ 1, got 0"),
        ({"num_latents": 41, "expansion_factor": 4}, "num_latents 41 is not d_in 10 × expansion_factor 4"),
        ({"expansion_factor": 0}, "expansion_factor must be a number > 0"),
        ({"expansion_factor": -2.0}, "expansion_factor must be a number > 0"),
        ({"expansion_factor": float("inf")}, "expansion_factor must be a number > 0 and ≤ 1000000, got inf"),
        ({"expansion_factor": float("nan")}, "expansion_factor must be a number > 0 and ≤ 1000000, got nan"),
        ({"expansion_factor": 0.01, "k": 1}, "num_latents must be an integer ≥ 1, got 0"),
        ({"encoder_init": "zeros"}, "encoder_init must be one of 'tied', 'kaiming', got 'zeros'"),
        ({"init_seed": -1}, "init_seed must be an integer ≥ 0, got -1"),
        (
            {"num_latens": 40},
            r"does not know 'num_latens' \(did you mean 'num_latents'\?\). Known: activation, .*d_in, encoder_init",
        ),
        ({"d_sae": 40}, "does not know 'd_sae'"),
    ],
)
def test_invalid_values_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KSparseAutoencoderConfig(**{"d_in": 10, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": "8"}, "'k' expected int, got str"),
        ({"k": True}, "'k' expected int, got bool"),
        ({"d_in": 10.0}, "'d_in' expected int, got float"),
        ({"encoder_init": 3}, "'encoder_init' expected str, got int"),
    ],
)
def test_wrong_types_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=message):
        KSparseAutoencoderConfig(**{"d_in": 10, **given})


def test_types_are_checked_when_a_field_is_set() -> None:
    config = KSparseAutoencoderConfig(d_in=10)
    with pytest.raises(StrictDataclassFieldValidationError, match="'k' expected int, got str"):
        config.k = "8"


def test_d_in_must_be_given() -> None:
    with pytest.raises(TypeError, match="d_in"):
        KSparseAutoencoderConfig()


@pytest.mark.parametrize(
    "config",
    [
        KSparseAutoencoderConfig(d_in=1280),
        KSparseAutoencoderConfig(d_in=7, num_latents=50, k=3, encoder_init="kaiming", init_seed=5),
        KSparseAutoencoderConfig(d_in=3, expansion_factor=7 / 3, k=1),
    ],
)
def test_json_round_trip(config: KSparseAutoencoderConfig) -> None:
    written = json.loads(config.to_json_string())
    assert {"d_in", "expansion_factor", "num_latents", "k", "encoder_init", "init_seed"} <= set(written)
    read = KSparseAutoencoderConfig.from_dict(written)
    assert read.to_json_string() == config.to_json_string()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_latents": 20, "k": 3}, "KSparseAutoencoderConfig needs d_in, which the given config lacks"),
        ({"d_in": 10, "num_latents": 20}, "needs k, which"),
        ({"d_in": 10, "k": 3}, "needs num_latents, which"),
        ({"d_in": 10, "num_latents": 20, "kk": 3}, r"does not know 'kk' \(did you mean 'k'\?\)"),
        ({"d_in": 10, "num_latents": 20, "k": 21}, "k must be at most num_latents = 20, got k = 21"),
        ({"d_in": 10, "num_latents": 20, "k": 3, "expansion_factor": 3}, "num_latents 20 is not d_in 10 ×"),
    ],
)
def test_a_config_file_with_missing_or_unknown_keys_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KSparseAutoencoderConfig.from_dict(KIND | content)


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="of the kind 'bert', not 'k-sparse-autoencoder'"):
        KSparseAutoencoderConfig.from_dict({"model_type": "bert", "d_in": 10})
    with pytest.raises(ValueError, match=r"no config\.json, or it names no model_type"):
        KSparseAutoencoderConfig.from_dict({"d_in": 10})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_dir": ""}, "output_dir must name a folder"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number > 0, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer ≥ 0"),
        (
            {"lr_scheduler_type": "step"},
            "lr_scheduler_type must be one of 'warmup_stable_decay', 'constant_with_warmup'",
        ),
        ({"batch_size": 0}, "batch_size must be an integer ≥ 1"),
        ({"batch_size": 2.5}, "batch_size must be an integer ≥ 1, got 2.5"),
        ({"max_steps": 0}, "max_steps must be an integer ≥ 1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be a number > 0"),
        ({"auxk": -1}, "auxk must be an integer ≥ 0"),
        ({"dead_latent_boost": -1}, "dead_latent_boost must be a number ≥ 0"),
        ({"decay_fraction": 1.5}, "decay_fraction must be a number ≥ 0 and ≤ 1"),
        ({"auxk_alpha": -0.1}, "auxk_alpha must be a number ≥ 0"),
        ({"dead_after_rows": 0}, "dead_after_rows must be an integer ≥ 1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a number > 0"),
        ({"eval_fraction": 0.95}, "eval_fraction must be a number ≥ 0 and ≤ 0.9, got 0.95"),
        ({"seed": -1}, "seed must be an integer ≥ 0"),
        ({"logging_steps": 0}, "logging_steps must be an integer ≥ 1"),
        ({"save_steps": 0}, "save_steps must be an integer ≥ 1"),
    ],
)
def test_invalid_training_arguments_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAETrainingArguments(**{"output_dir": "runs/sae", **given})


def test_the_default_learning_rate_follows_the_width() -> None:
    args = SAETrainingArguments(output_dir="runs/sae")
    assert (args.learning_rate, args.warmup_steps) == (None, 0)
    assert args.peak_learning_rate(64) == pytest.approx(3e-3)
    assert args.peak_learning_rate(256) == pytest.approx(1.5e-3)
    assert SAETrainingArguments(output_dir="runs/sae", learning_rate=5e-4).peak_learning_rate(256) == 5e-4


def test_revelios_training_by_name() -> None:
    args = SAETrainingArguments.revelio("runs/sae", batch_size=64, auxk=2)
    assert (args.output_dir, args.learning_rate, args.warmup_steps) == ("runs/sae", 4e-4, 500)
    assert (args.batch_size, args.auxk) == (64, 2)
    assert SAETrainingArguments.revelio("runs/sae").auxk == 0


def test_training_arguments_round_trip_through_json() -> None:
    args = SAETrainingArguments(output_dir="runs/sae", max_steps=7, auxk=3, max_grad_norm=None)
    assert SAETrainingArguments.from_dict(json.loads(json.dumps(args.to_dict()))) == args
    with pytest.raises(ValueError, match=r"does not know 'learning_rat' \(did you mean 'learning_rate'\?\)"):
        SAETrainingArguments.from_dict(args.to_dict() | {"learning_rat": 1e-3})
    with pytest.raises(ValueError, match="SAETrainingArguments needs output_dir"):
        SAETrainingArguments.from_dict({})
