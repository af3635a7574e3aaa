"""KSparseAutoencoder: the model, free of training and of the Hub's details."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..features import FeatureSet
from ..hub.artifact import ArtifactModel
from ..provenance import require_same_provenance
from .configuration import KSparseAutoencoderConfig


class SparseCode(NamedTuple):
    """The active latents of each row."""

    top_acts: Float[Tensor, "N k"]
    """Activations, ≥ 0, largest first."""
    top_indices: Int[Tensor, "N k"]
    """Which latents they are."""

    def to_dense(self, num_latents: int) -> Float[Tensor, "N num_latents"]:
        """`latent_acts`, zero where a latent is not active."""
        dense = self.top_acts.new_zeros(len(self.top_acts), num_latents)
        return dense.scatter_(1, self.top_indices, self.top_acts)


@dataclass
class KSparseAutoencoderOutput(ModelOutput):
    """Result of a forward pass."""

    loss: Float[Tensor, ""] | None = None
    """Normalised MSE plus `auxk_alpha` × AuxK loss."""
    reconstruction: Float[Tensor, "N d_in"] | None = None
    top_acts: Float[Tensor, "N k"] | None = None
    top_indices: Int[Tensor, "N k"] | None = None
    fvu: Float[Tensor, ""] | None = None
    """Fraction of variance unexplained in this batch, Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    auxk_loss: Float[Tensor, ""] | None = None
    """0 where no latent is dead."""


def normalized_mse(reconstruction: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """mean over rows of ‖x̂ − x‖² / ‖x‖² (Gao et al. 2024, §2.1; the loss of Revelio)."""
    error = (reconstruction - target).pow(2).sum(-1)
    return (error / target.pow(2).sum(-1).clamp_min(torch.finfo(target.dtype).tiny)).mean()


def fraction_of_variance_unexplained(reconstruction: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Σ‖x − x̂‖² / Σ‖x − x̄‖², with x̄ the mean row; 0 is perfect, 1 is as good as the mean."""
    return (target - reconstruction).pow(2).sum() / (target - target.mean(0)).pow(2).sum()


class KSparseAutoencoder(ArtifactModel):
    """A k-sparse autoencoder (Makhzani & Frey 2013; Gao et al. 2024, §2.3; Revelio, §3.2):

        z = ReLU(TopK(W_encᵀ (x − b_dec) + b_enc)),    x̂ = W_decᵀ z + b_dec

    with features x (d_in), `W_enc` (d_in, num_latents), `W_dec` (num_latents, d_in), whose rows have unit norm: a row
    is the direction that its latent writes. TopK keeps the k largest pre-activations and ReLU drops negative ones.
    """

    config_class = KSparseAutoencoderConfig
    config: Any
    base_model_prefix = "sae"
    main_input_name = "features"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d_in, num_latents = config.d_in, config.num_latents
        self.W_enc = nn.Parameter(torch.empty(d_in, num_latents))
        self.b_enc = nn.Parameter(torch.empty(num_latents))
        self.W_dec = nn.Parameter(torch.empty(num_latents, d_in))
        self.b_dec = nn.Parameter(torch.empty(d_in))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self or self.W_dec.is_meta:
            return
        generator = torch.Generator().manual_seed(self.config.init_seed)
        W_dec = torch.randn(self.config.num_latents, self.config.d_in, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        if self.config.encoder_init == "tied":
            W_enc = W_dec.T
        else:  # He et al. 2015 for a layer of d_in inputs, uniform
            bound = math.sqrt(6 / self.config.d_in)
            W_enc = (torch.rand(self.config.d_in, self.config.num_latents, generator=generator) * 2 - 1) * bound
        for name, value in (("W_dec", W_dec), ("W_enc", W_enc)):
            nn.Parameter.copy_(getattr(self, name), value)
        self.b_enc.zero_()
        self.b_dec.zero_()

    def _checked(self, features: Tensor) -> Float[Tensor, "N d_in"]:
        """The features in the SAE's floating-point type, if they are of its width and finite."""
        if features.ndim != 2 or features.shape[1] != self.config.d_in:
            raise ValueError(
                f"features must have the shape (N, d_in) = (N, {self.config.d_in}), got {tuple(features.shape)}. "
                "For token or image-shaped activations put positions into the rows first."
            )
        if not torch.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values; extract them again or remove these rows.")
        return features.to(self.dtype)

    def pre_acts(self, features: Float[Tensor, "N d_in"]) -> Float[Tensor, "N num_latents"]:
        """W_encᵀ (x − b_dec) + b_enc, dense."""
        return torch.addmm(self.b_enc, features - self.b_dec, self.W_enc)

    def _topk(self, pre_acts: Float[Tensor, "N num_latents"]) -> SparseCode:
        values, indices = pre_acts.topk(self.config.k, dim=-1)
        return SparseCode(F.relu(values), indices)

    def encode(self, features: Float[Tensor, "N d_in"]) -> SparseCode:
        """Active latents of each row.

        Raises:
            ValueError: for another width, NaN or infinity.
        """
        return self._topk(self.pre_acts(self._checked(features)))

    def decode(self, code: SparseCode) -> Float[Tensor, "N d_in"]:
        """Σ z_i W_dec[i] + b_dec over the active latents alone."""
        return self._decode_sparse(code) + self.b_dec

    def _decode_sparse(self, code: SparseCode) -> Float[Tensor, "N d_in"]:
        acts = code.top_acts.to(self.W_dec.dtype)
        return F.embedding_bag(code.top_indices, self.W_dec, per_sample_weights=acts, mode="sum")

    def forward(
        self,
        features: Float[Tensor, "N d_in"],
        dead_latents: Bool[Tensor, " num_latents"] | None = None,
        auxk: int = 0,
        auxk_alpha: float = 1 / 32,
    ) -> KSparseAutoencoderOutput:
        """Reconstruct features.

        Args:
            features: (N, d_in).
            dead_latents: latents that have not been active for long; with `auxk` > 0 they learn the residual.
            auxk: how many of the dead latents reconstruct the residual of a row.
            auxk_alpha: weight of that loss (Gao et al. 2024, §A.2: 1/32).
        """
        features = self._checked(features)
        pre_acts = self.pre_acts(features)
        code = self._topk(pre_acts)
        reconstruction = self.decode(code)
        auxk_loss = features.new_zeros(())
        if auxk and dead_latents is not None and bool(dead_latents.any()):
            auxk_loss = self._auxk_loss(features - reconstruction.detach(), pre_acts, dead_latents, auxk)
        return KSparseAutoencoderOutput(
            loss=normalized_mse(reconstruction, features) + auxk_alpha * auxk_loss,
            reconstruction=reconstruction,
            top_acts=code.top_acts,
            top_indices=code.top_indices,
            fvu=fraction_of_variance_unexplained(reconstruction.detach(), features),
            auxk_loss=auxk_loss.detach(),
        )

    def _auxk_loss(self, residual: Tensor, pre_acts: Tensor, dead_latents: Tensor, auxk: int) -> Float[Tensor, ""]:
        """Σ‖e − ê‖² / Σ‖e‖², e = x − x̂ without gradient, ê its reconstruction from the `auxk` most active dead latents.

        (Gao et al. 2024, §A.2.) ê has no b_dec: x̂ has it already, and e is what x̂ leaves over.
        """
        auxk = min(auxk, int(dead_latents.sum()))
        values, indices = pre_acts.masked_fill(~dead_latents, -math.inf).topk(auxk, dim=-1)
        estimate = self._decode_sparse(SparseCode(F.relu(values), indices))
        return (estimate - residual).pow(2).sum() / residual.pow(2).sum().clamp_min(1e-12)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale the rows of W_dec to unit norm, in place."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).eps)

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take out of W_dec's gradient what would only change row lengths, which the normalisation undoes anyway.

        (Bricken et al. 2023, "Towards Monosemanticity", training details.) It would otherwise leak into Adam's moments.
        """
        if self.W_dec.grad is not None:
            parallel = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad -= parallel * self.W_dec

    def require_features(self, features: FeatureSet, *, allow_mismatch: bool = False) -> None:
        """Refuse features of another extraction or width."""
        require_same_provenance(self.provenance, features.provenance, "This SAE", allow_mismatch=allow_mismatch)
        if features.d_in != self.config.d_in or len(features.row_shape) != 1:
            raise ValueError(
                f"The SAE takes features of width d_in = {self.config.d_in}, got rows of shape "
                f"{tuple(features.row_shape)}. Extract with pooling 'mean', 'max' or 'tokens' from the layer it was "
                "made for."
            )

    def card_text(self, repo_id: str) -> dict[str, Any]:
        """What the model card says of this SAE."""
        config = self.config
        return {
            "title": repo_id.rsplit("/", 1)[-1],
            "summary": f"A k-sparse autoencoder on the activations{self.origin()}: {config.num_latents:,} latents over "
            f"{config.d_in} dimensions, {config.k} active at a time.",
            "usage": "from diffusion_sae import DiffusionFeatureExtractor, KSparseAutoencoder\n\n"
            f'sae = KSparseAutoencoder.from_pretrained("{repo_id}")\n'
            f'extractor = DiffusionFeatureExtractor.from_pretrained("{repo_id}")  # the one it was trained on\n'
            f'features = next(iter(extractor("image.png").values())).reshape(-1, {config.d_in})\n'
            "top_acts, top_indices = sae.encode(features)",
            "pipeline_tag": "image-feature-extraction",
            "tags": ["sparse-autoencoder", "interpretability"],
            "configuration": [
                (k, getattr(config, k)) for k in ("d_in", "num_latents", "expansion_factor", "k", "encoder_init")
            ],
        }
