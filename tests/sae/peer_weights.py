"""Weights for all SAE classes that `test_peers.py` compares, and what makes theirs ours."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig

D_IN, NUM_LATENTS, K, ROWS = 96, 768, 16, 40
SIZES = [192, 384, 768]
LENGTH, DEAD, AUXK = 6.0, 30, D_IN // 2
COEFFICIENT, BANDWIDTH = 0.05, 0.2

Tensors = dict[str, Tensor]
Fold = Callable[[Tensors], Tensors]
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def draw_weights(features: Tensor) -> Tensors:
    """Weights of all peers, of which each takes what it has: no bias is 0, and no row of W_dec has unit norm."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = features.double()
    features -= 0.9 * features.mean(0)  # else all rows have much the same latents
    drawn = {
        "W_enc": 2 * normal(D_IN, NUM_LATENTS) / D_IN**0.5,
        "b_enc": 0.3 * normal(NUM_LATENTS),
        "W_dec": normal(NUM_LATENTS, D_IN) / D_IN**0.5 * (1 + 0.3 * normal(NUM_LATENTS, 1).tanh()),
        "b_dec": features.mean(0) + 0.1 * normal(D_IN),
        "b_gate": 0.3 * normal(NUM_LATENTS) - 1,
        "r_mag": 0.2 * normal(NUM_LATENTS),
        "thresholds": 1.5 + 0.2 * normal(NUM_LATENTS).abs(),
        "threshold": torch.tensor(1.5, dtype=torch.float64),
        "multiplier": torch.tensor(0.25, dtype=torch.float64),
        "features": features,
        "even": LENGTH * F.normalize(features, dim=1),
    }
    drawn = {name: value.float().double() for name, value in drawn.items()}  # float32 and float64 are given the same
    drawn["log_thresholds"] = drawn["thresholds"].log()
    # fewer than k pre-activations of a row are positive, so that ReLU and TopK do not say the same
    drawn["scarce_b_enc"] = drawn["b_enc"] - 2.8
    pre_acts = (drawn["even"] - drawn["b_dec"]) @ drawn["W_enc"] + drawn["b_enc"]
    dead = torch.zeros(NUM_LATENTS, dtype=torch.uint8)
    dead[pre_acts.amax(0).argsort()[:DEAD]] = 1
    whole = {"k": torch.tensor(K), "matryoshka_sizes": torch.tensor(SIZES), "dead": dead}
    given = {"coefficient": COEFFICIENT, "bandwidth": BANDWIDTH}
    return drawn | whole | {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}


def plain(weights: Tensors) -> Tensors:
    return {name: weights[name] for name in WEIGHTS}


def unsubtracted(weights: Tensors) -> Tensors:
    return plain(weights) | {"b_enc": weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]}


def rescaled(weights: Tensors) -> Tensors:
    norms = weights["W_dec"].norm(dim=1)
    return {
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] / norms[:, None],
        "b_dec": weights["b_dec"],
    }


def gated(weights: Tensors) -> Tensors:
    """Open where W_encᵀ x + b_gate > 0; the magnitude exp(r) W_encᵀ x + b_enc is then above b_enc − exp(r) b_gate."""
    scale = weights["r_mag"].exp()
    threshold = weights["b_enc"] - scale * weights["b_gate"]
    return plain(weights) | {"W_enc": weights["W_enc"] * scale, "log_threshold": threshold.clamp_min(1e-30).log()}


def dictionary(weights: Tensors) -> Tensors:
    W_dec = weights["W_dec"]
    normalised = W_dec + (F.normalize(W_dec, dim=1) - W_dec).detach()
    return {
        "W_enc": weights["W_enc"],
        "b_enc": weights["b_enc"],
        "W_dec": normalised * weights["multiplier"].exp(),
        "b_dec": torch.zeros_like(weights["b_dec"]),
    }


def log_dictionary(weights: Tensors) -> Tensors:
    """Its threshold is the exponential of a parameter, as ours."""
    return dictionary(weights) | {"log_threshold": weights["log_thresholds"]}


class Case(NamedTuple):
    activation: str
    fold: Fold = plain
    input_norm: str = "none"
    sizes: list[int] | None = None
    training: bool = False

    def sae(self) -> KSparseAutoencoder:
        config = KSparseAutoencoderConfig(
            d_in=D_IN,
            num_latents=NUM_LATENTS,
            k=K,
            activation=self.activation,
            input_norm=self.input_norm,
            matryoshka_sizes=self.sizes,
            jumprelu_bandwidth=BANDWIDTH,
        )
        return KSparseAutoencoder(config).train(self.training)

    def ours(self, weights: Tensors) -> Tensors:
        of_activation = {
            "jumprelu": {"log_threshold": weights["thresholds"].log()},
            "batchtopk": {"threshold": weights["threshold"]},
        }
        return of_activation.get(self.activation, {}) | self.fold(weights)


CASES = {
    "sae-lens/topk-rescaled": Case("topk", rescaled),
    "sae-lens/topk-layer-norm": Case("topk", input_norm="sample_layer_norm"),
    "sae-lens/topk-constant-norm": Case("topk", input_norm="constant_norm"),
    "sae-lens/batchtopk": Case("batchtopk", rescaled),
    "sae-lens/batchtopk-training": Case("batchtopk", rescaled, training=True),
    "sae-lens/jumprelu": Case("jumprelu"),
    "sae-lens/jumprelu-unsubtracted": Case("jumprelu", unsubtracted),
    "sae-lens/gated": Case("jumprelu", gated),
    "sae-lens/standard": Case("relu"),
    "dictionary-learning/topk-threshold": Case("batchtopk"),
    "dictionary-learning/batchtopk": Case("batchtopk"),
    "dictionary-learning/batchtopk-training": Case("batchtopk", training=True),
    "dictionary-learning/matryoshka": Case("batchtopk", sizes=SIZES),
    "dictionary-learning/matryoshka-training": Case("batchtopk", sizes=SIZES, training=True),
    "dictionary-learning/jumprelu": Case("jumprelu", unsubtracted),
    "dictionary-learning/gated": Case("jumprelu", gated),
    "dictionary-learning/standard": Case("relu"),
    "dictionary-learning/standard-unsubtracted": Case("relu", unsubtracted),
    "overcomplete/topk-signed": Case("signed_topk", dictionary),
    "overcomplete/batchtopk": Case("batchtopk", dictionary),
    "overcomplete/batchtopk-training": Case("batchtopk", dictionary, training=True),
    "overcomplete/jumprelu": Case("jumprelu", log_dictionary),
}
# SAELens applies ReLU after TopK, the others before it
TOP_K = {
    "sae-lens/topk": plain,
    "sparsify/topk": plain,
    "dictionary-learning/topk": plain,
    "overcomplete/topk": dictionary,
}
