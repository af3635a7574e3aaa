"""KSparseAutoencoderConfig."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .._config import check, check_choice, check_integer, check_number
from .._row_norms import INPUT_NORMS
from ..hub.artifact import ArtifactConfig, refuse_unknown_config_keys

ENCODER_INITS = ("tied", "kaiming")
TOP_K = ("topk", "relu_topk", "signed_topk")
PENALISED = ("jumprelu", "relu")  # any number of latents may be active in training
ACTIVATIONS = (*TOP_K, "batchtopk", *PENALISED)


@strict
class KSparseAutoencoderConfig(ArtifactConfig):
    """Shape of a k-sparse autoencoder.

    Args:
        d_in: width of the features.
        expansion_factor: num_latents / d_in; Revelio uses 64.
        num_latents: number of latents; None: d_in · expansion_factor.
        k: latents that are active at a time (batchtopk: on average; jumprelu: aimed at; relu: unused); Revelio uses 32.
        activation: which pre-activations become latents: topk, relu_topk, signed_topk, batchtopk, jumprelu or relu; the
            equations are in `diffusion_sae.sae.activations`.
        matryoshka_sizes: sizes of nested dictionaries, rising to num_latents, each of which learns to reconstruct alone
            (Bussmann et al. 2025, arXiv 2503.17547, §3); None: one dictionary.
        input_norm: none, layer_norm, where each row is centred and divided by its standard deviation, and the
            reconstruction is scaled and shifted back, or sample_layer_norm or constant_norm, which other libraries'
            SAEs were trained with (`diffusion_sae._row_norms` has the equations).
        timesteps: timesteps of an SAE over several, each with a b_dec and a scale of its own; None: one for all.
        jumprelu_bandwidth: width of the window in which a JumpReLU's threshold gets a gradient; None: half of the
            threshold, whatever the rows' length (Rajamanoharan et al. 2024 take 0.001, for rows of unit length).
        encoder_init: `tied`, the encoder starts as the transpose of the unit-norm decoder (Gao et al. 2024, §A.1);
            `kaiming`, both are drawn independently, as in Revelio, whose SAE is encoder_init="kaiming" and
            activation="signed_topk" with `SAETrainingArguments.revelio`.
        init_seed: seed of the initial weights; the global random state is not used.
        converted_from: the library, file and SHA-256 that a converted SAE was read from; None: trained here.
    """

    model_type = "k-sparse-autoencoder"
    required_keys = ("d_in", "num_latents", "k")

    d_in: int
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
    converted_from: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_config_keys(self, kwargs)
        check_integer("d_in", self.d_in, 1)
        if self.num_latents is None and self.expansion_factor is None:
            self.expansion_factor = 64
        if self.expansion_factor is not None:
            check_number("expansion_factor", self.expansion_factor, 0, 1_000_000, open_low=True)
        if self.num_latents is None:
            self.num_latents = round(self.d_in * self.expansion_factor)  # type: ignore[operator]
        check_integer("num_latents", self.num_latents, 1)
        if self.expansion_factor is None:
            self.expansion_factor = self.num_latents / self.d_in
        check(
            round(self.d_in * self.expansion_factor) == self.num_latents,
            f"num_latents {self.num_latents} is not d_in {self.d_in} × expansion_factor {self.expansion_factor}; "
            "give one of the two.",
        )
        check_integer("k", self.k, 1)
        check(self.k <= self.num_latents, f"k must be at most num_latents = {self.num_latents}, got k = {self.k}.")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("input_norm", self.input_norm, INPUT_NORMS)
        check(
            self.input_norm != "sample_layer_norm" or self.d_in > 1,
            "input_norm='sample_layer_norm' divides by d_in − 1: it needs d_in > 1, got d_in = 1.",
        )
        if self.jumprelu_bandwidth is not None:
            check_number("jumprelu_bandwidth", self.jumprelu_bandwidth, 0, open_low=True)
        check_choice("encoder_init", self.encoder_init, ENCODER_INITS)
        check_integer("init_seed", self.init_seed, 0)
        self._check_matryoshka()
        if self.timesteps is not None:
            for timestep in self.timesteps:
                check_integer("each of timesteps", timestep, 0, 999)
            rising = len(self.timesteps) > 0 and self.timesteps == sorted(set(self.timesteps))
            check(rising, f"timesteps must be different and rising, got {self.timesteps}.")
        super().__post_init__(**kwargs)

    def record(self) -> dict[str, Any]:
        """The fields above, without what transformers adds."""
        return {name: getattr(self, name) for name in type(self).__annotations__}

    def _check_matryoshka(self) -> None:
        sizes = self.matryoshka_sizes
        if sizes is None:
            return
        rising = len(sizes) > 0 and sizes == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] == self.num_latents
        check(rising, f"matryoshka_sizes must rise from ≥ 1 to num_latents = {self.num_latents}, got {sizes}.")
        check(
            self.activation in (*TOP_K, "batchtopk"),
            f"matryoshka_sizes need a TopK activation ({', '.join(TOP_K)} or batchtopk), got {self.activation!r}.",
        )
