"""What every variant of the SAE keeps: one contract over activation × input norm × timesteps × nested dictionaries."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae._row_norms import INPUT_NORMS, row_norm
from diffusion_sae.sae.code import SparseCode
from diffusion_sae.sae.configuration import ACTIVATIONS, ENCODER_INITS

D_IN, NUM_LATENTS, K, ROWS = 12, 40, 3, 21
LISTED = {
    "activation": ("topk", "relu_topk", "signed_topk", "batchtopk", "jumprelu", "relu"),
    "input_norm": ("none", "layer_norm", "sample_layer_norm", "constant_norm"),
    "timesteps": (None, [25, 100, 200]),
    "matryoshka_sizes": (None, [5, 16, NUM_LATENTS]),
}
OTHER_FIELDS = {"d_in", "num_latents", "expansion_factor", "k", "jumprelu_bandwidth", "encoder_init", "init_seed"}
OTHER_FIELDS |= {"converted_from"}
OF_OTHER_LIBRARIES = ("sample_layer_norm", "constant_norm")  # what differs from layer_norm is `_row_norms` alone
VARIANTS = [
    dict(zip(LISTED, values, strict=True))
    for values in itertools.product(*LISTED.values())
    if not (values[-1] and values[0] in ("jumprelu", "relu"))
    and not (values[1] in OF_OTHER_LIBRARIES and (values[-1] or values[0] not in ("topk", "jumprelu")))
]


def name_of(variant: dict[str, Any]) -> str:
    parts = [variant["activation"], variant["input_norm"]]
    return "-".join([*parts, *(name for name in ("timesteps", "matryoshka_sizes") if variant[name])])


def unlisted(known: Iterable[str], field: str) -> set[str]:
    """What the library knows and the contract does not hold for."""
    return set(known) ^ set(LISTED[field])


def randomise(sae: KSparseAutoencoder) -> KSparseAutoencoder:
    """Values in all that training would have changed, the decoder rows of unit norm."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_({"threshold": 0.4, "log_threshold": -0.5}.get(name, 0.0) + 0.1 * drawn.abs() + value)
    sae.normalize_decoder_()
    return sae


@pytest.fixture(params=VARIANTS, ids=name_of)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture
def config(variant: dict[str, Any]) -> KSparseAutoencoderConfig:
    return KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, jumprelu_bandwidth=0.2, **variant)


@pytest.fixture
def sae(config: KSparseAutoencoderConfig) -> KSparseAutoencoder:
    return randomise(KSparseAutoencoder(config)).eval()


@pytest.fixture
def given(variant: dict[str, Any]) -> dict[str, Tensor]:
    """What a call needs beside features."""
    return {"timesteps": torch.tensor([25, 100, 200]).repeat(7)} if variant["timesteps"] else {}


@pytest.fixture
def features(superposition: Callable[..., Tensor]) -> Tensor:
    return superposition(ROWS, d_in=D_IN)


def rows_of(given: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in given.items()}


def same(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_the_contract_holds_for_all_there_is() -> None:
    assert not unlisted(ACTIVATIONS, "activation")
    assert not unlisted(INPUT_NORMS, "input_norm")
    inherited = {field.name for field in dataclasses.fields(KSparseAutoencoderConfig.__mro__[1])}
    fields = {field.name for field in dataclasses.fields(KSparseAutoencoderConfig)} - inherited
    assert fields == set(LISTED) | OTHER_FIELDS


def test_an_activation_that_is_not_listed_is_found() -> None:
    assert unlisted((*ACTIVATIONS, "another"), "activation") == {"another"}
    assert unlisted(ACTIVATIONS[1:], "activation") == {ACTIVATIONS[0]}


class TestContract:
    def test_shapes_and_types(
        self, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor], variant: dict[str, Any]
    ) -> None:
        code = sae.encode(features, **given)
        assert isinstance(code, SparseCode)
        width = code.top_acts.shape[1]
        assert code.top_acts.shape == code.top_indices.shape == (ROWS, width)
        assert width == K or variant["activation"] in ("batchtopk", "jumprelu", "relu")
        assert (code.top_acts.dtype, code.top_indices.dtype) == (torch.float32, torch.int64)
        assert 0 <= int(code.top_indices.min()) <= int(code.top_indices.max()) < NUM_LATENTS
        assert (code.top_acts.diff(dim=1) <= 0).all(), "largest first"
        assert (code.top_acts >= 0).all() or variant["activation"] == "signed_topk"
        assert (code.top_acts > 0).any()
        for training in (True, False):
            output = sae.train(training)(features, **given)
            assert output.reconstruction.shape == (ROWS, D_IN)
            assert output.top_acts.shape == output.top_indices.shape
            assert len(output.top_acts) == ROWS
            for name in ("loss", "fvu", "auxk_loss", "sparsity_loss"):
                assert output[name].shape == (), name
                assert torch.isfinite(output[name]), name
            assert {output[name].dtype for name in ("loss", "reconstruction", "top_acts")} == {torch.float32}

    def test_on_the_meta_device(self, config: KSparseAutoencoderConfig, sae: KSparseAutoencoder) -> None:
        with torch.device("meta"):
            empty = KSparseAutoencoder(config)
        shapes = {name: (value.shape, value.dtype, value.stride()) for name, value in sae.state_dict().items()}
        got = {name: (value.shape, value.dtype, value.stride()) for name, value in empty.state_dict().items()}
        assert got == shapes
        assert all(value.is_meta for value in empty.state_dict().values())

    def test_deterministic(
        self, config: KSparseAutoencoderConfig, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor]
    ) -> None:
        same(randomise(KSparseAutoencoder(config)).state_dict(), sae.state_dict())
        for training in (True, False):
            sae.train(training)
            same(sae(features, **given), sae(features, **given))
        assert all(map(torch.equal, sae.encode(features, **given), sae.encode(features, **given)))

    def test_saved_and_loaded(
        self, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor], tmp_path: Path
    ) -> None:
        sae.save_pretrained(tmp_path)
        loaded = KSparseAutoencoder.from_pretrained(tmp_path)
        assert not loaded.training
        same(loaded.state_dict(), sae.state_dict())
        assert {name: value.stride() for name, value in loaded.state_dict().items()} == {
            name: value.stride() for name, value in sae.state_dict().items()
        }
        assert loaded.W_enc.stride() == (1, D_IN), "latent by latent"
        for training in (True, False):
            same(loaded.train(training)(features, **given), sae.train(training)(features, **given))
        assert all(map(torch.equal, loaded.encode(features, **given), sae.encode(features, **given)))

    def test_a_row_does_not_depend_on_the_others(
        self, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor]
    ) -> None:
        whole = sae.encode(features, **given).to_dense(NUM_LATENTS)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
        for rows in (slice(3, 4), slice(5), order):
            part = sae.encode(features[rows], **rows_of(given, rows)).to_dense(NUM_LATENTS)
            torch.testing.assert_close(part, whole[rows])
        longer = torch.cat([features, 50 * features])
        twice = {name: value.repeat(2) for name, value in given.items()}
        torch.testing.assert_close(sae.encode(longer, **twice).to_dense(NUM_LATENTS)[:ROWS], whole)

    def test_no_rows(self, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor]) -> None:
        code = sae.encode(features[:0], **rows_of(given, slice(0)))
        assert len(code.top_acts) == len(code.top_indices) == 0

    def test_decode_of_encode_is_the_reconstruction(
        self, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor], variant: dict[str, Any]
    ) -> None:
        code, output = sae.encode(features, **given), sae(features, **given)
        if variant["input_norm"] != "none":
            with pytest.raises(ValueError, match=r"input_norm='\w+' a code does not say how long its row was"):
                sae.decode(code, **given)
            return
        torch.testing.assert_close(sae.decode(code, **given), output.reconstruction)
        acts = SparseCode(output.top_acts, output.top_indices).to_dense(NUM_LATENTS)
        torch.testing.assert_close(code.to_dense(NUM_LATENTS), acts)

    def test_latents_are_what_the_dense_pre_activations_say(
        self, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor], variant: dict[str, Any]
    ) -> None:
        pre_acts = sae.pre_acts(features, **given)
        if variant["activation"] in ("topk", "relu_topk", "signed_topk"):
            kept = pre_acts >= pre_acts.topk(K, dim=1).values[:, -1:]
        else:
            kept = pre_acts > sae.activation_threshold()
        expected = torch.where(kept, pre_acts if variant["activation"] == "signed_topk" else pre_acts.relu(), 0.0)
        torch.testing.assert_close(sae.encode(features, **given).to_dense(NUM_LATENTS), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(
        self, dtype: torch.dtype, sae: KSparseAutoencoder, features: Tensor, given: dict[str, Tensor]
    ) -> None:
        expected = sae(features, **given)
        sae = sae.to(dtype)
        assert sae.W_enc.stride() == (1, D_IN)
        code, output = sae.encode(features, **given), sae(features, **given)
        assert {code.top_acts.dtype, output.reconstruction.dtype, output.loss.dtype} == {dtype}
        error = (output.reconstruction.float() - expected.reconstruction).norm(dim=1) / features.norm(dim=1)
        assert error.median() < 0.03  # not of all rows: latents near the rank or the threshold may change sides
        sae.train()(features, **given).loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in sae.parameters() if parameter.grad is not None)

    @pytest.mark.parametrize("call", ["encode", "forward", "pre_acts"])
    def test_timesteps_that_do_not_fit(
        self, call: str, sae: KSparseAutoencoder, features: Tensor, variant: dict[str, Any]
    ) -> None:
        method = getattr(sae, call)
        if variant["timesteps"] is None:
            with pytest.raises(ValueError, match=r"timesteps were given, but this SAE has none: leave them out"):
                method(features, timesteps=25)
            return
        with pytest.raises(ValueError, match=r"for several timesteps: give timesteps=, each one of \[25, 100, 200\]"):
            method(features)
        with pytest.raises(ValueError, match=r"timesteps must be among \[25, 100, 200\], got \[26\]"):
            method(features, timesteps=26)
        for unknown in (0, 101, 999):
            given = torch.full((ROWS,), 25)
            given[4] = unknown
            with pytest.raises(ValueError, match=rf"timesteps must be among \[25, 100, 200\], got \[{unknown}\]"):
                method(features, timesteps=given)


class TestTimesteps:
    @pytest.fixture
    def sae(self) -> KSparseAutoencoder:
        config = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, timesteps=[25, 100, 200])
        return randomise(KSparseAutoencoder(config))

    def test_one_for_all_rows(self, sae: KSparseAutoencoder, features: Tensor) -> None:
        of_each = torch.full((ROWS,), 100)
        same(sae(features, timesteps=100), sae(features, timesteps=of_each))
        assert torch.equal(
            sae.decode(sae.encode(features, timesteps=100), timesteps=100),
            sae.decode(sae.encode(features, timesteps=of_each), timesteps=of_each),
        )

    def test_each_is_an_sae_of_scaled_rows_with_a_bias_of_its_own(
        self, sae: KSparseAutoencoder, features: Tensor
    ) -> None:
        """x̂ = s · x̂'(x / s), where x̂' has the timestep's b_dec."""
        single = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K))
        for place, timestep in enumerate(sae.config.timesteps):
            single.load_state_dict(
                {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec")} | {"b_dec": sae.b_dec[place]}
            )
            scale = sae.timestep_scale[place]
            assert scale != 1
            expected = scale * single(features / scale).reconstruction
            torch.testing.assert_close(sae(features, timesteps=timestep).reconstruction, expected)

    def test_timesteps_of_a_code_must_be_known(self, sae: KSparseAutoencoder, features: Tensor) -> None:
        code = sae.encode(features, timesteps=25)
        with pytest.raises(ValueError, match="give timesteps="):
            sae.decode(code)
        with pytest.raises(ValueError, match=r"must be among \[25, 100, 200\], got \[30\]"):
            sae.decode(code, timesteps=30)


class TestInputNorms:
    @pytest.mark.parametrize("input_norm", ["layer_norm", "sample_layer_norm", "constant_norm"])
    def test_shifts_and_scales_of_a_row_are_given_back(
        self, input_norm: str, superposition: Callable[..., Tensor]
    ) -> None:
        """x̂(a x + c) = a x̂(x) + c for a > 0; without a mean that is taken off, c = 0."""
        config = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, input_norm=input_norm)
        sae, features = randomise(KSparseAutoencoder(config)), superposition(ROWS, d_in=D_IN)
        shift = 0 if input_norm == "constant_norm" else -5
        plain, changed = sae(features), sae(3 * features + shift)
        torch.testing.assert_close(changed.reconstruction, 3 * plain.reconstruction + shift, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(changed.fvu, plain.fvu, rtol=1e-3, atol=1e-3)
        assert torch.equal(changed.top_indices.sort(1).values, plain.top_indices.sort(1).values)

    def test_moments_by_hand(self) -> None:
        rows = torch.tensor([[1.0, 3.0, 5.0]])
        assert row_norm(rows, "none") == (None, None, None)
        shift, divisor, scale = row_norm(rows, "layer_norm")
        assert (shift, divisor) == (3, scale)
        torch.testing.assert_close(scale, torch.tensor([[(8 / 3) ** 0.5 + 1e-5]]))
        shift, divisor, scale = row_norm(rows, "sample_layer_norm")
        torch.testing.assert_close((shift, divisor, scale), tuple(torch.tensor([[v]]) for v in (3.0, 2 + 1e-5, 2.0)))
        shift, divisor, scale = row_norm(torch.tensor([[0.0, 3.0, 4.0, 0.0]]), "constant_norm")
        assert (shift, divisor, scale) == (None, 2.5, 2.5)

    def test_a_row_of_zeros_has_no_length(self) -> None:
        config = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, input_norm="constant_norm")
        assert (KSparseAutoencoder(config)(torch.zeros(1, D_IN)).reconstruction == 0).all()

    def test_one_feature_has_no_sample_deviation(self) -> None:
        with pytest.raises(ValueError, match=r"divides by d_in − 1: it needs d_in > 1, got d_in = 1"):
            KSparseAutoencoderConfig(d_in=1, num_latents=4, k=1, input_norm="sample_layer_norm")


class TestMatryoshka:
    def test_the_loss_is_the_mean_over_prefixes_of_the_dictionary(self, superposition: Callable[..., Tensor]) -> None:
        sizes = [5, 16, NUM_LATENTS]
        config = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, matryoshka_sizes=sizes)
        sae, features = randomise(KSparseAutoencoder(config)), superposition(ROWS, d_in=D_IN)
        dense = sae.encode(features).to_dense(NUM_LATENTS)
        losses = []
        for size in sizes:
            reconstruction = dense[:, :size] @ sae.W_dec[:size] + sae.b_dec
            losses.append(((reconstruction - features).square().sum(1) / features.square().sum(1)).mean())
        torch.testing.assert_close(sae(features).loss, torch.stack(losses).mean())


@pytest.mark.parametrize("encoder_init", ENCODER_INITS)
def test_initial_layout(encoder_init: str) -> None:
    config = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, encoder_init=encoder_init)
    sae = KSparseAutoencoder(config)
    assert (sae.W_enc.stride(), sae.W_dec.stride()) == ((1, D_IN), (D_IN, 1))
