"""The table of families: the few facts about a denoiser that its pipeline and its shapes do not tell.

A family that is not listed works if it needs none of these. Where one is needed and unknown an error says which line to
add, and nothing is guessed.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How to read and call one kind of denoiser."""

    text_in_sequence: str | None = None
    """Where blocks that work on one sequence of text and image tokens have the text: first or last."""
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call that switch off what has no meaning for a given image."""
    padded_text: bool = True
    """False if the blocks drop the padding, so that images with texts of other lengths cannot share a batch."""
    negated: bool = False
    """True if the pipeline turns the sign of what the denoiser puts out: the velocity points from noise to data."""


# by class of the denoiser
FAMILIES = {
    "PixArtTransformer2DModel": Family(call={"use_resolution_binning": False}),
    "HunyuanDiT2DModel": Family(call={"use_resolution_binning": False}),
    "SanaTransformer2DModel": Family(call={"use_resolution_binning": False}),
    "FluxTransformer2DModel": Family(text_in_sequence="first"),
    "ChromaTransformer2DModel": Family(text_in_sequence="first"),
    "AuraFlowTransformer2DModel": Family(text_in_sequence="first"),
    "Lumina2Transformer2DModel": Family(text_in_sequence="first", padded_text=False, negated=True),
    "LuminaNextDiT2DModel": Family(negated=True),
    "HiDreamImageTransformer2DModel": Family(negated=True),
    "NucleusMoEImageTransformer2DModel": Family(negated=True),
    "ZImageTransformer2DModel": Family(negated=True),
}

# Canonical names by module path, in the order of the forward pass.
CANONICAL = (
    (r"down_blocks\.(\d+)", "down_ft{}"),
    (r"mid_block", "bottleneck"),
    (r"up_blocks\.(\d+)", "up_ft{}"),
    (r"(?:joint_)?transformer_blocks\.(\d+)", "block{}"),
    (r"blocks\.(\d+)", "block{}"),  # HunyuanDiT, Wan
    (r"(?:encoder\.|model\.)?layers?\.(\d+)", "block{}"),  # Lumina 2, vision encoders
    (r"single_transformer_blocks\.(\d+)", "single_block{}"),
)


def denoiser_name(pipeline: object) -> str:
    """Which component of a pipeline removes the noise."""
    for name in ("unet", "transformer"):
        if getattr(pipeline, name, None) is not None:
            return name
    raise ValueError(f"{type(pipeline).__name__} is not supported: it has no denoiser named `unet` or `transformer`.")


def family_entry(denoiser: object) -> Family:
    return FAMILIES.get(type(denoiser).__name__, Family())
