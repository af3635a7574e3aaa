"""The choice by way of bf16 against fp64, where it is hard: near ties, halves of a unit, outliers, NaN."""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from diffusion_sae import (
    KSparseAutoencoder,
    KSparseAutoencoderConfig,
    SAETrainer,
    SAETrainingArguments,
    encode_features,
)
from diffusion_sae.sae import encoder, screening
from diffusion_sae.sae.encoder import encode_above, encode_top_k
from diffusion_sae.sae.screening import counted, screens, without_screening

ROWS, WIDTH, LATENTS, K = 700, 128, 4096, 16


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor: where it has no bf16, PyTorch emulates it. Several blocks."""
    monkeypatch.setattr(screening, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(screening, "SCORE_BYTES", 2**20)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def usual() -> tuple[Tensor, Tensor, Tensor]:
    return draw(ROWS, WIDTH), F.normalize(draw(LATENTS, WIDTH, seed=1), dim=1), 0.1 * draw(LATENTS, seed=2)


def correlated() -> tuple[Tensor, Tensor, Tensor]:
    """All scores near each other: a large common part."""
    features, W_enc, b_enc = usual()
    return features + 30, W_enc + 0.3, b_enc


def equal() -> tuple[Tensor, Tensor, Tensor]:
    """Nearer to each other than bf16 can tell: the features are nearly constant, and so is the sum of each latent."""
    features, W_enc, b_enc = usual()
    return 30 + 1e-3 * features, W_enc - W_enc.mean(1, keepdim=True) + 0.3, b_enc * 0


def halfway() -> tuple[Tensor, Tensor, Tensor]:
    """Every entry halfway between two numbers of bf16, on one side in the features and on both in W_enc."""
    features, W_enc, b_enc = usual()
    off = 1 + 2.0**-8
    return (
        features.bfloat16().float() * off,
        W_enc.bfloat16().float() * torch.where(draw(LATENTS, 1) > 0, off, 1),
        b_enc,
    )


def outliers() -> tuple[Tensor, Tensor, Tensor]:
    features, W_enc, b_enc = usual()
    features[:, 3] += 500
    features[::5] *= 1e4
    W_enc[::7] *= torch.linspace(0.01, 30, len(W_enc[::7]))[:, None]
    return features, W_enc, b_enc


def tiny() -> tuple[Tensor, Tensor, Tensor]:
    """Products that are flushed to zero in bf16."""
    features, W_enc, b_enc = usual()
    return features * 1e-20, W_enc * 1e-19, b_enc * 0


def negative() -> tuple[Tensor, Tensor, Tensor]:
    features, W_enc, b_enc = usual()
    return features, W_enc, b_enc - 50


CASES = {case.__name__: case for case in (usual, correlated, equal, halfway, outliers, tiny, negative)}


def exactly(features: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """The scores in fp64, and how far a sum in fp32 may be from them, of each row."""
    scores = torch.addmm(b_enc.double(), features.double(), W_enc.double().T)
    off = WIDTH * 2.0**-24 * features.double().norm(dim=1) * W_enc.double().norm(
        dim=1
    ).amax() + 1e-6 * scores.abs().amax(1)
    return scores, off


@pytest.mark.parametrize("case", CASES)
def test_top_k_equals_that_of_fp64(case: str) -> None:
    features, W_enc, b_enc = CASES[case]()
    values, indices = encode_top_k(features, W_enc, b_enc, K)
    scores, off = exactly(features, W_enc, b_enc)
    expected = scores.topk(K, dim=1)
    assert all(len(set(row)) == K for row in indices.tolist())
    assert bool(((values.double() - scores.gather(1, indices)).abs() <= off[:, None]).all())
    # of scores nearer to each other than fp32 can tell either is right
    assert bool((scores.gather(1, indices).amin(1) >= expected.values[:, -1] - 2 * off).all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of_each", [False, True])
def test_above_equals_fp64(case: str, of_each: bool) -> None:
    features, W_enc, b_enc = CASES[case]()
    scores, off = exactly(features, W_enc, b_enc)
    floor = scores.topk(K, dim=1).values[:, -1].median().float()
    if of_each:
        floor = floor * (1 + 0.1 * torch.linspace(-1, 1, LATENTS))
    values, indices = encode_above(features, W_enc, b_enc, floor)
    found = torch.zeros_like(scores, dtype=torch.bool)
    found[torch.arange(ROWS)[:, None].expand_as(indices)[values > -math.inf], indices[values > -math.inf]] = True
    sure = (scores - floor.clamp_min(0)).abs() > off[:, None]
    assert torch.equal(found & sure, (scores > floor.clamp_min(0)) & sure)
    assert bool(((values.double() - scores.gather(1, indices)).abs() <= off[:, None])[values > -math.inf].all())


def test_usual_features_are_screened_and_others_redone() -> None:
    with counted() as count:
        encode_top_k(*usual(), K)
    assert (count.rows, count.redone) == (ROWS, 0)
    assert count.describe() == "700 rows screened in bf16, 0.00% of them redone in fp32"
    with counted() as count:
        encode_top_k(*equal(), K)
        encode_above(*usual(), torch.zeros(()))  # half of the latents
    assert (count.rows, count.redone) == (2 * ROWS, 2 * ROWS)


def test_a_row_that_bf16_cannot_tell_is_redone_alone() -> None:
    features, W_enc, b_enc = usual()
    features[300], features[500, 7], features[600, 1] = 0, math.nan, math.inf
    b_enc, floor = b_enc * 0, torch.tensor(3.0)  # so that all scores of row 300 are equal, and none is above
    with counted() as of_top_k:
        values, indices = encode_top_k(features, W_enc, b_enc, K)
    with counted() as of_above:
        above, above_indices = encode_above(features, W_enc, b_enc, floor)
    assert (of_top_k.redone, of_above.redone) == (3, 2)
    with without_screening():
        expected, expected_indices = encode_top_k(features, W_enc, b_enc, K)
        expected_above, expected_above_indices = encode_above(features, W_enc, b_enc, floor)
    torch.testing.assert_close(values.sort(1).values, expected.sort(1).values, equal_nan=True)
    clear = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, torch.tensor([300, 500, 600]), False)
    assert torch.equal(indices.sort(1).values[clear], expected_indices.sort(1).values[clear])
    torch.testing.assert_close(above, expected_above, equal_nan=True)
    assert torch.equal(above_indices, expected_above_indices)


def test_not_finite_weights_leave_all_to_fp32() -> None:
    features, W_enc, b_enc = usual()
    b_enc[5] = -math.inf  # a latent that is never active
    with counted() as count:
        _, indices = encode_top_k(features, W_enc, b_enc, K)
    assert count.redone == count.rows == ROWS
    assert 5 not in indices


def test_when_it_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    features = draw(ROWS, WIDTH)
    assert screens(features, LATENTS)
    assert not screens(features, 1000)
    assert not screens(features[:100], LATENTS)
    assert not screens(features[:, :64], LATENTS)
    assert not screens(features.bfloat16(), LATENTS)
    assert not screens(features.double(), LATENTS)
    assert not screens(features.to("meta"), LATENTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert not screens(features, LATENTS)
    with without_screening():
        assert not screens(features, LATENTS)
    with counted() as count:
        encode_top_k(*usual(), LATENTS // encoder.FEWEST_PER_ACTIVE + 1)
    assert count.rows == 0
    monkeypatch.setattr(screening, "cpu_has_bf16", lambda: False)
    assert not screens(features, LATENTS)


def test_gradients_are_those_of_fp32() -> None:
    features, _, _ = usual()
    gradients = {}
    for name, context in (("screened", counted), ("fp32", without_screening)):
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=WIDTH, num_latents=LATENTS, k=K, init_seed=3))
        with context():
            sae(features).loss.backward()
        gradients[name] = [parameter.grad for parameter in sae.parameters()]
    for screened, of_fp32 in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(screened, of_fp32, rtol=1e-4, atol=1e-7)


def test_a_training_says_how_much_was_redone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=WIDTH, num_latents=LATENTS, k=K))
    args = SAETrainingArguments(output_dir=str(tmp_path), max_steps=2, batch_size=512, eval_fraction=0)
    with caplog.at_level(logging.INFO, "diffusion_sae"):
        SAETrainer(sae, usual()[0], args).train(progress=False)
    assert "1,024 rows screened in bf16, " in caplog.text


def test_an_encoding_says_how_much_was_redone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=WIDTH, num_latents=LATENTS, k=K))
    with caplog.at_level(logging.INFO, "diffusion_sae"):
        codes = encode_features(sae, usual()[0], tmp_path / "codes", progress=False)
    assert "700 rows screened in bf16, 0.00% of them redone in fp32" in caplog.text
    with without_screening():
        expected = sae.encode(usual()[0])
    torch.testing.assert_close(codes[:].to_dense(LATENTS), expected.to_dense(LATENTS))
