"""SAEs of other libraries, in files laid out by hand, against their equations; the released libraries themselves are
compared by `test_conversion_parity.py`.
"""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.cli.main import main
from diffusion_sae.hub.conversion import ForeignOptions
from diffusion_sae.hub.conversion.overcomplete import normalised
from diffusion_sae.hub.conversion.registry import FORMATS, WRITTEN
from diffusion_sae.provenance import Provenance

D_IN, NUM_LATENTS, K, ROWS = 6, 24, 3, 11
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": normal(D_IN, NUM_LATENTS),
        "b_enc": normal(NUM_LATENTS) - 0.5,
        "W_dec": normal(NUM_LATENTS, D_IN),
        "b_dec": normal(D_IN),
        "threshold": 0.5 + normal(NUM_LATENTS).abs(),
        "features": 2 * normal(ROWS, D_IN) + 0.5,
    }


def linear(weights: Tensors, decoder: str = "W_dec") -> Tensors:
    """As torch.nn.Linear keeps them."""
    W_dec = {"W_dec": weights["W_dec"], "decoder.weight": weights["W_dec"].T}[decoder]
    return {
        "encoder.weight": weights["W_enc"].T,
        "encoder.bias": weights["b_enc"],
        decoder: W_dec,
        "b_dec": weights["b_dec"],
    }


def direct(weights: Tensors, *others: str) -> Tensors:
    return {name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", *others)}


def put(folder: Path, config: Any = None, tensors: Any = None, names: str = "cfg.json sae_weights.safetensors") -> Path:
    """A checkpoint; tensors as safetensors or, under another suffix, by torch.save."""
    config_name, weights_name = names.split()
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / config_name).write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    if tensors is not None and weights_name.endswith(".safetensors"):
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / weights_name)
    elif tensors is not None:
        torch.save(tensors, folder / weights_name)
    return folder


SAE_LENS, SPARSIFY = "cfg.json sae_weights.safetensors", "cfg.json sae.safetensors"
LEARNING, UNBOX, STATE = "config.json ae.pt", "config.json state_dict.pth", "no.json weights.pt"
V6 = {"metadata": {"sae_lens_version": "6.0.0"}, "d_in": D_IN, "d_sae": NUM_LATENTS, "apply_b_dec_to_input": True}
COMMON = {"expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K, "multi_topk": False, "d_in": D_IN}
CODER = COMMON | {"activation": "topk", "skip_connection": False, "transcode": False}
SAEURON = COMMON | {"batch_topk": False, "sample_topk": False, "input_unit_norm": True}


def top_k(pre_acts: Tensor, k: int = K) -> Tensor:
    values, indices = pre_acts.topk(k, dim=1)
    return torch.zeros_like(pre_acts).scatter(1, indices, values)


def encoded(weights: Tensors, rows: Tensor) -> Tensor:
    return (rows - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]


def assert_same(sae: KSparseAutoencoder, features: Tensor, latent_acts: Tensor, reconstruction: Tensor) -> None:
    torch.testing.assert_close(sae.encode(features).to_dense(NUM_LATENTS), latent_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(features).reconstruction, reconstruction, rtol=1e-5, atol=1e-5)


class TestEquations:
    """Of the libraries that are no packages."""

    def test_sdxl_unbox(self, tmp_path: Path, weights: Tensors) -> None:
        """ReLU(TopK(E (x − pre_bias) + latent_bias)), as `SparseAutoencoder` of its repository."""
        state = {
            "encoder.weight": weights["W_enc"].T.contiguous(),
            "latent_bias": weights["b_enc"],
            "decoder.weight": weights["W_dec"].T,  # column-major, as there
            "pre_bias": weights["b_dec"],
            "stats_last_nonzero": torch.zeros(NUM_LATENTS, dtype=torch.int64),
        }
        config = {"n_dirs_local": NUM_LATENTS, "d_model": D_IN, "k": K, "auxk": 2, "dead_steps_threshold": 5}
        sae = KSparseAutoencoder.from_foreign(put(tmp_path, config, {"state_dict": state}, UNBOX))
        latent_acts = top_k(encoded(weights, weights["features"])).relu()
        assert_same(sae, weights["features"], latent_acts, latent_acts @ weights["W_dec"] + weights["b_dec"])
        assert (sae.config.activation, sae.config.k) == ("topk", K)

    @pytest.mark.parametrize("unit_norm", [False, True])
    def test_saeuron(self, unit_norm: bool, tmp_path: Path, weights: Tensors) -> None:
        """Its `forward`, with TopK of each row."""
        folder = put(tmp_path, SAEURON | {"input_unit_norm": unit_norm}, linear(weights), SPARSIFY)
        sae = KSparseAutoencoder.from_foreign(folder)
        rows, mean, std = weights["features"], 0, 1
        if unit_norm:
            mean = rows.mean(-1, keepdim=True)
            std = (rows - mean).std(-1, keepdim=True)
            rows = (rows - mean) / (std + 1e-5)
        latent_acts = top_k(encoded(weights, rows).relu())
        reconstruction = (latent_acts @ weights["W_dec"] + weights["b_dec"]) * std + mean
        assert_same(sae, weights["features"], latent_acts, reconstruction)
        assert sae.config.activation == "relu_topk"
        assert sae.config.input_norm == ("sample_layer_norm" if unit_norm else "none")

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_revelio(self, wrapped: bool, tmp_path: Path, weights: Tensors) -> None:
        """TopK(W_encᵀ (x − b_dec) + b_enc) with the signs (arXiv 2411.16725, §3.2)."""
        state = {"state_dict": direct(weights)} if wrapped else direct(weights)
        sae = KSparseAutoencoder.from_foreign(put(tmp_path, None, state, STATE) / "weights.pt", k=15)
        latent_acts = top_k(encoded(weights, weights["features"]), k=15)
        assert (latent_acts < 0).any()
        assert_same(sae, weights["features"], latent_acts, latent_acts @ weights["W_dec"] + weights["b_dec"])

    @pytest.mark.parametrize("activation", ["relu_topk", "batchtopk"])
    def test_saeuron_batch_top_k_by_choice(self, activation: str, tmp_path: Path, weights: Tensors) -> None:
        folder = put(tmp_path, SAEURON | {"batch_topk": True}, linear(weights), SPARSIFY)
        threshold = {"threshold": 0.75} if activation == "batchtopk" else {}
        sae = KSparseAutoencoder.from_foreign(folder, activation=activation, **threshold)
        assert sae.config.activation == activation
        assert sae.state_dict().get("threshold", 0.75) == 0.75

    def test_overcomplete_is_active_at_its_threshold(self, tmp_path: Path) -> None:
        """`codes >= running_threshold` there, `>` here."""
        state = {
            "encoder.final_block.0.weight": torch.eye(2),
            "encoder.final_block.0.bias": torch.zeros(2),
            "dictionary._weights": torch.eye(2),
            "dictionary.multiplier": torch.zeros(()),
        }
        path = put(tmp_path, None, state, STATE) / "weights.pt"
        sae = KSparseAutoencoder.from_foreign(path, activation="batchtopk", k=1, threshold=0.75)
        below = float(torch.nextafter(torch.tensor(0.75), torch.tensor(0.0)))
        latent_acts = sae.encode(torch.tensor([[0.75, below]])).to_dense(2)
        assert latent_acts.tolist() == [[0.75, 0]]

    def test_normalizations_by_hand(self) -> None:
        dictionary = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        by_hand = {"l2": [[0.6, 0.8], [0, 1]], "max_l2": [[0.6, 0.8], [0, 0.2]], "l1": [[3 / 7, 4 / 7], [0, 1]]}
        by_hand |= {"max_l1": [[3 / 7, 4 / 7], [0, 1 / 7]], "identity": dictionary.tolist()}
        for name, expected in by_hand.items():
            torch.testing.assert_close(normalised(dictionary, name), torch.tensor(expected))


class TestFiles:
    def test_what_is_not_changed_is_the_same_bit_for_bit(self, tmp_path: Path, weights: Tensors) -> None:
        sae = KSparseAutoencoder.from_foreign(put(tmp_path, CODER, linear(weights), SPARSIFY))
        assert all(torch.equal(sae.state_dict()[name], weights[name]) for name in direct(weights))
        assert (sae.W_enc.stride(), sae.W_dec.stride()) == ((1, D_IN), (D_IN, 1))
        assert sae.provenance is None
        assert not sae.training

    @pytest.mark.parametrize(
        ("dtype", "kept"),
        [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
        ids=str,
    )
    def test_types(self, dtype: torch.dtype, kept: torch.dtype, tmp_path: Path, weights: Tensors) -> None:
        tensors = {name: value.to(dtype) for name, value in linear(weights).items()}
        sae = KSparseAutoencoder.from_foreign(put(tmp_path, CODER, tensors, SPARSIFY))
        assert sae.dtype == kept
        assert torch.equal(sae.W_dec.to(dtype), tensors["W_dec"])

    def test_a_converted_sae_is_an_artifact(self, tmp_path: Path, weights: Tensors) -> None:
        sae = KSparseAutoencoder.from_foreign(put(tmp_path / "theirs", CODER, linear(weights), SPARSIFY))
        sae.save_pretrained(tmp_path / "ours")
        again = KSparseAutoencoder.from_pretrained(tmp_path / "ours")
        assert again.config.converted_from == sae.config.converted_from
        assert re.fullmatch(r"sparsify: theirs/sae.safetensors \(sha256 [0-9a-f]{16}\)", sae.config.converted_from)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in sae.state_dict().items())
        assert sae.config.converted_from in (tmp_path / "ours" / "README.md").read_text(encoding="utf-8")
        with pytest.raises(ValueError, match="'ours' is an artifact of this library: load it with from_pretrained"):
            KSparseAutoencoder.from_foreign(tmp_path / "ours")

    def test_subfolder_and_filename(self, tmp_path: Path, weights: Tensors) -> None:
        put(tmp_path / "layers.3", CODER, linear(weights), SPARSIFY)
        assert KSparseAutoencoder.from_foreign(tmp_path, subfolder="layers.3").config.k == K
        put(tmp_path / "several", None, direct(weights), "no.json a.pt")
        put(tmp_path / "several", None, direct(weights), "no.json b.pt")
        sae = KSparseAutoencoder.from_foreign(tmp_path / "several", filename="b.pt", k=2)
        assert (sae.config.activation, sae.config.k) == ("signed_topk", 2)

    @pytest.mark.parametrize("format", WRITTEN)
    def test_written_and_read_again(self, format: str, tmp_path: Path, weights: Tensors) -> None:
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K)).eval()
        sae.load_state_dict(direct(weights))
        sae.provenance = Provenance(model="a/b", layers=("up_ft1",), timesteps=(25,), image_size=64, weights="0" * 16)
        sae.save_foreign(tmp_path / "out", format)
        again = KSparseAutoencoder.from_foreign(tmp_path / "out")
        output = sae(weights["features"])
        assert_same(
            again, weights["features"], sae.encode(weights["features"]).to_dense(NUM_LATENTS), output.reconstruction
        )
        assert torch.equal(again.W_enc, sae.W_enc)
        if format == "sae_lens":
            metadata = json.loads((tmp_path / "out" / "cfg.json").read_text(encoding="utf-8"))["metadata"]
            assert metadata["model_name"], metadata["hook_name"] == ("a/b", "up_ft1")
            assert metadata["diffusion_sae_fingerprint"] == sae.provenance.fingerprint

    def test_one_of_several_timesteps(self, tmp_path: Path, weights: Tensors) -> None:
        config = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, timesteps=[25, 100])
        sae = KSparseAutoencoder(config).eval()
        state = direct(weights) | {"b_dec": torch.stack([weights["b_dec"], 2 * weights["b_dec"]])}
        sae.load_state_dict(state | {"timestep_scale": torch.tensor([0.5, 3.0])})
        sae.save_foreign(tmp_path / "out", "sparsify", timestep=100)
        output = sae(weights["features"], timesteps=100)
        latent_acts = sae.encode(weights["features"], timesteps=100).to_dense(NUM_LATENTS)
        assert_same(
            KSparseAutoencoder.from_foreign(tmp_path / "out"), weights["features"], latent_acts, output.reconstruction
        )
        with pytest.raises(
            ValueError, match=r"timestep, of an SAE over several timesteps, must be one of 25, 100, got"
        ):
            sae.save_foreign(tmp_path / "other", "sparsify")
        single = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K))
        with pytest.raises(ValueError, match="timestep belongs to an SAE over several, and this one has none; got 25"):
            single.save_foreign(tmp_path / "other", "sparsify", timestep=25)
        with pytest.raises(ValueError, match="format must be one of 'sae_lens', 'sparsify', got 'revelio'"):
            single.save_foreign(tmp_path / "other", "revelio")
        assert not (tmp_path / "other").exists()


def lens(weights: Tensors, *others: str, **config: Any) -> dict[str, Any]:
    return {"config": V6 | config, "tensors": direct(weights, *others), "names": SAE_LENS}


def learning(tensors: Any, **trainer: Any) -> dict[str, Any]:
    return {"config": {"trainer": trainer}, "tensors": tensors, "names": LEARNING}


def state(tensors: Any) -> dict[str, Any]:
    return {"tensors": tensors, "names": STATE}


def changed(tensors: Tensors, **values: Any) -> Tensors:
    return {name: value for name, value in (tensors | values).items() if value is not None}


Make = Callable[[Tensors], dict[str, Any]]
OVERCOMPLETE = {
    "encoder.final_block.0.weight": torch.ones(3, 2),
    "encoder.final_block.0.bias": torch.zeros(3),
    "dictionary._weights": torch.ones(3, 2),
}
NAN = torch.full((NUM_LATENTS,), float("nan"))
# files → options → what the error says
REFUSED: list[tuple[Make, dict[str, Any], str]] = [
    # SAELens
    (
        lambda w: lens(w, architecture="temporal"),
        {},
        "'temporal' cannot be converted: its latents depend on the rows before",
    ),
    (lambda w: lens(w, architecture="new"), {}, "architecture 'new' cannot be converted: known are standard, topk"),
    (lambda w: lens(w, architecture="jumprelu"), {}, "lacks threshold, which a jumprelu SAE has"),
    (lambda w: lens(w, architecture="gated"), {}, r"lacks b_mag and has the unexpected b_enc"),
    (
        lambda w: lens(w, architecture="gated") | {"tensors": changed(direct(w), b_enc=None, b_mag=w["b_enc"])},
        *({}, "lacks the gate's bias or r_mag"),
    ),
    (
        lambda w: {
            **lens(w, architecture="gated"),
            "tensors": changed(direct(w), b_enc=None, b_mag=w["b_enc"], b_gate=w["b_enc"] - 1, r_mag=w["b_enc"] + 1000),
        },
        *({}, r"exp\(r_mag\) overflows"),
    ),
    (lambda w: lens(w, architecture="topk"), {}, r"cfg.json must give k as a positive integer, got None"),
    (lambda w: lens(w, architecture="topk", k=99), {}, "k must be at most num_latents = 24, got k = 99"),
    (lambda w: lens(w, architecture="topk", k=K, d_sae=5), {}, "cfg.json says d_sae = 5, and the weights have 24"),
    (lambda w: lens(w, "threshold", architecture="topk", k=K), {}, "has the unexpected threshold"),
    (
        lambda w: lens(w, architecture="standard", normalize_activations="covariance_whitening"),
        *({}, "normalize_activations = 'covariance_whitening' cannot be converted"),
    ),
    (
        lambda w: lens(w, architecture="standard", normalize_activations="expected_average_only_in"),
        *({}, r"a factor that the files do not hold.*Give scaling_factor"),
    ),
    (
        lambda w: {
            **lens(w, architecture="matryoshka_batchtopk", k=K, matryoshka_widths="all"),
            "tensors": direct(w) | {"topk_threshold": torch.tensor(0.5)},
        },
        *({}, "must give matryoshka_widths as a list of integers, got 'all'"),
    ),
    (
        lambda w: lens(w, architecture="standard") | {"tensors": direct(w) | {"scaling_factor": torch.tensor(2.0)}},
        *({}, "finetuning scaling_factor other than 1"),
    ),
    (
        lambda w: {"config": {"activation_fn_str": "tanh-relu"}, "tensors": direct(w), "names": SAE_LENS},
        *({}, "activation_fn 'tanh-relu' cannot be converted; relu and topk can"),
    ),
    (
        lambda w: {
            **lens(w, architecture="topk", k=K, rescale_acts_by_decoder_norm=True),
            "tensors": changed(direct(w), W_dec=w["W_dec"] * (torch.arange(NUM_LATENTS) != 4)[:, None]),
        },
        *({}, "Row 4 of W_dec is 0, and rescale_acts_by_decoder_norm divides by its length"),
    ),
    (
        lambda w: lens(w, architecture="standard"),
        {"activation": "topk"},
        "has the activation 'relu', and activation = 'topk'",
    ),
    # sparsify and SAeUron
    (
        lambda w: {"config": CODER | {"skip_connection": True}, "tensors": linear(w), "names": SPARSIFY},
        {},
        "skip_connection",
    ),
    (
        lambda w: {"config": CODER | {"activation": "groupmax"}, "tensors": linear(w), "names": SPARSIFY},
        {},
        "groupmax takes",
    ),
    (lambda w: {"config": CODER | {"gate": 1}, "tensors": linear(w), "names": SPARSIFY}, {}, "does not know 'gate'"),
    (lambda w: {"config": SAEURON | {"gate": 1}, "tensors": linear(w), "names": SPARSIFY}, {}, "does not know 'gate'"),
    (
        lambda w: {"config": SAEURON | {"sample_topk": True}, "tensors": linear(w), "names": SPARSIFY},
        *({}, "with sample_topk chooses among all rows of an image, and its files hold no threshold"),
    ),
    (
        lambda w: {"config": SAEURON | {"batch_topk": True}, "tensors": linear(w), "names": SPARSIFY},
        *({"activation": "batchtopk"}, "activation='batchtopk' needs threshold: the files hold none"),
    ),
    # dictionary_learning
    (
        lambda w: learning(linear(w, "decoder.weight"), dict_class="CrossCoder"),
        {},
        "class 'CrossCoder' cannot be converted",
    ),
    (
        lambda w: learning(linear(w, "decoder.weight") | {"k": torch.tensor(K), "threshold": torch.tensor(0.5)}),
        *({}, "may be an AutoEncoderTopK or a BatchTopKSAE, which have the same tensors"),
    ),
    (
        lambda w: learning(linear(w, "decoder.weight") | {"k": torch.tensor(K)}, dict_class="AutoEncoderTopK", k=7),
        *({}, "k is 7 and 3 in config.json, ae.pt and what was given"),
    ),
    (
        lambda w: learning(linear(w, "decoder.weight") | {"k": torch.tensor(K)}, dict_class="BatchTopKSAE", k=K),
        *({}, "holds no threshold, as of an older version: give threshold"),
    ),
    (
        lambda w: learning(
            direct(w) | {"k": torch.tensor(K), "threshold": torch.tensor(0.5), "group_sizes": torch.ones(2, 2)},
        ),
        *({}, r"group_sizes must be a list of integers, got torch.float32 \(2, 2\)"),
    ),
    (
        lambda w: learning(direct(w) | {"threshold": torch.tensor(0.5)}, dict_class="JumpReluAutoEncoder"),
        *({}, r"threshold must have the shape \(24,\), got \(\)"),
    ),
    (
        lambda w: {"config": {"trainer": 3}, "tensors": linear(w), "names": LEARNING},
        *({}, "must hold its trainer's settings, got 3"),
    ),
    (
        lambda w: learning(direct(w) | {"threshold": w["b_enc"].to(torch.complex64)}, dict_class="JumpReluAutoEncoder"),
        *({}, r"threshold holds complex numbers \(torch.complex64\)"),
    ),
    # overcomplete
    (lambda w: state(OVERCOMPLETE), {}, "does not say which SAE it is of: give activation"),
    (lambda w: state(OVERCOMPLETE), {"activation": "topk"}, "does not hold top_k: give k"),
    (lambda w: state(OVERCOMPLETE), {"activation": "batchtopk", "k": 2}, "no part of its state dict: give threshold"),
    (lambda w: state(OVERCOMPLETE | {"dictionary.C": torch.ones(2, 2)}), {}, "of an archetypal SAE"),
    (
        lambda w: state(OVERCOMPLETE | {"encoder.mlp_blocks.0.0.weight": torch.ones(2, 2)}),
        *({}, r"encoder of several layers \(encoder.mlp_blocks.0.0.weight\)"),
    ),
    (
        lambda w: state(OVERCOMPLETE | {"dictionary._weights": torch.zeros(3, 2)}),
        *({"activation": "relu", "normalization": "max_l2"}, "is not finite once it is normalised by 'max_l2'"),
    ),
    # Revelio
    (lambda w: state(direct(w)), {}, "Revelio's weights do not say k: give it"),
    # any
    (lambda w: {"config": "{", "tensors": linear(w), "names": SPARSIFY}, {}, "cfg.json is not valid JSON"),
    (lambda w: {"config": [1], "tensors": linear(w), "names": SPARSIFY}, {}, "cfg.json holds a list, not an object"),
    (lambda w: {"config": CODER, "tensors": changed(linear(w), b_dec=None), "names": SPARSIFY}, {}, "lacks b_dec"),
    (
        lambda w: {"config": CODER, "tensors": changed(linear(w), b_dec=torch.ones(3)), "names": SPARSIFY},
        *({}, r"b_dec as b_dec must have the shape \(6,\), got \(3,\)"),
    ),
    (
        lambda w: {
            "config": CODER,
            "tensors": changed(linear(w), **{"encoder.weight": torch.ones(3)}),
            "names": SPARSIFY,
        },
        *({}, r"encoder.weight.T must be a matrix, got the shape \(3,\)"),
    ),
    (lambda w: state(changed(direct(w), W_enc=torch.ones(3))), {"k": 1}, r"must be a matrix, got the shape \(3,\)"),
    (lambda w: state(changed(direct(w), W_enc=torch.ones(0, 3))), {"k": 1}, r"is empty, of shape \(0, 3\)"),
    (
        lambda w: {"config": CODER, "tensors": changed(linear(w), b_dec=torch.ones(D_IN).long()), "names": SPARSIFY},
        *({}, r"b_dec is of torch.int64; weights are float64, float32, float16 or bfloat16"),
    ),
    (
        lambda w: {"config": CODER, "tensors": changed(linear(w), **{"encoder.bias": NAN}), "names": SPARSIFY},
        *({}, "encoder.bias holds NaN or infinite values"),
    ),
    (
        lambda w: state(direct(w)),
        {"format": "sae_lens"},
        "lacks cfg.json: SAELens has cfg.json, sae_weights.safetensors",
    ),
    (
        lambda w: {"config": {}, "tensors": None, "names": SPARSIFY},
        {},
        "no checkpoint that is known. It has cfg.json; known are",
    ),
    (
        lambda w: {"config": {}, "tensors": None, "names": SPARSIFY},
        {"format": "overcomplete"},
        "no name of its own: give filename",
    ),
    (lambda w: {"config": {}, "tensors": None, "names": SPARSIFY}, {"format": "revelio"}, "a name each: give filename"),
    (lambda w: state(direct(w)), {"format": "npz"}, "format must be one of None, 'sae_lens'"),
    (lambda w: state(direct(w)), {"filename": "other.pt"}, r"has no file \./other.pt"),
    (lambda w: state(direct(w)), {"subfolder": "deep"}, "has no folder 'deep' with an SAE in it"),
    (lambda w: {"config": {}, "names": "cfg.txt no.pt"}, {"filename": "cfg.txt"}, "cfg.txt is no weights file"),
    (lambda w: state(OVERCOMPLETE), {"activation": "batchtopk", "k": 1, "threshold": 1e300}, "1e[+]300 is too large"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[re.sub(r"\W+", "-", message)[:60] for _, _, message in REFUSED])
def test_refused(case: tuple[Make, dict[str, Any], str], tmp_path: Path, weights: Tensors) -> None:
    make, options, message = case
    folder = put(tmp_path / "source", **make(weights))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        KSparseAutoencoder.from_foreign(folder, **options)


@pytest.mark.parametrize("factor", [0, "two", None])
def test_a_scaler_file_must_hold_a_factor(factor: Any, tmp_path: Path, weights: Tensors) -> None:
    folder = put(tmp_path, **lens(weights, architecture="standard", normalize_activations="expected_average_only_in"))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"scaling factor must be a positive number|files do not hold"):
        KSparseAutoencoder.from_foreign(folder)
    by_hand = KSparseAutoencoder.from_foreign(folder, scaling_factor=2)
    torch.testing.assert_close(by_hand.W_enc, 2 * weights["W_enc"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": ""}, "format must be a name, got ''"),
        ({"subfolder": 1}, "subfolder must be a string, got 1"),
        ({"k": 0}, "k must be an integer ≥ 1, got 0"),
        ({"threshold": -1.0}, "threshold must be a number ≥ 0"),
        ({"scaling_factor": 0}, "scaling_factor must be a number > 0"),
        ({"normalization": "l3"}, "normalization must be one of 'l2'"),
        ({"kk": 3}, r"ForeignOptions does not know 'kk' \(did you mean 'k'\?\)"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForeignOptions.from_dict(options)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for source in (tmp_path / "missing", "owner/missing"):
        with pytest.raises(
            FileNotFoundError, match="it is no folder and no file, and no repository on the Hub that can"
        ):
            KSparseAutoencoder.from_foreign(source)


@dataclasses.dataclass
class RunnerConfig:
    """As Revelio pickles its own beside the weights."""

    k: int = 32


class TestPickles:
    def test_objects_are_refused_before_they_are_read(self, tmp_path: Path, weights: Tensors) -> None:
        path = tmp_path / "revelio.pt"
        torch.save({"cfg": RunnerConfig(), "state_dict": direct(weights)}, path)
        with pytest.raises(
            ValueError, match=r"revelio.pt needs \S*RunnerConfig to be read.*refused(?s:.)*save the tensors alone"
        ):
            KSparseAutoencoder.from_foreign(path, k=K)

    def test_code_is_not_run(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"

        class Harmful:
            def __reduce__(self) -> Any:
                return (Path.touch, (marker,))

        torch.save({"W_enc": Harmful()}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=r"needs .*pathlib.Path.* to be read"):
            KSparseAutoencoder.from_foreign(tmp_path / "weights.pt", k=1)
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful()))
        with pytest.raises(ValueError, match=r"is no archive of torch\.save"):
            KSparseAutoencoder.from_foreign(tmp_path / "plain.pt", k=1)
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2], "holds a list, not a state dict of named tensors"),
            ({}, "holds a dict, not a state dict"),
            ({"W_enc": 3}, "holds 'W_enc': int where a state dict has tensors"),
            ({"W_enc": torch.ones(2, 2).to_sparse()}, "W_enc is no dense tensor"),
            ({"W_enc": torch.ones(1).expand(10**6)}, r"W_enc has the shape \(1000000,\) over 4 bytes: it repeats them"),
        ],
    )
    def test_what_is_no_state_dict(self, content: Any, message: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=message):
            KSparseAutoencoder.from_foreign(tmp_path / "weights.pt", k=1)


class TestCommand:
    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        binary = Path(sys.executable).parent / "diffusion-sae"
        return subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, check=False)

    def test_there_and_back(self, tmp_path: Path, weights: Tensors, capsys: pytest.CaptureFixture[str]) -> None:
        source = put(tmp_path / "theirs", CODER, linear(weights), SPARSIFY)
        assert main(["convert", str(source), str(tmp_path / "ours"), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["converted_from"].startswith("sparsify: theirs/sae.safetensors (sha256 ")
        del result["converted_from"]
        assert result == {
            **{"sae": str(tmp_path / "ours"), "format": "diffusion_sae", "d_in": D_IN, "num_latents": NUM_LATENTS},
            **{"k": K, "activation": "relu_topk", "input_norm": "none"},
        }
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "sparsify"]) == 0
        assert "→ sparsify" in capsys.readouterr().out
        before, after = (load_file(folder / "sae.safetensors") for folder in (source, tmp_path / "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_the_embedded_sae_for_sae_lens(self, tmp_path: Path) -> None:
        done = self.run("convert", "tiny-sd-up1-t50", tmp_path / "out", "--to", "sae_lens")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("an SAE of diffusion_sae → sae_lens in ")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"cfg.json", "sae_weights.safetensors"}

    def test_errors_are_messages(self, tmp_path: Path, weights: Tensors, capsys: pytest.CaptureFixture[str]) -> None:
        source = put(tmp_path / "theirs", None, direct(weights), STATE)
        for arguments, message in {
            (source, "out"): "error: Revelio's weights do not say k: give it. The paper's is 32.",
            (source, "out", "--timestep", "3"): "error: --timestep belongs to --to sae_lens or sparsify",
            (
                "tiny-sd-up1-t50",
                "out",
                "--k",
                "3",
            ): "error: 'tiny-sd-up1-t50' is an SAE of this library, which leaves out k",
        }.items():
            assert main(["convert", *map(str, arguments)]) == 1
            assert message in capsys.readouterr().err
        assert not Path("out").exists()


def test_formats_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in FORMATS)
