"""What a training can be told beyond the paper's recipe, each against what it claims."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainer, SAETrainingArguments
from diffusion_sae._training import MetricsLogger, TrainingDivergedError
from diffusion_sae.features import FeatureSet, ShuffledBatches
from diffusion_sae.provenance import Provenance
from diffusion_sae.sae.checkpoints import BEST
from diffusion_sae.sae.configuration import ACTIVATIONS
from diffusion_sae.sae.divergence import diverging_lines
from diffusion_sae.sae.evaluation import SAEMetrics, evaluate_sae
from diffusion_sae.sae.preparation import fold_input_scale_, geometric_median, input_scale
from diffusion_sae.sae.resampling import resample_
from diffusion_sae.sae.results import SAECallback
from diffusion_sae.sae.step import TrainingStep
from diffusion_sae.sae.trainer import train_together

D_IN, NUM_LATENTS, K = 16, 64, 4


def make_sae(**config: Any) -> KSparseAutoencoder:
    return KSparseAutoencoder(KSparseAutoencoderConfig(**{"d_in": D_IN, "num_latents": NUM_LATENTS, "k": K, **config}))


def make_args(output_dir: Path, **changes: Any) -> SAETrainingArguments:
    settings = {"learning_rate": 3e-3, "warmup_steps": 5, "batch_size": 64, "max_steps": 20, "dead_after_rows": 10_000}
    return SAETrainingArguments(output_dir=str(output_dir), **(settings | changes))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["scalar", "per_feature"])
def test_folding_the_input_scale_changes_no_output(
    activation: str, kind: str, superposition: Callable[..., Tensor]
) -> None:
    features = superposition(60) * 7 * torch.linspace(0.5, 3, D_IN)
    source = ShuffledBatches(FeatureSet.from_tensor(features), 20)
    scale = input_scale(source, kind)
    sae = make_sae(activation=activation).eval()
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(0))
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(1))
        if activation == "batchtopk":
            sae.threshold.fill_(0.4)
        if activation == "jumprelu":
            sae.log_threshold.fill_(-1.0)
        before = sae(features / scale)
        fold_input_scale_(sae, scale)
        after = sae(features)
    torch.testing.assert_close(after.reconstruction, before.reconstruction * scale, rtol=1e-4, atol=1e-4)
    active = [
        torch.zeros(60, NUM_LATENTS).scatter_add_(1, o.top_indices, (o.top_acts != 0).float()) for o in (before, after)
    ]
    assert torch.equal(*active), "other latents are active"
    assert active[0].sum() > 0
    if kind == "scalar":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(NUM_LATENTS))


def test_input_scales_are_what_they_say(superposition: Callable[..., Tensor]) -> None:
    features = superposition(640) * 5
    source = ShuffledBatches(FeatureSet.from_tensor(features), 64)
    assert (features / input_scale(source, "scalar")).pow(2).mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close((features / input_scale(source, "per_feature")).std(0), torch.ones(D_IN))
    assert input_scale(source, "none") == 1


@pytest.mark.parametrize("kind", ["scalar", "per_feature"])
def test_a_normalised_training_gives_an_sae_of_the_features_as_they_are(
    kind: str, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    features = superposition(1000) * 50
    result = SAETrainer(make_sae(), features, make_args(tmp_path, normalize_input=kind, max_steps=150)).train(
        progress=False
    )
    loaded = KSparseAutoencoder.from_pretrained(tmp_path)
    assert evaluate_sae(loaded, superposition(500, seed=1) * 50).fvu == pytest.approx(result.metrics.fvu, abs=0.1)
    assert result.metrics.fvu < 0.5
    again = SAETrainer(make_sae(), features, make_args(tmp_path, normalize_input=kind, max_steps=150)).train(
        progress=False
    )
    assert again.metrics == result.metrics, "a finished run, asked for again, folds the scale once"


def test_geometric_median_is_robust_and_right() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(geometric_median(rows), torch.tensor([0.5, 0.5]))
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1e6]])  # in one dimension it is the median
    torch.testing.assert_close(geometric_median(line, steps=2000), torch.tensor([2.0]), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["geometric_median", "zero"])
def test_b_dec_begins_as_asked(kind: str, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    features = superposition(300)
    args = make_args(tmp_path, b_dec_init=kind, eval_fraction=0, batch_size=100)
    trainer = SAETrainer(make_sae(), features, args)
    trainer.begin()
    expected = geometric_median(features) if kind == "geometric_median" else torch.zeros(D_IN)
    torch.testing.assert_close(trainer.sae.b_dec.detach(), expected, atol=1e-4, rtol=1e-4)


def test_k_falls_to_its_value(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    trainer = SAETrainer(make_sae(), superposition(300), make_args(tmp_path, k_anneal_start=20, k_anneal_steps=8))
    assert [trainer._k(step) for step in (0, 2, 4, 7, 8, 30)] == [20, 16, 12, 6, None, None]
    trainer.begin()
    report = trainer.advance(superposition(64), None)
    assert report.l0 == 20


def test_the_moving_average_is_that_of_the_weights(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    trainer = SAETrainer(make_sae(), superposition(300), make_args(tmp_path, ema_decay=0.5, eval_fraction=0))
    trainer.begin()
    expected = trainer.sae.b_enc.detach().clone()
    for step in range(4):
        trainer.advance(trainer.source.batch(step), None)
        decay = min(0.5, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * trainer.sae.b_enc.detach()
    torch.testing.assert_close(trainer.average.weights["b_enc"], expected)
    last = trainer.sae.b_enc.detach().clone()
    trainer.finish(0.0)
    torch.testing.assert_close(trainer.sae.b_enc.detach(), expected)
    assert not torch.equal(last, expected)


def test_stops_early_and_keeps_the_best(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """A rate that is far too high after a good start: the FVU grows, and the best is not the last."""
    args = make_args(
        tmp_path,
        learning_rate=0.3,
        warmup_steps=100,
        max_steps=400,
        eval_steps=5,
        early_stopping_patience=3,
        keep_best=True,
    )
    result = SAETrainer(make_sae(), superposition(600), args).train(progress=False)
    fvus = [entry["eval_fvu"] for entry in result.history if "eval_fvu" in entry]
    assert result.steps < 400
    assert len(fvus) == fvus.index(min(fvus)) + 1 + 3
    assert result.metrics.fvu == pytest.approx(min(fvus), rel=1e-6)
    assert (tmp_path / BEST).exists()
    again = SAETrainer(make_sae(), superposition(600), args).train(progress=False)
    assert (again.metrics, again.steps) == (result.metrics, result.steps)


def test_dead_latents_are_resampled_to_what_is_left_over(superposition: Callable[..., Tensor]) -> None:
    sae, features = make_sae(), superposition(200)
    optimizer = torch.optim.Adam(sae.parameters())
    sae(features).loss.backward()
    optimizer.step()
    dead = torch.zeros(NUM_LATENTS, dtype=torch.bool)
    dead[[3, 9]] = True
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    residual = (features - sae(features).reconstruction).detach()
    assert resample_(sae, optimizer, dead, features, torch.Generator().manual_seed(0)) == 2
    directions = torch.nn.functional.normalize(residual, dim=1)
    assert (sae.W_dec[dead].detach() @ directions.T).amax(1) == pytest.approx([1, 1], abs=1e-5)
    length = before["W_enc"][:, ~dead].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, dead].detach(), length * sae.W_dec[dead].detach().T)
    assert (optimizer.state[sae.W_enc]["exp_avg"][:, dead] == 0).all()
    assert (optimizer.state[sae.W_dec]["exp_avg_sq"][dead] == 0).all()
    for name, value in sae.state_dict().items():
        alive = (value.T if name == "W_enc" else value)[~dead] if name != "b_dec" else value
        was = (before[name].T if name == "W_enc" else before[name])[~dead] if name != "b_dec" else before[name]
        assert torch.equal(alive, was), name


def test_resampling_revives_in_a_training(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    def dead_after(resample_steps: int | None) -> float:
        sae = make_sae()
        with torch.no_grad():
            sae.W_enc[:, : NUM_LATENTS // 2] *= 0.01
        args = make_args(
            tmp_path / str(resample_steps),
            dead_latent_boost=0,
            max_steps=200,
            dead_after_rows=1000,
            resample_steps=resample_steps,
        )
        return SAETrainer(sae, superposition(2000), args).train(progress=False).metrics.dead_latents

    assert dead_after(None) > 0.4
    assert dead_after(50) < 0.25


def test_too_many_dead_latents_stop_with_advice(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.W_enc[:, :60] = 0
    settings = {"dead_latent_boost": 0, "dead_after_rows": 64, "max_dead_latents": 0.5}
    args = make_args(tmp_path, logging_steps=2, save_steps=1, **settings)
    with pytest.raises(TrainingDivergedError, match=r"9\d% of the latents are dead at step 1, .*encoder_init='tied'"):
        SAETrainer(sae, superposition(300), args).train(progress=False)
    assert not (tmp_path / "model.safetensors").exists()


def test_collapse_of_the_latents_stops_by_default(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    sae = make_sae(k=2)
    with torch.no_grad():
        sae.W_enc[:, :62] = 0
    args = make_args(tmp_path, logging_steps=2, save_steps=1, dead_latent_boost=0)
    with pytest.raises(TrainingDivergedError, match=r"97% of the latents are dead .* more than max_dead_latents = 95%"):
        SAETrainer(sae, superposition(300), dataclasses.replace(args, dead_after_rows=128)).train(progress=False)
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert SAETrainingArguments.revelio("unused").max_dead_latents == 1, "of the paper's nothing stops for it"


class TestDivergence:
    def test_a_loss_that_rises_for_good_stops_the_training(
        self, superposition: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        """At this learning rate no number is ever NaN. The checkpoint from before is kept."""
        args = make_args(tmp_path, learning_rate=1e-3, warmup_steps=0, max_steps=400, logging_steps=5, save_steps=5)
        trainer = SAETrainer(make_sae(), superposition(300), args)
        trainer._learning_rate = lambda step: 1e-3 if step < 20 else 10.0  # type: ignore[method-assign]
        said = r"The loss was 0\.\d+ at best and is .* at step 35, .*for 3 log lines.*Lower learning_rate.* is kept"
        with pytest.raises(TrainingDivergedError, match=said):
            trainer.train(progress=False)
        checkpoint = load_file(tmp_path / "checkpoint.safetensors")
        assert int(checkpoint["extra.step"]) == 20
        assert checkpoint["model.W_enc"].abs().max() < 2
        assert not (tmp_path / "model.safetensors").exists()

    @pytest.mark.parametrize(
        ("losses", "fvus", "expected"),
        [
            ([1.0, 3.0, 3.0, 3.0], [1.0, 2.0, 2.0, 2.0], 3),
            ([1.0, 3.0, 1.5, 3.0], [1.0, 2.0, 2.0, 2.0], 1),
            ([9.0, 8.0, 7.0, 6.0], [9.0, 8.0, 7.0, 6.0], 0),  # a bad start that gets better
            ([0.1, 0.4, 0.4, 0.4], [0.1, 0.4, 0.4, 0.4], 0),  # worse than its best, and still of use
            ([0.1, 0.1, 0.1, 5.0], [0.1, 0.1, 0.1, 5.0], 1),
        ],
    )
    def test_what_counts(self, losses: list[float], fvus: list[float], expected: int) -> None:
        lines = [{"step": 10 * i, "loss": a, "fvu": b} for i, (a, b) in enumerate(zip(losses, fvus, strict=True))]
        history = [part for line in lines for part in (line, {"step": line["step"], "eval_fvu": 2.0})]
        assert diverging_lines(history, 0) == expected
        assert diverging_lines(history, 1000) == 0, "in the warm-up"

    def test_an_sae_worse_than_the_mean_row_is_told_of(
        self, superposition: Callable[..., Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        args = make_args(tmp_path, max_steps=1, b_dec_init="zero", learning_rate=1e-6)
        SAETrainer(make_sae(k=1), superposition(300) + 30, args).train(progress=False)
        assert "explains less than the mean row" in caplog.text

    def test_batches_of_one_row_are_logged_as_json(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        args = make_args(tmp_path, batch_size=1, max_steps=3, logging_steps=1)
        SAETrainer(make_sae(), superposition(300), args).train(progress=False)
        text = (tmp_path / "training_history.json").read_text()
        assert "Infinity" not in text
        assert "NaN" not in text


def test_revelios_training_against_dense_autograd(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """30 steps of the paper's recipe, written anew: signed TopK, Adam at 4e-4 after a warm-up, no clipping."""
    sae = make_sae(activation="signed_topk", encoder_init="kaiming")
    args = SAETrainingArguments.revelio(str(tmp_path), batch_size=64, max_steps=1200)
    trainer = SAETrainer(sae, superposition(1000), args)
    trainer.begin()
    W_enc, b_enc, W_dec, b_dec = weights = [
        getattr(sae, name).detach().clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    ]
    optimizer = torch.optim.Adam(weights, lr=4e-4)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 500))
    for step in range(30):
        batch = trainer.source.batch(step)
        trainer.advance(batch, None)
        pre_acts = (batch - b_dec) @ W_enc + b_enc
        kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(K, dim=1).indices, 1.0)
        error = (pre_acts * kept) @ W_dec + b_dec - batch
        optimizer.zero_grad()
        (error.pow(2).sum(1) / batch.pow(2).sum(1)).mean().backward()
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        optimizer.step()
        warmup.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    for name, expected in zip(("W_enc", "b_enc", "W_dec", "b_dec"), weights, strict=True):
        torch.testing.assert_close(getattr(sae, name).detach(), expected.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_a_callback_ends_the_training(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    class GoodEnough(SAECallback):
        seen: ClassVar[list[int]] = []

        def on_evaluate(self, trainer: SAETrainer, step: int, metrics: SAEMetrics) -> None:
            self.seen.append(step)
            assert 0 < metrics.fvu < 1
            if step == 8:
                trainer.stop()

    args = make_args(tmp_path, eval_steps=4)
    result = SAETrainer(make_sae(), superposition(300), args, callbacks=[GoodEnough()]).train(progress=False)
    assert result.steps == 8
    assert GoodEnough.seen == [4, 8]
    assert (tmp_path / "model.safetensors").exists()


class Killed(SAECallback):
    """After the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, trainer: SAETrainer, step: int) -> None:
        if step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["on_evaluate", "on_save"])
def test_a_training_that_a_callback_has_ended_stays_so(
    event: str, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    class Enough(SAECallback):
        pass

    def stop(_: Any, trainer: SAETrainer, step: int, *more: Any) -> None:
        if step == 8:
            trainer.stop()

    setattr(Enough, event, stop)
    args, features = make_args(tmp_path, eval_steps=4, save_steps=4), superposition(300)
    if event == "on_evaluate":
        with pytest.raises(KeyboardInterrupt):  # before the finished SAE is written
            SAETrainer(make_sae(), features, args, callbacks=[Enough(), Killed(8)]).train(progress=False)
    else:
        assert SAETrainer(make_sae(), features, args, callbacks=[Enough()]).train(progress=False).steps == 8
    assert SAETrainer(make_sae(), features, args).train(progress=False).steps == 8


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_resumes_where_it_was_evaluated_and_resamples(
    activation: str, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    """An evaluation leaves the SAE as it was: what a resampling chooses by is the same with and without it."""
    settings = {"max_steps": 50, "eval_steps": 25, "save_steps": 25, "resample_steps": 25, "dead_after_rows": 20}
    settings |= {"dead_latent_boost": 0.0, "learning_rate": 3e-2, "max_dead_latents": 1.0}
    features, ends = superposition(1000), []
    for name in ("undisturbed", "killed"):
        args = make_args(tmp_path / name, **settings)
        if name == "killed":
            trainer = SAETrainer(make_sae(activation=activation), features, args, callbacks=[Killed(25)])
            with pytest.raises(KeyboardInterrupt):
                trainer.train(progress=False)
        SAETrainer(make_sae(activation=activation), features, args).train(progress=False)
        ends.append(load_file(tmp_path / name / "checkpoint.safetensors"))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


@pytest.mark.parametrize("length", [1.0, 20.0])
def test_jumprelu_comes_to_k_whatever_the_length_of_the_rows(
    length: float, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    features = superposition(4000) * length
    args = make_args(tmp_path, max_steps=400, warmup_steps=0)
    result = SAETrainer(make_sae(activation="jumprelu"), features - features.mean(0), args).train(progress=False)
    assert abs(result.history[0]["l0"] - K) < K / 2
    assert abs(result.metrics.l0 - K) < K / 4


def test_thresholds_that_have_been_learned_stay(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    sae = make_sae(activation="jumprelu")
    with torch.no_grad():
        sae.log_threshold.copy_(-0.5 + 0.1 * torch.arange(NUM_LATENTS) / NUM_LATENTS)
    before = sae.log_threshold.detach().clone()
    SAETrainer(sae, superposition(300), make_args(tmp_path, max_steps=1, learning_rate=1e-6)).train(progress=False)
    torch.testing.assert_close(sae.log_threshold.detach(), before, rtol=0, atol=1e-4)


def test_relu_comes_to_a_sparse_code_by_its_default(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    args = make_args(tmp_path, max_steps=400, warmup_steps=0)
    result = SAETrainer(make_sae(activation="relu"), superposition(4000), args).train(progress=False)
    assert result.history[0]["l0"] > NUM_LATENTS / 3
    assert result.metrics.l0 < NUM_LATENTS / 6
    assert result.metrics.fvu < 0.5


def test_weights_of_fp16_are_refused_and_of_fp64_trained_in_parts(
    superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    features = superposition(300)
    with pytest.raises(ValueError, match=r"adam cannot train weights of torch\.float16.*sae\.float\(\)"):
        SAETrainer(make_sae().half(), features, make_args(tmp_path / "half"))
    args = make_args(tmp_path / "double", micro_batch_size=20)
    result = SAETrainer(make_sae().double(), features, args).train(progress=False)
    assert result.metrics.fvu < 1


class TestSeveralInOnePass:
    def test_each_ends_as_it_would_alone(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        features = superposition(400)

        def trainers(folder: Path) -> list[SAETrainer]:
            settings = [{"k": 4}, {"k": 8, "num_latents": 32}, {"activation": "batchtopk"}, {"init_seed": 1}]
            return [
                SAETrainer(make_sae(**one), features, make_args(folder / str(i), max_steps=20 + 5 * i))
                for i, one in enumerate(settings)
            ]

        together = trainers(tmp_path / "together")
        results = train_together(together, progress=False)
        for alone, other, result in zip(trainers(tmp_path / "alone"), together, results, strict=True):
            assert alone.train(progress=False).metrics == result.metrics
            for name, value in alone.sae.state_dict().items():
                assert torch.equal(value, other.sae.state_dict()[name]), name

    def test_goes_on_after_one_was_interrupted(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        class Stop(SAECallback):
            def on_save(self, trainer: SAETrainer, step: int) -> None:
                if step == 8:
                    raise KeyboardInterrupt

        def trainers(callbacks: tuple[SAECallback, ...]) -> list[SAETrainer]:
            return [
                SAETrainer(make_sae(k=k), superposition(400), make_args(tmp_path / str(k), save_steps=4), callbacks=c)
                for k, c in ((3, callbacks), (5, ()))
            ]

        with pytest.raises(KeyboardInterrupt):
            train_together(trainers((Stop(),)), progress=False)
        stopped = [int(load_file(tmp_path / str(k) / "checkpoint.safetensors")["extra.step"]) for k in (3, 5)]
        assert stopped == [8, 4]
        resumed = trainers(())
        train_together(resumed, progress=False)
        fresh = SAETrainer(make_sae(k=5), superposition(400), make_args(tmp_path / "fresh", save_steps=4))
        fresh.train(progress=False)
        assert torch.equal(fresh.sae.W_enc, resumed[1].sae.W_enc)

    def test_other_orders_of_rows_are_refused(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        pair = [
            SAETrainer(make_sae(), superposition(400), make_args(tmp_path / str(seed), seed=seed)) for seed in (0, 1)
        ]
        with pytest.raises(ValueError, match=r"same features, batch_size, seed, .*got 2 different orders"):
            train_together(pair, progress=False)
        with pytest.raises(ValueError, match=r"output_dir each \(got 1\)"):
            train_together([pair[0], pair[0]], progress=False)


def test_callbacks_see_every_line(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Watch(SAECallback):
        def on_log(self, trainer: SAETrainer, step: int, values: dict[str, float]) -> None:
            seen.append(("eval" if "eval_fvu" in values else "log", step))

    args = make_args(tmp_path, logging_steps=8, eval_steps=10)
    SAETrainer(make_sae(), superposition(300), args, callbacks=[Watch()]).train(progress=False)
    assert seen == [("log", 1), ("log", 8), ("eval", 10), ("log", 16), ("log", 20), ("eval", 20)]


def test_one_sae_over_several_timesteps(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """Two timesteps of another mean and scale: with a b_dec and scale each the SAE loses nothing by their mixture."""
    one, other = superposition(500), superposition(500, seed=1) * 20 - 100
    provenance = Provenance(
        model="owner/model", layers=("up_ft1",), timesteps=(25, 100), image_size=64, weights="0123456789abcdef"
    )
    features = FeatureSet([one, other], rows_per_image=2, provenance=provenance, timesteps=(25, 100))
    sae = make_sae(timesteps=[25, 100])
    result = SAETrainer(sae, features, make_args(tmp_path, max_steps=300)).train(progress=False)
    assert result.metrics.fvu < 0.3
    test = superposition(300, seed=2)
    with torch.no_grad():
        for timestep, rows in ((25, test), (100, test * 20 - 100)):
            assert sae(rows, timesteps=timestep).fvu < 0.4
    torch.testing.assert_close(sae.timestep_scale[1] / sae.timestep_scale[0], torch.tensor(20.0), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({"input_norm": "layer_norm"}, {"normalize_input": "scalar"}, "cannot be folded into an SAE with input_norm"),
        ({}, {"k_anneal_start": 2}, "k_anneal_start must lie between k = 4 and num_latents = 64, got 2"),
        ({}, {"keep_best": True}, "keep_best need eval_steps: give it as well"),
        ({}, {"early_stopping_patience": 2}, "early_stopping_patience need eval_steps"),
        (
            {"activation": "relu"},
            {"multi_topk_alpha": 0.125},
            "are for TopK activations and batchtopk, this SAE's is 'relu'",
        ),
        ({"activation": "jumprelu"}, {"k_anneal_start": 8}, "this SAE's is 'jumprelu'. Leave them out"),
        ({}, {"optimizer": "lion"}, "optimizer must be one of 'adam'"),
        ({}, {"normalize_input": "rms"}, "normalize_input must be one of 'none', 'scalar', 'per_feature'"),
        ({}, {"b_dec_init": "median"}, "b_dec_init must be one of 'mean', 'geometric_median', 'zero'"),
        ({}, {"ema_decay": 1.0}, "ema_decay must be a number ≥ 0 and ≤ 0.999999"),
        ({}, {"max_dead_latents": 2}, "max_dead_latents must be a number ≥ 0 and ≤ 1"),
        ({}, {"micro_batch_size": 0}, "micro_batch_size must be an integer ≥ 1"),
    ],
)
def test_options_that_cannot_be_are_refused(
    config: dict[str, Any], given: dict[str, Any], message: str, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        SAETrainer(make_sae(**config), superposition(100), make_args(tmp_path, **given))


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_dense_latents_are_held_in_training_alone(
    activation: str, superposition: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, features = make_sae(activation=activation), superposition(60)
    dense = sae.train()(features)
    monkeypatch.setattr(KSparseAutoencoder, "_dense_pre_acts", lambda *_: pytest.fail("rows × latents were computed"))
    sparse = sae.eval()(features)
    torch.testing.assert_close(sparse.reconstruction, dense.reconstruction)
    assert sparse.loss.item() == pytest.approx(dense.loss.item(), rel=1e-5)
    assert evaluate_sae(sae.train(), features).fvu == pytest.approx(dense.fvu.item(), rel=1e-5)
    assert sae.training


def test_the_best_of_an_earlier_run_is_not_taken(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """A folder whose checkpoint was deleted to train anew."""
    args = make_args(tmp_path, eval_steps=10, keep_best=True)
    SAETrainer(make_sae(), superposition(300), args).train(progress=False)
    (tmp_path / "checkpoint.safetensors").unlink()
    trainer = SAETrainer(make_sae(k=5), superposition(300), args)
    trainer.begin()
    assert not (tmp_path / BEST).exists()


def test_history_is_json(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    result = SAETrainer(make_sae(), superposition(200), make_args(tmp_path, eval_steps=10)).train(progress=False)
    assert json.loads((tmp_path / "training_history.json").read_text()) == result.history


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=f"report_to='{tracker}' needs {tracker}, .*: pip install {tracker}"):
        MetricsLogger(tracker, tmp_path, {})


@pytest.mark.parametrize("b_dec_init", ["mean", "geometric_median", "zero"])
@pytest.mark.parametrize("input_norm", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_features_that_know_their_timestep(activation: str, input_norm: str, b_dec_init: str, tmp_path: Path) -> None:
    """Those of a store do; an SAE of one timestep is the same with and without."""
    rows = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0))
    found = []
    for name, timesteps in (("with", (25,)), ("without", ())):
        features = FeatureSet([rows], timesteps=timesteps)
        args = SAETrainingArguments(output_dir=str(tmp_path / name), max_steps=3, batch_size=64, b_dec_init=b_dec_init)
        sae = make_sae(activation=activation, input_norm=input_norm)
        SAETrainer(sae, features, args).train(progress=False)
        found.append(sae.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("frozen", ["W_enc", "W_dec"])
def test_frozen_weights_stay(frozen: str, tmp_path: Path) -> None:
    sae = make_sae()
    getattr(sae, frozen).requires_grad_(False)
    before = getattr(sae, frozen).clone()
    step = TrainingStep(sae, SAETrainingArguments(output_dir=str(tmp_path)))
    for seed in range(5):
        step(torch.randn(64, D_IN, generator=torch.Generator().manual_seed(seed)), 1e-2)
    torch.testing.assert_close(getattr(sae, frozen), before, atol=1e-6, rtol=0)


def test_more_active_latents_than_there_are() -> None:
    with pytest.raises(ValueError, match="k must be at most the number of latents, 64, got 70"):
        make_sae()(torch.randn(3, D_IN), k=70)
