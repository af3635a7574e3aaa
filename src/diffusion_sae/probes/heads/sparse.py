"""`sae`, a sparse linear probe on the latents of an SAE."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from ..._row_norms import row_norm
from ..examples import Features
from .base import Head, channels_last

TOP_K = ("topk", "relu_topk", "signed_topk")
ENCODED_AT_ONCE = 2**26  # numbers of rows × latents


class SAEHead(Head):
    """With the frozen encoder of an SAE, z_t its latents at position t of an image, as `KSparseAutoencoder.encode`
    gives them, and their largest or mean value over the positions:

        p = W_encᵀ (x_t − b_dec) + b_enc,   z_t = ReLU(TopK_k(p)) or p where p > θ,   z = max_t z_t or mean_t z_t,
        logits_c = Σ_i W_ci z_i + b_c

    so that W_ci z_i is what latent i adds to class c. W is fitted with an L1 penalty (Tibshirani 1996) in units of each
    latent's root mean square over the training examples: most of it is 0.
    """

    name = "sae"
    optimizers = ("fista", "lbfgs")
    whole_images = True
    shape = "(N, {d_in}), (N, T, {d_in}) or (N, {d_in}, h, w)"
    options = ("sae", "latent_pooling")
    explains = True
    scale: Tensor
    """() what rows are divided by: the scale of a timestep."""
    b_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    """(num_latents,) θ; not used by TopK."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d_in, latents = config.d_in, config.sae["num_latents"]
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("b_dec", torch.zeros(d_in))
        self.register_buffer("W_enc", torch.zeros(d_in, latents))
        self.register_buffer("b_enc", torch.zeros(latents))
        self.register_buffer("threshold", torch.zeros(latents))
        self.classifier = nn.Linear(latents, config.num_labels)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:  # noqa: ARG002  nothing is drawn
        """Convex: starts at the uniform prediction."""
        if not self.classifier.weight.is_meta:
            self.classifier.weight.zero_()
            self.classifier.bias.zero_()

    @torch.no_grad()
    def take_encoder(self, sae: Any, timestep: int | None) -> None:
        """Copy what a KSparseAutoencoder encodes with; of one over several timesteps, bias and scale of this one."""
        known = sae.config.timesteps
        if (known is None) != (timestep is None) or (known is not None and timestep not in known):
            expects = "none" if known is None else f"one of {known}"
            raise ValueError(f"timestep must be that of the probe's features, for this SAE {expects}, got {timestep}.")
        self.W_enc.copy_(sae.W_enc)
        self.b_enc.copy_(sae.b_enc)
        self.b_dec.copy_(sae.b_dec if known is None else sae.b_dec[known.index(timestep)])
        self.threshold.copy_(sae.activation_threshold())  # one for all, or one each
        if known is not None:
            self.scale.copy_(sae.timestep_scale[known.index(timestep)])

    def arranged(self, features: Features) -> Features:
        if not isinstance(features, Tensor) or features.ndim not in (2, 3, 4):
            raise self.refusal(features)
        tokens = channels_last(features)
        if tokens.shape[2] != self.config.d_in:
            raise self.refusal(features)
        return tokens

    def forward(self, features: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B num_labels"]:
        return self.classifier(self.design(features))

    @torch.no_grad()
    def design(self, features: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B num_latents"]:
        """z, a few images at a time: rows × latents are many numbers."""
        images = max(1, ENCODED_AT_ONCE // (features.shape[1] * self.W_enc.shape[1]))
        return torch.cat([self._pooled(part) for part in features.split(images)])

    def _pooled(self, features: Float[Tensor, "b T d_in"]) -> Float[Tensor, "b num_latents"]:
        latent_acts = self._encoded(features.flatten(0, 1)).unflatten(0, features.shape[:2])  # (b, T, num_latents)
        return latent_acts.amax(1) if self.config.latent_pooling == "max" else latent_acts.mean(1)

    def _encoded(self, rows: Float[Tensor, "N d_in"]) -> Float[Tensor, "N num_latents"]:
        config = self.config.sae
        shift, divisor, _ = row_norm(rows, config["input_norm"])
        rows = rows if shift is None else rows - shift
        rows = rows / (self.scale if divisor is None else divisor * self.scale)
        pre_acts = torch.addmm(self.b_enc, rows - self.b_dec, self.W_enc)
        if config["activation"] not in TOP_K:
            return torch.where(pre_acts > self.threshold.clamp_min(0), pre_acts, 0.0)
        values, indices = pre_acts.topk(config["k"], dim=1)
        values = values if config["activation"] == "signed_topk" else F.relu(values)
        return torch.zeros_like(pre_acts).scatter_(1, indices, values)

    @torch.no_grad()
    def evidence(
        self, features: Float[Tensor, "B T d_in"]
    ) -> tuple[Float[Tensor, "B num_labels T"], Float[Tensor, "B num_labels"]]:
        """Position t adds Σ_i W_ci z_ti / T for the mean; for the maximum Σ W_ci z_i over the latents i whose largest
        value is at t (of equals the first). No position adds b_c.
        """
        weight, maps = self.classifier.weight, []
        for image in features:  # one at a time: positions × latents are many numbers
            latent_acts = self._encoded(image)  # (T, num_latents)
            if self.config.latent_pooling == "mean":
                maps.append(weight @ latent_acts.T / len(latent_acts))
            else:
                values, places = latent_acts.max(0)
                maps.append(weight.new_zeros(len(weight), len(image)).index_add_(1, places, weight * values))
        return torch.stack(maps), self.classifier.bias.expand(len(features), -1)

    def contributions(self, latent_acts: Float[Tensor, "B num_latents"]) -> Float[Tensor, "B num_labels num_latents"]:
        """W_ci z_i: what each latent adds to each class; logits_c is their sum plus b_c."""
        return latent_acts[:, None] * self.classifier.weight
