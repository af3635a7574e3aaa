"""The fused update against `backward()` and `torch.optim`, for everything that can be trained."""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, optim

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainingArguments
from diffusion_sae._training import load_checkpoint, save_checkpoint
from diffusion_sae.sae import micro_batches, penalised
from diffusion_sae.sae import step as step_module
from diffusion_sae.sae.configuration import ACTIVATIONS
from diffusion_sae.sae.step import StepReport, TrainingStep
from diffusion_sae.sae.training_args import OPTIMIZERS

D_IN, NUM_LATENTS, K, ROWS, LEARNING_RATE = 16, 48, 4, 32, 1e-2
PENALISED = ("jumprelu", "relu")
MODELS = {
    "plain": {},
    "matryoshka": {"matryoshka_sizes": [8, 20, NUM_LATENTS]},
    "layer_norm": {"input_norm": "layer_norm"},
    "timesteps": {"timesteps": [25, 200]},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "auxk": {"auxk": 5, "auxk_alpha": 0.5, "dead_after_rows": ROWS},
    "multi_topk": {"multi_topk_alpha": 0.125},
    "clipping": {"max_grad_norm": 1e-2},
    "micro_batches": {"micro_batch_size": 12},
    "bf16": {"bf16": True},
    "everything": {
        "auxk": 5,
        "dead_after_rows": ROWS,
        "multi_topk_alpha": 0.125,
        "max_grad_norm": 0.1,
        "micro_batch_size": 12,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
        "weight_decay": 0.1,
    },
}
MODELS_OF = [(a, model) for a in ACTIVATIONS for model in MODELS if not (a in PENALISED and model == "matryoshka")]
COMPARED = [  # of the dense ones both ways are the same
    (a, model, settings)
    for a, model in MODELS_OF
    for settings in SETTINGS
    if a not in PENALISED or settings in ("plain", "everything")
]
RESUMED = [(a, model) for a, model in MODELS_OF if model == "plain" or a == "batchtopk"]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of latents, the last a smaller one."""
    monkeypatch.setattr(step_module, "LATENT_BLOCK", 20)


def make_step(activation: str = "topk", model: str = "plain", **settings: Any) -> TrainingStep:
    config = KSparseAutoencoderConfig(
        d_in=D_IN, num_latents=NUM_LATENTS, k=K, activation=activation, jumprelu_bandwidth=0.5, **MODELS[model]
    )
    sae = KSparseAutoencoder(config)
    if model == "timesteps":
        sae.timestep_scale.copy_(torch.tensor([1.0, 2.5]))
    given = {"output_dir": "unused", "auxk": 0, "max_grad_norm": None} | settings
    return TrainingStep(sae, SAETrainingArguments(**given))


def timesteps_of(step: TrainingStep) -> Tensor | None:
    known = step.sae.config.timesteps
    return None if known is None else torch.tensor(known).repeat(ROWS)[:ROWS]


def run(step: TrainingStep, features: Tensor) -> list[StepReport]:
    return [step(batch, LEARNING_RATE, timesteps=timesteps_of(step)) for batch in features.split(ROWS)]


def assert_same_state(got: TrainingStep, expected: TrainingStep, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Weights, moments and counters; 0 for both tolerances: bit for bit."""
    for name, value in expected.sae.state_dict().items():
        torch.testing.assert_close(got.sae.state_dict()[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)
    states = [step.optimizer.state_dict()["state"] for step in (got, expected)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[1].items():
        assert states[0][index].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(states[0][index][name], value, rtol=rtol, atol=atol)
    assert torch.equal(got.rows_since_active, expected.rows_since_active)


@pytest.mark.parametrize(("activation", "model", "settings"), COMPARED, ids=map("-".join, COMPARED))
def test_fused_equals_backward_and_adam(
    activation: str, model: str, settings: str, superposition: Callable[..., Tensor]
) -> None:
    features = superposition(3 * ROWS)
    fused, ordinary = (make_step(activation, model, **SETTINGS[settings]) for _ in range(2))
    assert fused.fused
    ordinary.fused = False
    start = {name: value.clone() for name, value in fused.sae.state_dict().items()}
    reports, expected = run(fused, features), run(ordinary, features)
    for got, other in zip(reports, expected, strict=True):
        torch.testing.assert_close(got.loss, other.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.fvu, other.fvu, rtol=1e-4, atol=1e-5)
    assert_same_state(fused, ordinary)
    changed = {name for name, value in fused.sae.state_dict().items() if not torch.equal(value, start[name])}
    assert changed >= {"W_enc", "b_enc", "W_dec", "b_dec"}
    torch.testing.assert_close(fused.sae.W_dec.norm(dim=1), torch.ones(NUM_LATENTS))
    assert all(torch.isfinite(report.loss) for report in reports)
    assert reports[-1].fvu.item() < reports[0].fvu.item()


@pytest.mark.parametrize("activation", PENALISED)
@pytest.mark.parametrize("fused", [True, False])
def test_few_active_latents_give_the_step_of_dense_codes(
    activation: str, fused: bool, superposition: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for few in (0.0, 1.0):
        monkeypatch.setattr(penalised, "FEW", few)
        step = make_step(activation, sparsity_coefficient=0.1, max_grad_norm=0.1)
        step.fused = fused
        with torch.no_grad():
            (step.sae.log_threshold if activation == "jumprelu" else step.sae.b_enc).fill_(-0.3)
        passes = "_sparse_pass" if few else "_dense_pass"
        called = mock.Mock(wraps=getattr(penalised, passes))
        monkeypatch.setattr(penalised, passes, called)
        reports = run(step, superposition(3 * ROWS))
        assert called.call_count == 3
        steps.append((step, reports))
    (dense, expected), (sparse, got) = steps
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=1e-5)
    assert_same_state(sparse, dense)
    if activation == "jumprelu":
        assert not torch.equal(sparse.sae.log_threshold, torch.full((NUM_LATENTS,), -0.3)), "thresholds have learned"


@pytest.mark.parametrize("changed", ["auxk", "multi_topk", "clipping", "bf16"])
def test_the_settings_do_something(changed: str, superposition: Callable[..., Tensor]) -> None:
    """Else the comparison above would be of the same thing again and again."""
    steps = [make_step(**SETTINGS[name]) for name in ("plain", changed)]
    for step in steps:
        run(step, superposition(4 * ROWS))
    assert not torch.allclose(steps[0].sae.W_dec, steps[1].sae.W_dec, rtol=1e-3, atol=1e-4)


PARTED = {
    "plain": {},
    "auxk": {"auxk": 8, "dead_after_rows": ROWS},
    "multi_topk": {"multi_topk_alpha": 0.125},
    "penalty": {"sparsity_coefficient": 0.3},
}
PARTED_OF = [
    (activation, model, settings)
    for activation, model in MODELS_OF
    for settings in PARTED
    if settings != ("multi_topk" if activation in PENALISED else "penalty")
]


@pytest.mark.parametrize(("activation", "model", "settings"), PARTED_OF, ids=map("-".join, PARTED_OF))
def test_micro_batches_come_to_the_whole_batch(
    activation: str, model: str, settings: str, superposition: Callable[..., Tensor]
) -> None:
    """Of five rows, the last of fewer; batchtopk's choice, L0 and AuxK's ratio are of the whole batch."""
    features = superposition(4 * ROWS)
    whole = make_step(activation, model, **PARTED[settings])
    parts = make_step(activation, model, **PARTED[settings], micro_batch_size=5)
    for got, expected in zip(run(parts, features), run(whole, features), strict=True):
        for name in ("loss", "fvu", "l0"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
        assert torch.equal(got.active, expected.active)
    assert_same_state(parts, whole)


def test_dense_codes_are_taken_in_parts_that_fit(
    superposition: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, calls = superposition(ROWS), []
    monkeypatch.setattr(micro_batches, "DENSE_BYTES", 4 * NUM_LATENTS * 7)
    for activation, parts in (("relu", -(-ROWS // 7)), ("topk", 1)):
        step = make_step(activation)
        step.sae.register_forward_hook(lambda *_: calls.append(1))
        run(step, features)
        assert len(calls) == parts
        calls.clear()
    with torch.no_grad():
        step = make_step("relu")
        step.sae.b_enc.fill_(-100)  # then hardly any latent is active, and codes are sparse
    step.sae.register_forward_hook(lambda *_: calls.append(1))
    run(step, features)
    assert len(calls) == 1


def test_the_threshold_of_batchtopk_is_the_mean_of_the_smallest_that_were_kept(
    superposition: Callable[..., Tensor],
) -> None:
    features = superposition(3 * ROWS)
    step = make_step("batchtopk", micro_batch_size=ROWS // 2)
    smallest = []
    for batch in features.split(ROWS):
        acts = step.sae.train()(batch).top_acts
        smallest.append(acts[acts > 0].min().item())
        step(batch, LEARNING_RATE)
        assert step.sae.threshold.item() == pytest.approx(sum(smallest) / len(smallest), rel=1e-5)


def test_gradients_that_are_kept_for_clipping_are_those_formed_twice(
    superposition: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, formed_twice = (make_step(**SETTINGS["everything"]) for _ in range(2))
    assert kept._keeps_gradients()
    assert not make_step()._keeps_gradients()
    run(kept, superposition(4 * ROWS))
    monkeypatch.setattr(step_module, "KEPT_GRADIENT_BYTES", 0)
    run(formed_twice, superposition(4 * ROWS))
    assert_same_state(kept, formed_twice, rtol=0, atol=0)


@pytest.mark.parametrize(("activation", "model"), MODELS_OF, ids=map("-".join, MODELS_OF))
def test_nothing_of_a_step_outlives_it(
    activation: str, model: str, superposition: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its codes and gradients are megabytes, and a cycle through autograd's graph is one that nothing collects."""
    step, noted = make_step(activation, model, **SETTINGS["everything"]), []
    share = step.processes.share
    monkeypatch.setattr(step.processes, "share", lambda given: share(noted.append(weakref.ref(given)) or given))
    reports = run(step, superposition(2 * ROWS))
    gc.collect()
    assert len(reports) == len(noted) == 2
    assert [of_step() for of_step in noted] == [None, None]


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in PENALISED])
@pytest.mark.parametrize("settings", ["plain", "everything"])
def test_the_weights_never_get_a_gradient(
    activation: str, settings: str, superposition: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(activation, **SETTINGS[settings])
    seen, update = [], step._update

    def look(*args: Any) -> None:
        seen.append([step.sae.W_enc.grad, step.sae.W_dec.grad])
        update(*args)
        seen.append([step.sae.W_enc.grad, step.sae.W_dec.grad])

    monkeypatch.setattr(step, "_update", look)
    run(step, superposition(2 * ROWS))
    assert seen == [[None, None]] * 4
    assert all(parameter.grad is None for parameter in step.sae.parameters())
    assert step.sae._collect is None


def test_layout_of_weights_and_moments(superposition: Callable[..., Tensor]) -> None:
    """One latent is one contiguous row in all of them."""
    step = make_step()
    run(step, superposition(ROWS))
    tensors = [step.sae.W_enc, *(step.optimizer.state[step.sae.W_enc][name] for name in ("exp_avg", "exp_avg_sq"))]
    assert {tensor.stride() for tensor in tensors} == {(1, D_IN)}


@pytest.mark.parametrize(("activation", "model"), RESUMED, ids=map("-".join, RESUMED))
def test_a_checkpoint_continues_bit_for_bit(
    activation: str, model: str, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    settings = SETTINGS["everything"]
    features = superposition(5 * ROWS)
    step = make_step(activation, model, **settings)
    run(step, features[: 2 * ROWS])
    extra = {"rows_since_active": step.rows_since_active}
    save_checkpoint(tmp_path, step.sae, step.optimizer, extra, run="a", history=[])
    run(step, features[2 * ROWS :])

    resumed = make_step(activation, model, **settings)
    loaded = load_checkpoint(tmp_path, resumed.sae, resumed.optimizer, run="a", history=[])
    assert loaded is not None
    resumed.rows_since_active.copy_(loaded["rows_since_active"])
    resumed.steps_done = 2
    run(resumed, features[2 * ROWS :])
    assert_same_state(resumed, step, rtol=0, atol=0)
    assert resumed.sae.W_enc.stride() == (1, D_IN)


def test_a_checkpoint_of_either_way_continues_the_other(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """The fused update keeps its moments as torch.optim.Adam does."""
    features = superposition(4 * ROWS)
    expected = make_step()
    run(expected, features)
    for first in (True, False):
        step, second = make_step(), make_step()
        step.fused, second.fused = first, not first
        run(step, features[: 2 * ROWS])
        folder = tmp_path / str(first)
        folder.mkdir()
        extra = {"rows_since_active": step.rows_since_active}
        save_checkpoint(folder, step.sae, step.optimizer, extra, run="a", history=[])
        loaded = load_checkpoint(folder, second.sae, second.optimizer, run="a", history=[])
        second.rows_since_active.copy_(loaded["rows_since_active"])
        run(second, features[2 * ROWS :])
        assert_same_state(second, expected)


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - {"adam"}))
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_other_optimizers(optimizer: str, activation: str, superposition: Callable[..., Tensor]) -> None:
    step = make_step(activation, optimizer=optimizer)
    assert not step.fused
    classes = {"adamw": optim.AdamW, "radam": optim.RAdam, "nadam": optim.NAdam, "sgd": optim.SGD}
    assert type(step.optimizer) is classes[optimizer]
    reports = [report for _ in range(5) for report in run(step, superposition(4 * ROWS))]
    assert reports[-1].loss.item() < reports[0].loss.item()
    assert step.optimizer.param_groups[0]["lr"] == LEARNING_RATE
    torch.testing.assert_close(step.sae.W_dec.norm(dim=1), torch.ones(NUM_LATENTS))


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_compiled(activation: str, superposition: Callable[..., Tensor]) -> None:
    """Not that it is faster (docs/speed.md), but that it is the same; without a C++ compiler."""
    compiled, plain = make_step(activation, **SETTINGS["everything"]), make_step(activation, **SETTINGS["everything"])
    compiled.sae.forward = torch.compile(compiled.sae.forward, backend="aot_eager")  # type: ignore[method-assign]
    run(compiled, superposition(3 * ROWS))
    run(plain, superposition(3 * ROWS))
    assert_same_state(compiled, plain)


def test_one_step_of_adam_by_hand(superposition: Callable[..., Tensor]) -> None:
    """The first step of Adam moves each weight that has a gradient by the learning rate, against its sign."""
    batch = superposition(ROWS)
    step, other = make_step(), make_step()
    before = step.sae.W_enc.detach().clone()
    other.sae(batch).loss.backward()
    gradient = other.sae.W_enc.grad
    step(batch, LEARNING_RATE)
    moved = gradient.abs() > 1e-5
    assert moved.any()
    torch.testing.assert_close(
        (step.sae.W_enc - before)[moved], -LEARNING_RATE * gradient.sign()[moved], rtol=1e-2, atol=0
    )
    assert torch.equal(step.sae.W_enc[gradient == 0], before[gradient == 0])


def test_another_k_than_the_configs(superposition: Callable[..., Tensor]) -> None:
    step = make_step()
    assert step(superposition(ROWS), LEARNING_RATE, k=9).l0 == 9
    assert step(superposition(ROWS), LEARNING_RATE).l0 == K


def test_rows_since_a_latent_was_active(superposition: Callable[..., Tensor]) -> None:
    step = make_step()
    first, second = run(step, superposition(2 * ROWS))
    actives = [set(report.active.nonzero().flatten().tolist()) for report in (first, second)]
    assert actives[0] - actives[1]
    for latent, rows in enumerate(step.rows_since_active.tolist()):
        assert rows == (0 if latent in actives[1] else ROWS if latent in actives[0] else 2 * ROWS)


def test_a_report_is_of_the_weights_before_the_update(superposition: Callable[..., Tensor]) -> None:
    batch = superposition(ROWS)
    step = make_step()
    output = step.sae(batch)
    report = step(batch, LEARNING_RATE)
    assert torch.equal(report.loss, output.loss)
    assert torch.equal(report.fvu, output.fvu)
    active = output.top_acts != 0
    assert report.l0.item() == pytest.approx(active.sum().item() / ROWS)
    assert set(report.active.nonzero().flatten().tolist()) == set(output.top_indices[active].tolist())
    assert not any(getattr(report, field.name).requires_grad for field in dataclasses.fields(report))
