"""evaluate_sae against numbers computed the slow way."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.features import FeatureSet
from diffusion_sae.provenance import Provenance, ProvenanceMismatchError
from diffusion_sae.sae import evaluation
from diffusion_sae.sae.evaluation import evaluate_sae


@pytest.fixture
def sae(superposition: Callable[..., Tensor]) -> KSparseAutoencoder:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=16, num_latents=64, k=4))
    with torch.no_grad():
        sae.b_dec.copy_(superposition(500).mean(0))
        sae.b_enc.copy_(torch.linspace(-4, -0.5, 64))  # some latents never active, some rows with fewer than k
    return sae


def test_equals_the_naive_numbers(sae: KSparseAutoencoder, superposition: Callable[..., Tensor]) -> None:
    features = superposition(101)
    metrics = evaluate_sae(sae, features, batch_size=10)
    code = sae.encode(features)
    reconstruction = sae.decode(code).detach()
    r2 = r2_score(features.numpy(), reconstruction.numpy(), multioutput="variance_weighted")
    assert metrics.fvu == pytest.approx(1 - r2, rel=1e-5)
    active = code.to_dense(64) > 0
    assert metrics.l0 == pytest.approx(active.sum(1).double().mean().item())
    assert 0 < metrics.l0 < 4
    assert metrics.dead_latents == pytest.approx((~active.any(0)).double().mean().item())
    assert 0 < metrics.dead_latents < 1
    assert metrics.rows == 101


def test_does_not_depend_on_the_batch_size(sae: KSparseAutoencoder, superposition: Callable[..., Tensor]) -> None:
    features = superposition(64)
    whole = evaluate_sae(sae, features)
    for batch_size in (1, 7, 64):
        parts = evaluate_sae(sae, features, batch_size=batch_size)
        assert parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
        assert (parts.l0, parts.dead_latents, parts.rows) == (whole.l0, whole.dead_latents, whole.rows)


def test_is_exact_where_a_single_precision_sum_is_not(sae: KSparseAutoencoder) -> None:
    """A mean of 1,000 times the spread: sums of squares around it cancel, unless they are centred in fp64."""
    features = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)) + 1000
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)  # nothing is active, so that the reconstruction is b_dec
        sae.b_dec.copy_(features.double().mean(0))
    assert evaluate_sae(sae, features).fvu == pytest.approx(1.0, abs=1e-5)


def test_a_model_in_half_precision_is_measured_on_features_in_fp32(
    sae: KSparseAutoencoder, superposition: Callable[..., Tensor]
) -> None:
    features = superposition(200)
    full = evaluate_sae(sae, features)
    half = evaluate_sae(sae.to(torch.bfloat16), features)
    assert half.fvu == pytest.approx(full.fvu, rel=0.05)


def test_rows_that_are_all_equal_have_no_variance_to_explain(sae: KSparseAutoencoder) -> None:
    for features in (torch.ones(1, 16), torch.full((9, 16), 0.1)):
        with pytest.raises(ValueError, match="All rows are equal"):
            evaluate_sae(sae, features)


def test_features_of_another_width_or_shape_are_refused(sae: KSparseAutoencoder) -> None:
    with pytest.raises(ValueError, match=r"width d_in = 16, got rows of shape \(15,\)"):
        evaluate_sae(sae, torch.zeros(4, 15))
    with pytest.raises(ValueError, match=r"width d_in = 16, got rows of shape \(16, 2, 2\)"):
        evaluate_sae(sae, torch.zeros(4, 16, 2, 2))


def test_features_of_another_extraction_are_refused(
    sae: KSparseAutoencoder, superposition: Callable[..., Tensor], provenance: Provenance
) -> None:
    sae.provenance = provenance
    other = FeatureSet([superposition(20)], provenance=dataclasses.replace(provenance, timesteps=(100,)))
    with pytest.raises(ProvenanceMismatchError, match="differ in timesteps"):
        evaluate_sae(sae, other)
    same = FeatureSet([superposition(20)], provenance=dataclasses.replace(provenance, versions={"torch": "9"}))
    assert evaluate_sae(sae, same).rows == 20


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "batchtopk", "relu"])
def test_long_codes_are_made_of_fewer_rows_at_a_time(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same metrics, codes and residuals."""
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=8, num_latents=64, k=4, activation=activation)).eval()
    whole = evaluation.evaluate_sae(sae, rows)
    longest = sae.encode(rows[: evaluation.LOOKED_AT]).top_acts.shape[1]
    assert evaluation.rows_at_a_time(sae, rows, 1000) == 1000
    monkeypatch.setattr(evaluation, "CODE_BYTES", 50 * longest * evaluation.BYTES_OF_ACTIVE)
    assert evaluation.rows_at_a_time(sae, rows, 1000) == (1000 if activation == "topk" else 50)
    in_parts = evaluation.evaluate_sae(sae, rows)
    assert in_parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert (in_parts.l0, in_parts.dead_latents) == (whole.l0, whole.dead_latents)
