"""A k-sparse autoencoder of diffusion_sae for people who do not have that library: encoding and decoding, no training.

The file stands alone, beside the weights of an artifact that was saved with `export_code=True`:

    AutoModel.from_pretrained("owner/name", trust_remote_code=True)

Method: Revelio (arXiv 2411.16725). Licence: Apache-2.0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

TOP_K = ("topk", "relu_topk", "signed_topk")
ACTIVATIONS = (*TOP_K, "batchtopk", "jumprelu", "relu")
INPUT_NORMS = ("none", "layer_norm")


class KSparseAutoencoderConfig(PreTrainedConfig):
    """Shape of the autoencoder. What only its training needs is kept, and ignored."""

    model_type = "k-sparse-autoencoder"

    d_in: int = 0
    expansion_factor: float | int | None = None
    num_latents: int | None = None
    k: int = 32
    activation: str = "topk"
    matryoshka_sizes: list[int] | None = None
    input_norm: str = "none"
    timesteps: list[int] | None = None
    jumprelu_bandwidth: float | None = None
    encoder_init: str = "tied"
    init_seed: int = 0


@dataclass
class KSparseAutoencoderOutput(ModelOutput):
    """Result of a forward pass."""

    reconstruction: Tensor | None = None
    """(N, d_in)."""
    top_acts: Tensor | None = None
    """(N, k), largest first; free places hold 0."""
    top_indices: Tensor | None = None
    """(N, k)."""
    fvu: Tensor | None = None
    """Fraction of variance unexplained in this batch, Σ‖x − x̂‖² / Σ‖x − x̄‖²."""


class KSparseAutoencoder(PreTrainedModel):
    """z = act(W_encᵀ (x − b_dec) + b_enc),  x̂ = W_decᵀ z + b_dec, with most of z equal to 0."""

    config_class = KSparseAutoencoderConfig
    base_model_prefix = "sae"
    main_input_name = "features"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name, allowed in (("activation", ACTIVATIONS), ("input_norm", INPUT_NORMS)):
            if getattr(config, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}: use diffusion_sae.")
        d_in, num_latents = config.d_in, config.num_latents
        self.W_enc = nn.Parameter(torch.zeros(d_in, num_latents))
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.W_dec = nn.Parameter(torch.zeros(num_latents, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in if config.timesteps is None else (len(config.timesteps), d_in)))
        if config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(num_latents))
        elif config.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))
        if config.timesteps is not None:
            self.register_buffer("timestep_scale", torch.ones(len(config.timesteps)))
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Weights that are missing or unexpected are an error."""
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, use_safetensors=True, **kwargs)
        model, info = loaded
        problems = [f"{kind}: {sorted(info[kind])}" for kind in ("missing_keys", "unexpected_keys") if info[kind]]
        if problems:
            raise ValueError(f"The weights of {name!r} are not those of its config: {', '.join(problems)}.")
        return (model, info) if wants_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file."""

    def _of_timesteps(self, timesteps: Any, rows: int) -> tuple[Tensor, Tensor | None]:
        """b_dec and scale of each row."""
        known = self.config.timesteps
        if known is None:
            if timesteps is not None:
                raise ValueError("timesteps were given, but this SAE has none.")
            return self.b_dec, None
        if timesteps is None:
            raise ValueError(f"This SAE is for several timesteps: give timesteps=, each one of {known}.")
        given = torch.as_tensor(timesteps).expand(rows).tolist()
        if not set(given) <= set(known):
            raise ValueError(f"timesteps must be among {known}, got {sorted(set(given) - set(known))}.")
        index = torch.tensor([known.index(timestep) for timestep in given], device=self.b_dec.device)
        return self.b_dec[index], self.get_buffer("timestep_scale")[index, None]

    def _rows(self, features: Tensor, timesteps: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(x − shift) / scale, b_dec, shift and scale."""
        if features.ndim != 2 or features.shape[1] != self.config.d_in:
            raise ValueError(f"features must have the shape (N, {self.config.d_in}), got {tuple(features.shape)}.")
        features, shift = features.to(self.W_dec.dtype), None
        bias, scale = self._of_timesteps(timesteps, len(features))
        if self.config.input_norm == "layer_norm":
            shift = features.mean(1, keepdim=True)
            features = features - shift
            own = features.pow(2).mean(1, keepdim=True).sqrt() + 1e-5
            scale = own if scale is None else own * scale
        return (features if scale is None else features / scale), bias, shift, scale

    def _code(self, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        pre_acts = torch.addmm(self.b_enc, rows - bias, self.W_enc)
        activation = self.config.activation
        if activation in TOP_K:
            top_acts, top_indices = pre_acts.topk(self.config.k, dim=1)
            return (top_acts if activation == "signed_topk" else top_acts.relu()), top_indices
        threshold = torch.zeros_like(self.b_enc)
        if activation == "jumprelu":
            threshold = self.log_threshold.exp()
        elif activation == "batchtopk":
            threshold = threshold + self.get_buffer("threshold")
        latent_acts = torch.where(pre_acts > threshold.clamp_min(0), pre_acts, 0)
        most = max(1, int((latent_acts > 0).sum(1).max())) if len(rows) else 1
        top_acts, top_indices = latent_acts.topk(most, dim=1)
        return top_acts, torch.where(top_acts > 0, top_indices, 0)

    @torch.no_grad()
    def encode(self, features: Tensor, timesteps: Any = None) -> tuple[Tensor, Tensor]:
        """Active latents of each row: their activations, largest first, and which they are, each (N, k).

        Args:
            features: (N, d_in).
            timesteps: of an SAE over several timesteps: each row's, or one for all.
        """
        rows, bias, _, _ = self._rows(features, timesteps)
        return self._code(rows, bias)

    @torch.no_grad()
    def forward(self, features: Tensor, timesteps: Any = None) -> KSparseAutoencoderOutput:
        """Code and reconstruction of features (N, d_in)."""
        rows, bias, shift, scale = self._rows(features, timesteps)
        top_acts, top_indices = self._code(rows, bias)
        decoded = torch.einsum("nk,nkd->nd", top_acts, self.W_dec[top_indices]) + bias
        decoded = decoded if scale is None else scale * decoded
        reconstruction = decoded if shift is None else shift + decoded
        target = features.to(reconstruction.dtype)
        variance = (target - target.mean(0)).pow(2).sum()
        fvu = (target - reconstruction).pow(2).sum() / variance
        return KSparseAutoencoderOutput(reconstruction, top_acts, top_indices, fvu)
