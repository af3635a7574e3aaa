"""Which prompt the denoiser is given for an image."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..provenance import ExtractorConfig
from .images import to_pictures
from .text_image import TextImageModel


class PromptSource:
    """The prompts of a batch by `ExtractorConfig.prompt_from`.

    | prompt_from | prompt of an image |
    |---|---|
    | `config` | `prompt`, the same for all |
    | `class` | `prompt` with its class name in place of `{}` |
    | `image` | its own text |
    | `clip` | that of `prompt_choices` which CLIP scores highest for it (Revelio's `from_CLIP`) |

    `class` tells the model the answer: accuracies on such features say nothing about what it sees in the image.
    """

    def __init__(self, config: ExtractorConfig, device: torch.device) -> None:
        self.config = config
        self.device = device

    @property
    def needs_texts(self) -> bool:
        """Whether a text an image has to be given."""
        return self.config.prompt_from in ("class", "image")

    def __call__(self, pixel_values: Float[Tensor, "B 3 H W"], texts: Sequence[str] | None = None) -> str | list[str]:
        """One prompt for all, or one an image.

        Args:
            pixel_values: the preprocessed images.
            texts: a class name an image for `class`, a prompt an image for `image`, else None.
        """
        kind = self.config.prompt_from
        if self.needs_texts and (texts is None or len(texts) != len(pixel_values)):
            what = "class name" if kind == "class" else "prompt"
            given = "none" if texts is None else str(len(texts))
            raise ValueError(
                f"prompt_from={kind!r} needs a {what} for each image: {len(pixel_values)} images, prompts: {given}."
            )
        if not self.needs_texts and texts is not None:
            raise ValueError(
                f"prompts were given, but prompt_from={kind!r} does not take them. Use 'image' or 'class'."
            )
        if kind == "clip":
            best = self._scores(pixel_values).argmax(1).tolist()
            return [self.config.prompt_choices[i] for i in best]
        if texts is None:
            return self.config.prompt
        return [self.config.prompt.replace("{}", text) if kind == "class" else str(text) for text in texts]

    @cached_property
    def _clip(self) -> tuple[TextImageModel, Float[Tensor, "choices d"]]:
        """The model, and the unit-norm embeddings of the choices."""
        model = TextImageModel.from_pretrained(str(self.config.clip_model), self.device)
        return model, model.embed_texts(self.config.prompt_choices)

    def _scores(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B choices"]:
        """Cosine similarities; CLIP sees the image as the diffusion model does, after crop and resize."""
        model, choices = self._clip
        return model.embed_images(to_pictures(pixel_values)) @ choices.T
