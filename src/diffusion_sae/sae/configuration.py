"""KSparseAutoencoderConfig."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .._config import check, check_choice, check_integer, check_number
from ..hub.artifact import ArtifactConfig, refuse_unknown_config_keys

ENCODER_INITS = ("tied", "kaiming")


@strict
class KSparseAutoencoderConfig(ArtifactConfig):
    """Shape of a k-sparse autoencoder.

    Args:
        d_in: width of the features.
        expansion_factor: num_latents / d_in; Revelio uses 64.
        num_latents: number of latents; None: d_in · expansion_factor.
        k: latents that are active at a time; Revelio uses 32.
        encoder_init: `tied`, the encoder starts as the transpose of the unit-norm decoder (Gao et al. 2024, §A.1);
            `kaiming`, both are drawn independently, as in Revelio.
        init_seed: seed of the initial weights; the global random state is not used.
    """

    model_type = "k-sparse-autoencoder"
    required_keys = ("d_in", "num_latents", "k")

    d_in: int
    expansion_factor: float | int | None = None
    num_latents: int | None = None
    k: int = 32
    encoder_init: str = "tied"
    init_seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_config_keys(self, kwargs)
        check_integer("d_in", self.d_in, 1)
        if self.num_latents is None:
            self.expansion_factor = 64 if self.expansion_factor is None else self.expansion_factor
            check_number("expansion_factor", self.expansion_factor, 0, 1_000_000, open_low=True)
            self.num_latents = round(self.d_in * self.expansion_factor)
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
        check_choice("encoder_init", self.encoder_init, ENCODER_INITS)
        check_integer("init_seed", self.init_seed, 0)
        super().__post_init__(**kwargs)
