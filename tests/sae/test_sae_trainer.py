"""SAETrainer: that it learns, how it steps, what it holds out, and what it refuses."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import get_scheduler

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainer, SAETrainingArguments
from diffusion_sae._training import CHECKPOINT, TrainingDivergedError
from diffusion_sae.features import FeatureSet, ShuffledBatches
from diffusion_sae.provenance import Provenance, ProvenanceMismatchError
from diffusion_sae.sae.checkpoints import BEST
from diffusion_sae.sae.evaluation import evaluate_sae
from diffusion_sae.sae.results import SAETrainingResult

D_IN, NUM_LATENTS, K = 16, 64, 4


def make_sae(**config: Any) -> KSparseAutoencoder:
    return KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, **config))


def make_args(output_dir: Path, **changes: Any) -> SAETrainingArguments:
    settings = {"learning_rate": 3e-3, "warmup_steps": 10, "batch_size": 64, "max_steps": 12, "dead_after_rows": 10_000}
    return SAETrainingArguments(output_dir=str(output_dir), **(settings | changes))


def train(
    sae: KSparseAutoencoder, features: FeatureSet | Tensor, output_dir: Path, **changes: Any
) -> SAETrainingResult:
    return SAETrainer(sae, features, make_args(output_dir, **changes)).train(progress=False)


WATCHED = {
    "optimizer": "adamw"
}  # Adam's update is fused with the gradients' sums: no optimiser steps that can be watched


@contextmanager
def watch_optimizer(before_step: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: before_step(optimizer))
    try:
        yield
    finally:
        handle.remove()


def test_learns_superposed_features(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """40 directions in 16 dimensions, 3 of them active: no 4 fixed directions explain that, 4 chosen ones do."""
    test_rows = superposition(1000, seed=1)
    sae = make_sae()
    at_start = evaluate_sae(sae, test_rows)
    result = train(sae, superposition(4000), tmp_path, batch_size=256, max_steps=300)
    trained = evaluate_sae(sae, test_rows)
    pca = PCA(K).fit(superposition(4000).numpy())
    fvu_of_pca = 1 - pca.explained_variance_ratio_.sum()
    assert at_start.fvu > 1
    assert trained.fvu < 0.25 < 0.5 * fvu_of_pca  # 0.21 when this was written
    assert trained.dead_latents < 0.1
    assert result.metrics.fvu == pytest.approx(trained.fvu, abs=0.03), "held-out rows are like new ones"
    assert result.metrics.rows == 200
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_what_revives_latents_that_plain_training_leaves_dead(
    superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    def dead_after_training(**means: float) -> float:
        sae = make_sae()
        with torch.no_grad():
            sae.W_enc[:, : NUM_LATENTS // 2] *= 0.01  # never among the k largest
        settings = {"batch_size": 256, "max_steps": 200, "dead_after_rows": 1000, "dead_latent_boost": 0.0}
        train(sae, superposition(4000), tmp_path / str(means), **(settings | means))
        return evaluate_sae(sae, superposition(2000, seed=1)).dead_latents

    assert dead_after_training() > 0.4
    assert dead_after_training(auxk=8) < 0.1
    assert dead_after_training(dead_latent_boost=1.0) < 0.1


def test_decoder_rows_have_unit_norm_and_no_parallel_gradient_at_every_step(
    superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    norms, parallel = [], []

    def look(optimizer: torch.optim.Optimizer) -> None:
        norms.append(sae.W_dec.detach().norm(dim=1))
        parallel.append((sae.W_dec.grad * sae.W_dec.detach()).sum(1).abs().max() / sae.W_dec.grad.abs().max())

    sae = make_sae()
    with torch.no_grad():
        sae.W_dec *= 3  # someone's own initialisation
    with watch_optimizer(look):
        train(sae, superposition(500), tmp_path, **WATCHED)
    assert len(norms) == 12
    torch.testing.assert_close(torch.stack([*norms, sae.W_dec.detach().norm(dim=1)]), torch.ones(13, NUM_LATENTS))
    assert max(parallel) < 1e-5


def test_gradients_are_clipped(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    norms: dict[float | None, list[float]] = {}
    for limit in (1e-3, None):
        seen = norms[limit] = []

        def look(optimizer: torch.optim.Optimizer, seen: list[float] = seen) -> None:
            gradients = [p.grad.flatten() for p in optimizer.param_groups[0]["params"]]
            seen.append(torch.cat(gradients).norm().item())

        with watch_optimizer(look):
            train(make_sae(), superposition(500), tmp_path / str(limit), max_grad_norm=limit, **WATCHED)
    assert max(norms[1e-3]) <= 1.001e-3
    assert min(norms[None]) > 1e-2


def test_b_dec_begins_as_the_mean_of_the_features(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    features, seen = superposition(500), []
    sae = make_sae()
    with watch_optimizer(lambda _: seen.append(sae.b_dec.detach().clone())):
        train(sae, features, tmp_path, max_steps=1, eval_fraction=0, **WATCHED)
    torch.testing.assert_close(seen[0], features.double().mean(0).float())


def test_dead_latents_are_boosted_until_they_are_active(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """The last latent is never active; the others are at every step, so that their biases follow Adam alone."""
    features, boost, biases = superposition(500), 2.0, {}
    for name, rate in (("without", 0.0), ("with", boost)):
        sae = make_sae()
        with torch.no_grad():
            sae.b_enc[-1] = -10
        settings = {"dead_after_rows": 128, "warmup_steps": 0, "decay_fraction": 0.25}
        train(sae, features, tmp_path / name, dead_latent_boost=rate, **settings)
        biases[name] = sae.b_enc.detach()
    risen = biases["with"] - biases["without"]
    # 64 rows a step: dead after the second of twelve steps, of which the last three have 1, 2/3 and 1/3 of the rate
    assert risen[-1].item() == pytest.approx((9 + 2 / 3 + 1 / 3) * boost * 3e-3, rel=1e-4)
    assert make_args(tmp_path).rows_until_dead(NUM_LATENTS, K) == 10_000
    assert SAETrainingArguments(output_dir="runs").rows_until_dead(81_920, 32) == 256_000


def test_the_default_schedule_falls_at_the_end(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    seen: list[float] = []
    with watch_optimizer(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])):
        train(make_sae(), superposition(500), tmp_path, warmup_steps=2, decay_fraction=0.5, **WATCHED)
    assert seen == pytest.approx([rate * 3e-3 for rate in (0.5, 1, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)])


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers(
    schedule: str, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    steps, warmup, peak, seen = 12, 5, 3e-3, []
    with watch_optimizer(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])):
        train(make_sae(), superposition(500), tmp_path, lr_scheduler_type=schedule, warmup_steps=warmup, **WATCHED)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(schedule, reference, warmup, steps)
    expected = []
    for _ in range(
        steps
    ):  # a first step with the rate 0 would learn nothing: step n has the rate after n scheduler steps
        reference.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert seen == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert seen[:5] == pytest.approx([peak * n / warmup for n in (1, 2, 3, 4, 5)])


def test_the_rate_that_was_used_is_recorded(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    """By default 0.024 / √d_in, here of 16."""
    sae, seen = make_sae(), []
    with watch_optimizer(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])):
        train(sae, superposition(500), tmp_path, learning_rate=None, warmup_steps=0, max_steps=2, **WATCHED)
    assert seen == pytest.approx([6e-3, 6e-3])
    assert sae.metrics["training"]["learning_rate"] == pytest.approx(6e-3)


def test_every_row_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    def rows(steps: range, batch_size: int = 5, seed: int = 0) -> Tensor:
        batches = ShuffledBatches(FeatureSet.from_tensor(torch.zeros(20, 1)), batch_size, seed=seed)
        return torch.cat([batches.rows_of(step) for step in steps])

    first, second = rows(range(4)), rows(range(4, 8))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(20))
    assert not torch.equal(first, second)
    assert torch.equal(first[:5], rows(range(1)))
    assert not torch.equal(first, rows(range(4), seed=1))
    short = rows(range(3), batch_size=6)  # two rows wait for the next order
    assert len(set(short.tolist())) == 18


@pytest.mark.parametrize(("given", "steps"), [({"num_train_epochs": 3.0}, 21), ({"num_train_epochs": 0.01}, 1)])
def test_epochs_are_counted_in_steps(
    given: dict[str, Any], steps: int, superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    result = train(make_sae(), superposition(500), tmp_path, max_steps=None, **given)  # 475 rows: 7 batches of 64
    assert result.steps == steps


def test_the_global_random_state_is_neither_used_nor_changed(
    superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    weights = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            sae = make_sae()
            train(sae, superposition(300), tmp_path / str(seed))
            assert torch.equal(torch.random.get_rng_state(), before)
        weights.append(sae.W_enc.detach())
    assert torch.equal(*weights)


class TestWhatIsHeldOut:
    def test_whole_images_of_token_features(self, tmp_path: Path) -> None:
        """The first column is the image's number, so that the rows say where they are from."""
        images, tokens = 20, 6
        features = torch.randn(images * tokens, D_IN, generator=torch.Generator().manual_seed(0))
        features[:, 0] = torch.arange(images).repeat_interleave(tokens).float()
        feature_set = FeatureSet([features], rows_per_image=tokens)
        trainer = SAETrainer(make_sae(), feature_set, make_args(tmp_path, eval_fraction=0.2))
        held_out = trainer.eval_features[:][:, 0].tolist()
        trained_on = feature_set[trainer.source.rows][:, 0].tolist()
        assert len(set(held_out)) == 4
        assert len(held_out) == 4 * tokens
        assert len(trained_on) == 16 * tokens
        assert not set(held_out) & set(trained_on)

    def test_depends_on_the_seed(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        def held_out(seed: int) -> Tensor:
            return SAETrainer(make_sae(), superposition(100), make_args(tmp_path, seed=seed)).eval_features[:]

        assert torch.equal(held_out(0), held_out(0))
        assert not torch.equal(held_out(0), held_out(1))

    def test_features_given_for_evaluation(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        test_rows = superposition(50, seed=1)
        trainer = SAETrainer(make_sae(), superposition(100), make_args(tmp_path), eval_features=test_rows)
        assert len(trainer.source) == 100
        assert trainer.train(progress=False).metrics == evaluate_sae(trainer.sae, test_rows)
        assert trainer.sae.metrics["held_out"]["rows"] == 50

    def test_nothing_if_asked_so_and_the_metrics_say_it(
        self, superposition: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        sae = make_sae()
        train(sae, superposition(100), tmp_path, eval_fraction=0)
        assert "held_out" not in sae.metrics
        assert sae.metrics["on_training_rows"]["rows"] == 100
        assert "trained on: none were held out" in sae.metrics["note"]

    def test_at_least_two_rows(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        """One row has no variance: its FVU would be a division by zero after the whole training."""
        trainer = SAETrainer(make_sae(), superposition(12), make_args(tmp_path, eval_fraction=0.05))
        assert len(trainer.eval_features) == 2
        assert trainer.train(progress=False).metrics.rows == 2

    @pytest.mark.parametrize(("images", "tokens", "fraction"), [(2, 1, 0.05), (1, 8, 0.05), (3, 1, 0.9)])
    def test_never_everything(self, images: int, tokens: int, fraction: float, tmp_path: Path) -> None:
        features = FeatureSet([torch.randn(images * tokens, D_IN)], rows_per_image=tokens)
        with pytest.raises(ValueError, match=f"{images} images are too few to hold out"):
            SAETrainer(make_sae(), features, make_args(tmp_path, eval_fraction=fraction))

    def test_rows_that_are_all_equal_are_found_before_the_training(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"The 5 rows to evaluate on are all equal.*larger eval_fraction"):
            SAETrainer(make_sae(), torch.ones(100, D_IN), make_args(tmp_path))


class TestWhatIsSaved:
    @pytest.fixture
    def trained(
        self, superposition: Callable[..., Tensor], provenance: Provenance, tmp_path: Path
    ) -> tuple[KSparseAutoencoder, SAETrainingResult, Path]:
        sae = make_sae()
        features = FeatureSet([superposition(300)], provenance=provenance)
        return sae, train(sae, features, tmp_path / "sae", logging_steps=5), tmp_path / "sae"

    def test_the_artifact_with_its_extraction_and_metrics(
        self, trained: tuple[KSparseAutoencoder, SAETrainingResult, Path], provenance: Provenance
    ) -> None:
        sae, result, folder = trained
        loaded = KSparseAutoencoder.from_pretrained(folder)
        assert all(torch.equal(sae.state_dict()[name], value) for name, value in loaded.state_dict().items())
        assert loaded.provenance == provenance
        assert loaded.metrics["held_out"] == dataclasses.asdict(result.metrics)
        assert loaded.metrics["training"]["steps"] == 12
        assert loaded.metrics["training"]["rows"] == 285
        assert loaded.metrics["training"]["learning_rate"] == 3e-3
        assert "15 rows of images that were held out" in loaded.metrics["note"]
        assert str(folder) not in (folder / "metrics.json").read_text(), "where it was trained is no one's business"

    def test_the_card_shows_these_metrics(self, trained: tuple[KSparseAutoencoder, SAETrainingResult, Path]) -> None:
        _, result, folder = trained
        card = (folder / "README.md").read_text()
        assert f"| held_out.fvu | {result.metrics.fvu:.4g} |" in card
        assert f"| held_out.l0 | {result.metrics.l0:.4g} |" in card
        assert "Not yet trained" not in card

    def test_the_history(self, trained: tuple[KSparseAutoencoder, SAETrainingResult, Path]) -> None:
        _, result, folder = trained
        assert json.loads((folder / "training_history.json").read_text()) == result.history
        assert [entry["step"] for entry in result.history] == [1, 5, 10, 12]
        assert all(set(entry) == {"step", "loss", "fvu", "l0", "dead_latents"} for entry in result.history)

    def test_is_in_evaluation_mode(self, trained: tuple[KSparseAutoencoder, SAETrainingResult, Path]) -> None:
        assert not trained[0].training


class TestResuming:
    """Of runs that were killed: test_resume_after_kill.py. Here: of which runs."""

    def test_a_finished_run_is_not_trained_again(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        first, again, steps = make_sae(), make_sae(), []
        result = train(first, superposition(300), tmp_path, **WATCHED)
        with watch_optimizer(lambda _: steps.append(1)):
            assert train(again, superposition(300), tmp_path, **WATCHED).metrics == result.metrics
        assert not steps
        assert torch.equal(first.W_enc, again.W_enc)

    def test_what_changes_no_number_may_change(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        train(make_sae(), superposition(300), tmp_path / "before")
        (tmp_path / "before").rename(tmp_path / "after")
        assert train(make_sae(), superposition(300), tmp_path / "after", logging_steps=3).steps == 12

    @pytest.mark.parametrize(
        "changes",
        [
            {"learning_rate": 1e-3},
            {"max_steps": 20},
            {"seed": 1},
            {"auxk": 1},
            {"eval_fraction": 0.2},
            {"lr_scheduler_type": "cosine"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_other_settings_are_refused(
        self, changes: dict[str, Any], superposition: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        train(make_sae(), superposition(300), tmp_path, max_steps=2)
        with pytest.raises(ValueError, match=r"with other settings or features\. Choose another output_dir"):
            train(make_sae(), superposition(300), tmp_path, **({"max_steps": 2} | changes))

    def test_another_model_is_refused(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        train(make_sae(), superposition(300), tmp_path, max_steps=2)
        with pytest.raises(ValueError, match="with other settings or features"):
            train(make_sae(init_seed=1), superposition(300), tmp_path, max_steps=2)

    def test_other_features_are_refused(
        self, superposition: Callable[..., Tensor], provenance: Provenance, tmp_path: Path
    ) -> None:
        train(make_sae(), superposition(300), tmp_path, max_steps=2)
        more_rows, other_values = superposition(301), superposition(300, seed=1)
        another_extraction = FeatureSet([superposition(300)], provenance=provenance)
        for features in (more_rows, other_values, another_extraction):
            with pytest.raises(ValueError, match="with other settings or features"):
                train(make_sae(), features, tmp_path, max_steps=2)

    def test_what_a_killed_run_left_half_written_is_removed(
        self, superposition: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        names = (f".{CHECKPOINT}.abc.tmp", f".{BEST}.4_7oq4ol.tmp", ".training_history.json.x.tmp", ".tmpZ4QZbd")
        leftovers = [tmp_path / name for name in names]
        for leftover in leftovers:
            leftover.write_bytes(b"half")
        train(make_sae(), superposition(300), tmp_path, max_steps=2)
        assert not any(leftover.exists() for leftover in leftovers)

    def test_not_with_other_features_for_evaluation(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        args = make_args(tmp_path, max_steps=4)
        some, others = superposition(50, seed=1), superposition(50, seed=2)
        SAETrainer(make_sae(), superposition(100), args, eval_features=some).train(progress=False)
        SAETrainer(make_sae(), superposition(100), args, eval_features=some.clone()).train(progress=False)
        with pytest.raises(ValueError, match="from a run with other settings or features"):
            SAETrainer(make_sae(), superposition(100), args, eval_features=others).train(progress=False)


class TestDivergence:
    def test_keeps_the_last_good_checkpoint(self, superposition: Callable[..., Tensor], tmp_path: Path) -> None:
        """Two rows, met in step 9, are so large that their squares are infinite in fp32; their mean is 0."""
        features = superposition(400)
        args = make_args(tmp_path, max_steps=20, batch_size=32, save_steps=4, logging_steps=1)
        trainer = SAETrainer(make_sae(), features, args, eval_features=superposition(50, seed=1))
        bad = trainer.source.rows_of(8)[:2]
        features[bad] = torch.tensor([[1e25], [-1e25]])
        with pytest.raises(TrainingDivergedError, match=rf"loss became \w+ at step 9.*checkpoint is kept: {tmp_path}"):
            trainer.train(progress=False)
        checkpoint = load_file(tmp_path / CHECKPOINT)
        assert checkpoint["extra.step"] == 8
        assert all(torch.isfinite(value).all() for value in checkpoint.values())
        assert not (tmp_path / "model.safetensors").exists()

    @pytest.mark.parametrize("logging_steps", [1, 1000])
    def test_a_huge_learning_rate(
        self, logging_steps: int, superposition: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        with pytest.raises(TrainingDivergedError, match="Lower learning_rate"):
            train(make_sae(), superposition(300), tmp_path, learning_rate=1e30, logging_steps=logging_steps)
        assert not (tmp_path / "model.safetensors").exists()

    def test_weights_that_the_last_loss_does_not_show(
        self, superposition: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        """The loss of the only step is from before its update."""
        with pytest.raises(TrainingDivergedError, match=r"weights became NaN or infinite at step 1.*no checkpoint yet"):
            train(make_sae(), superposition(300), tmp_path, learning_rate=float("inf"), max_steps=1)
        assert not (tmp_path / CHECKPOINT).exists()


class TestRefusedFeatures:
    def test_of_another_extraction(
        self, superposition: Callable[..., Tensor], provenance: Provenance, tmp_path: Path
    ) -> None:
        other = dataclasses.replace(provenance, layers=("bottleneck",), seed=7)
        features = FeatureSet([superposition(100)], provenance=other)
        sae = make_sae()
        sae.provenance = provenance
        with pytest.raises(ProvenanceMismatchError, match="differ in layers, seed") as caught:
            SAETrainer(sae, features, make_args(tmp_path))
        assert f"fingerprint {provenance.fingerprint}" in str(caught.value)
        assert f"fingerprint {other.fingerprint}" in str(caught.value)
        assert "allow_mismatch=True" in str(caught.value)
        trainer = SAETrainer(sae, features, make_args(tmp_path), allow_mismatch=True)
        trainer.train(progress=False)
        assert KSparseAutoencoder.from_pretrained(tmp_path).provenance == other, "what it was trained on last"

    def test_of_another_extraction_to_evaluate_on(
        self, superposition: Callable[..., Tensor], provenance: Provenance, tmp_path: Path
    ) -> None:
        features = FeatureSet([superposition(100)], provenance=provenance)
        others = FeatureSet([superposition(100)], provenance=dataclasses.replace(provenance, seed=7))
        for recorded in (None, provenance):
            sae = make_sae()
            sae.provenance = recorded
            with pytest.raises(ProvenanceMismatchError, match="differ in seed"):
                SAETrainer(sae, features, make_args(tmp_path), eval_features=others)
            allowed = SAETrainer(sae, features, make_args(tmp_path), eval_features=others, allow_mismatch=True)
            assert len(allowed.eval_features) == 100

    def test_of_another_width(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"width d_in = {D_IN}, got rows of shape \({D_IN + 1},\)"):
            SAETrainer(make_sae(), torch.randn(50, D_IN + 1), make_args(tmp_path))

    def test_whole_activations(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"rows of shape \(16, 2, 2\). Extract with pooling 'mean'"):
            SAETrainer(make_sae(), torch.randn(50, D_IN, 2, 2), make_args(tmp_path))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_with_values_that_are_no_numbers(
        self, value: float, superposition: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        broken = superposition(50)
        broken[[3, 40], 5] = value
        with pytest.raises(ValueError, match=r"training features holds NaN or infinite.*rows \[3, 40\] of 50"):
            SAETrainer(make_sae(), broken, make_args(tmp_path))
        with pytest.raises(ValueError, match=r"evaluation features holds NaN or infinite.*rows \[3, 40\] of 50"):
            SAETrainer(make_sae(), superposition(50), make_args(tmp_path), eval_features=broken)

    def test_without_a_row(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one row, got none"):
            SAETrainer(make_sae(), torch.empty(0, D_IN), make_args(tmp_path))


def test_a_folder_that_cannot_be_written_is_found_before_the_training(
    superposition: Callable[..., Tensor], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    sae, steps = make_sae(), []
    with (
        watch_optimizer(lambda _: steps.append(1)),
        pytest.raises(PermissionError, match=r"Cannot write to the output folder .*file/sae"),
    ):
        train(sae, superposition(100), tmp_path / "file" / "sae", **WATCHED)
    assert not steps
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_tracker_is_refused(superposition: Callable[..., Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report_to must be one of 'none', 'trackio', 'tensorboard', 'wandb'"):
        train(make_sae(), superposition(100), tmp_path, report_to="mlflow")
