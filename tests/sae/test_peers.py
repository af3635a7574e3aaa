"""Identical weights give identical outputs: the classes of the released SAE libraries as oracles.

sae-lens, eai-sparsify, dictionary-learning and overcomplete run in an environment of their own
(`benchmarks/peers/environment.py`), in one process for all tests. Theirs becomes ours by a function of the weights, of
those that learn a differentiable one, so that gradients are compared in the other library's parameters.

What such a function makes good:

- `unsubtracted`: JumpReLU and `AutoEncoderNew` of dictionary_learning and `apply_b_dec_to_input=False` of SAELens do
  not take b_dec off their input: our b_enc is then b_enc + W_encᵀ b_dec.
- `rescaled`: `rescale_acts_by_decoder_norm` of SAELens multiplies latents by the decoder's norms.
- `gated`: gate and magnitude of a gated SAE share their weights, which makes it a JumpReLU (Rajamanoharan et al. 2024,
  arXiv 2404.16014).
- `dictionary`: overcomplete normalises its dictionary when it reads it, with no gradient, and has no b_dec.

Our loss divides each row's error by the row's length, theirs do not: losses are compared on rows of one length, where
the two differ by a factor. Known differences, each held by a test: AuxK is divided by Σ‖e‖² here, by Σ‖e − ē‖² in
dictionary_learning, by Σ‖x − x̄‖² in sparsify and by the number of rows in SAELens, where its latents may be negative;
sparsify and SAELens weaken it where few latents are dead. dictionary_learning divides the Matryoshka loss by the number
of groups twice, SAELens not at all. overcomplete divides the gradient of a threshold by the kernel's width twice.

Not compared, as no configuration of ours says the same: absolute TopK, matching pursuit, temporal SAEs, transcoders and
whitening of SAELens; GroupMax, skip connections and transcoders of sparsify; encoders of
several layers, quantised and (orthogonal) matching pursuit SAEs and the losses on unchosen latents of overcomplete.
Its archetypal SAEs are its TopK and JumpReLU with a dictionary that is made otherwise. dictionary_learning's L0 penalty
gives a threshold the gradient of half of its window alone, and sparsify's encoder gets no gradient of AuxK and
Multi-TopK: of these the values are compared, not the gradients. `signed_topk` is Revelio's, which is not a package;
overcomplete's TopK says the same with an encoder that has no ReLU.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peer_weights import (
    AUXK,
    BANDWIDTH,
    CASES,
    COEFFICIENT,
    D_IN,
    DEAD,
    LENGTH,
    NUM_LATENTS,
    ROWS,
    SIZES,
    TOP_K,
    Case,
    K,
    Tensors,
    dictionary,
    draw_weights,
    log_dictionary,
    plain,
    rescaled,
    unsubtracted,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from diffusion_sae.sae.code import KSparseAutoencoderOutput, SparseCode
from diffusion_sae.sae.losses import total_variance

pytestmark = pytest.mark.slow

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}
TRAINED_TOLERANCE = 1e-6  # in float64, but that the peers compute a part in float32
COMPARED = [
    *CASES.items(),
    *((name, Case(activation, fold)) for name, fold in TOP_K.items() for activation in ("topk", "relu_topk")),
]


class Exchange(NamedTuple):
    weights: Tensors
    outputs: Tensors
    versions: dict[str, str]


@pytest.fixture(scope="module")
def peers(superposition: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    """The environment is made if it is missing; where that fails, so do the tests."""
    folder = tmp_path_factory.mktemp("peers")
    weights = draw_weights(superposition(ROWS, d_in=D_IN, num_features=400, active=30.0))
    save_file(weights, folder / "inputs.safetensors")
    making = subprocess.run([sys.executable, PEERS / "environment.py"], check=True, text=True, stdout=subprocess.PIPE)
    script = Path(__file__).with_name("peer_outputs.py")
    outputs = folder / "outputs.safetensors"
    subprocess.run([making.stdout.strip(), script, folder / "inputs.safetensors", outputs], check=True)
    with safe_open(outputs, "pt") as file:
        versions = file.metadata()
    return Exchange(weights, load_file(outputs), versions)


def test_peers_are_the_released_packages(peers: Exchange) -> None:
    pinned = re.findall(r"^([\w-]+)==(\S+)$", (PEERS / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(peers.versions) == 4
    assert peers.versions.items() <= dict(pinned).items()


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative and absolute; where all are below 1, in units of the largest, which is not 0."""
    largest = float(expected.abs().max())
    assert largest > 0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * min(1.0, largest), check_dtype=False)


def our_outputs(case: Case, weights: Tensors) -> tuple[Tensor, Tensor]:
    """Dense latents and the reconstruction, in each way of computing them."""
    sae, features = case.sae().to(weights["features"].dtype), weights["features"]
    sae.load_state_dict(case.ours(weights), strict=True)
    with torch.no_grad():
        output = sae(features)
        latent_acts = SparseCode(output.top_acts, output.top_indices).to_dense(NUM_LATENTS)
        if not case.training:
            code = sae.encode(features)
            torch.testing.assert_close(code.to_dense(NUM_LATENTS), latent_acts)
            if case.input_norm == "none":
                torch.testing.assert_close(sae.decode(code), output.reconstruction)
    return latent_acts, output.reconstruction


def weights_in(peers: Exchange, dtype: torch.dtype, biases: str = "b_enc") -> Tensors:
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in peers.weights.items()}
    return given | {"b_enc": given[biases]}


@pytest.mark.parametrize("biases", ["b_enc", "scarce_b_enc"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "case"), COMPARED, ids=[f"{name}-{case.activation}" for name, case in COMPARED])
def test_same_latents_and_reconstruction(
    name: str, case: Case, dtype: torch.dtype, biases: str, peers: Exchange
) -> None:
    """In float64 of all rows. In float32 rounding may decide in some row which of two equal latents is in."""
    latent_acts, reconstruction = our_outputs(case, weights_in(peers, dtype, biases))
    key = f"{str(dtype).removeprefix('torch.')}/{biases}/{name}"
    expected, expected_reconstruction = (peers.outputs[f"{key}/{part}"] for part in ("latent_acts", "reconstruction"))
    same = ((latent_acts != 0) == (expected != 0)).all(1)
    assert same.sum() >= (ROWS if dtype == torch.float64 else 0.95 * ROWS)
    assert_close(latent_acts[same], expected[same], TOLERANCE[dtype])
    assert_close(reconstruction[same], expected_reconstruction[same], TOLERANCE[dtype])


@pytest.mark.parametrize("name", TOP_K)
def test_signs_are_all_that_the_order_of_relu_and_topk_changes(name: str, peers: Exchange) -> None:
    weights = weights_in(peers, torch.float64, "scarce_b_enc")
    signed, _ = our_outputs(Case("signed_topk", TOP_K[name]), weights)
    assert ((signed < 0).any(1)).float().mean() > 0.5, "in most rows fewer than k are positive"
    assert ((signed != 0).sum(1) == K).all()
    assert_close(signed.relu(), peers.outputs[f"float64/scarce_b_enc/{name}/latent_acts"], 1e-7)


Run = Callable[..., KSparseAutoencoderOutput]
"""Our training forward on rows of one length, with its options."""


def squared_error(run: Run, weights: Tensors) -> Tensor:
    """mean over rows of ‖x̂ − x‖²."""
    return LENGTH**2 * run().loss


def fraction_of_variance(run: Run, weights: Tensors) -> Tensor:
    return ROWS * squared_error(run, weights) / total_variance(weights["even"])


def with_auxk_over_spread_residual(run: Run, weights: Tensors) -> Tensor:
    """dictionary_learning: + 1/32 · Σ‖e − ê‖² / Σ‖e − ē‖²."""
    error = weights["even"] - run().reconstruction.detach()
    alpha = error.square().sum() / total_variance(error) / 32
    dead = weights["dead"].bool()
    return LENGTH**2 * run(dead_latents=dead, auxk=AUXK, auxk_alpha=alpha / LENGTH**2).loss


def with_auxk_undivided(run: Run, weights: Tensors) -> Tensor:
    """SAELens: + min(dead / k_aux, 1) · mean over rows of ‖e − ê‖²."""
    alpha = DEAD / AUXK * run().loss.item()
    return LENGTH**2 * run(dead_latents=weights["dead"].bool(), auxk=AUXK, auxk_alpha=alpha).loss


def with_l1(run: Run, weights: Tensors) -> Tensor:
    return LENGTH**2 * run(sparsity_coefficient=COEFFICIENT / LENGTH).loss


def with_l0(run: Run, weights: Tensors) -> Tensor:
    """SAELens: + coefficient · L0, which is above k here; ours is (L0 / k − 1)²."""
    penalty = run(sparsity_coefficient=1.0).loss - run().loss
    return squared_error(run, weights) + COEFFICIENT * K * (1 + penalty.sqrt())


class Step(NamedTuple):
    case: Case
    total: Callable[[Run, Tensors], Tensor] = squared_error
    """Our loss in the other library's units."""
    factor: float = 1.0
    """Of that and its gradients."""
    learned: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec")


DICTIONARY = ("W_enc", "b_enc", "W_dec", "multiplier")
THRESHOLDS = (*Step._field_defaults["learned"], "thresholds")
STEPS = {
    "sae-lens/topk": Step(Case("signed_topk"), with_auxk_undivided),
    "sae-lens/batchtopk": Step(Case("batchtopk", rescaled)),
    "sae-lens/matryoshka": Step(Case("batchtopk", rescaled, sizes=SIZES), factor=len(SIZES)),
    "sae-lens/jumprelu": Step(Case("jumprelu"), with_l0, learned=THRESHOLDS),
    "sae-lens/standard": Step(Case("relu"), with_l1),
    "sparsify/topk": Step(Case("relu_topk"), fraction_of_variance),
    "dictionary-learning/topk": Step(Case("topk"), with_auxk_over_spread_residual),
    "dictionary-learning/batchtopk": Step(Case("batchtopk")),
    "dictionary-learning/matryoshka": Step(Case("batchtopk", sizes=SIZES), factor=1 / len(SIZES)),
    "dictionary-learning/jumprelu": Step(Case("jumprelu", unsubtracted), learned=THRESHOLDS),
    "dictionary-learning/standard": Step(Case("relu"), with_l1),
    "overcomplete/topk": Step(Case("relu_topk", dictionary), factor=1 / D_IN, learned=DICTIONARY),
    "overcomplete/jumprelu": Step(
        Case("jumprelu", log_dictionary), factor=1 / D_IN, learned=(*DICTIONARY, "log_thresholds")
    ),
}


def our_forward(case: Case, weights: Tensors, **options: Any) -> KSparseAutoencoderOutput:
    """As in training, on weights that may have a gradient."""
    sae = case.sae().double().train()
    return functional_call(sae, case.ours(weights), (weights["even"],), options, strict=True)


@pytest.mark.parametrize("name", STEPS)
def test_same_loss_and_gradients(name: str, peers: Exchange) -> None:
    step = STEPS[name]
    expected = {
        key.removeprefix(f"step/{name}/"): value
        for key, value in peers.outputs.items()
        if key.startswith(f"step/{name}/")
    }
    learned = {key: peers.weights[key].clone().requires_grad_() for key in step.learned}
    weights = peers.weights | learned
    loss = step.factor * step.total(partial(our_forward, step.case, weights), weights)
    assert_close(loss.detach(), expected["loss"], TRAINED_TOLERANCE)
    loss.backward()
    assert {f"gradient of {key}" for key in learned} == {key for key in expected if key.startswith("gradient of ")}
    for key, weight in learned.items():
        # overcomplete divides by the width of the window in the kernel and again after it
        twice = BANDWIDTH if key == "log_thresholds" else 1
        assert_close(weight.grad, twice * expected[f"gradient of {key}"], TRAINED_TOLERANCE)


@pytest.mark.parametrize("activation", ["topk", "relu_topk"])
def test_other_losses_of_sparsify(activation: str, peers: Exchange) -> None:
    """AuxK is a share of the variance, and weak for few dead latents; ours is a share of the error."""
    weights, dead = peers.weights, peers.weights["dead"].bool()
    run = partial(our_forward, Case(activation), weights)
    expected = {part: peers.outputs[f"step/sparsify/topk/{part}"] for part in ("loss", "auxk", "multi-topk")}
    output = run(dead_latents=dead, auxk=AUXK)
    assert_close(output.fvu, expected["loss"], TRAINED_TOLERANCE)
    assert_close(DEAD / AUXK * output.auxk_loss * output.fvu, expected["auxk"], TRAINED_TOLERANCE)
    both = fraction_of_variance(partial(run, multi_topk_alpha=1.0), weights)
    assert_close(both - fraction_of_variance(run, weights), expected["multi-topk"], TRAINED_TOLERANCE)


def test_l0_penalty_of_dictionary_learning(peers: Exchange) -> None:
    without, expected = (peers.outputs[f"step/dictionary-learning/{name}/loss"] for name in ("jumprelu", "jumprelu-l0"))
    penalty = our_forward(Case("jumprelu", unsubtracted), peers.weights).sparsity_loss
    assert_close(COEFFICIENT * penalty, expected - without, TRAINED_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "fold", "sizes", "rate"),
    [
        ("sae-lens/batchtopk", rescaled, None, 0.01),
        ("sae-lens/matryoshka", rescaled, SIZES, 0.01),
        ("dictionary-learning/batchtopk", plain, None, 0.001),
        ("dictionary-learning/matryoshka", plain, SIZES, 0.001),
    ],
)
def test_same_step_of_the_threshold(
    name: str, fold: Callable[[Tensors], Tensors], sizes: list[int] | None, rate: float, peers: Exchange
) -> None:
    case = Case("batchtopk", fold, sizes=sizes, training=True)
    sae = case.sae().double()
    sae.load_state_dict(case.ours(peers.weights))
    before = sae.threshold.clone()
    sae.update_threshold_(sae(peers.weights["even"]).top_acts, rate)
    expected = peers.outputs[f"step/{name}/threshold"]
    assert sae.threshold != before
    assert_close((sae.threshold - before) / rate, (expected - before) / rate, 1e-4)  # dictionary-learning: in float32
