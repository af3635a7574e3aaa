"""The denoising loss of images: what the model was trained on, at the timesteps and with the noise of an extractor."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .backbone import DiffusionBackbone
from .extractor import DiffusionFeatureExtractor
from .families import family_entry
from .hooks import replaced_activations
from .images import image_id
from .layers import resolve_layer
from .noise import noise_batch
from .reading import texts_of
from .sources import ImageSource


@dataclass(frozen=True)
class EncodedImages:
    """A batch of images on its way into the denoiser."""

    latents: Float[Tensor, "B c ..."]
    ids: list[str]
    prompts: str | list[str]


class Denoising:
    """The denoiser of an extractor, judged by its own training objective.

    The loss of an image at t is the mean over all elements of (prediction − target)², with the target of the model's
    schedule (`NoiseSchedule.target`) and all elements of the same weight. The noise is the extractor's own, which
    depends on (seed, image id, t) alone, so that two losses of an image differ by what was done to the forward alone.
    """

    def __init__(self, extractor: DiffusionFeatureExtractor) -> None:
        """
        Raises:
            ValueError: for vision encoders, and for settings whose activations are not those of one noised forward.
        """
        self.extractor, backbone = extractor, extractor.backbone
        if not isinstance(backbone, DiffusionBackbone):
            raise ValueError(  # noqa: TRY004  the extractor is of the right type, its model is not
                f"{extractor.config.model!r} is a vision encoder, which removes no noise and has no loss."
            )
        config = extractor.config
        given = {"ensemble": config.ensemble != 1, "noise": config.noise != "seeded"}
        given["classifier_free_pair"] = config.classifier_free_pair
        if any(given.values()):
            raise ValueError(
                f"A denoising loss belongs to one forward with noise; the extractor has other "
                f"{', '.join(name for name, is_given in given.items() if is_given)}. Make one with ensemble=1, "
                "noise='seeded' and classifier_free_pair=False."
            )
        self.backbone = backbone
        self._negated = family_entry(backbone.denoiser).negated

    def batches(self, source: ImageSource, batch_size: int) -> Iterator[EncodedImages]:
        """All images in order, preprocessed and encoded."""
        texts = texts_of(self.extractor, source)
        for start in range(0, len(source), batch_size):
            rows = range(start, min(start + batch_size, len(source)))
            pixel_values = self.extractor.preprocess([source.read(i) for i in rows])
            prompts = self.extractor.prompts(pixel_values, None if texts is None else [texts[i] for i in rows])
            ids = [image_id(image) for image in pixel_values]
            yield EncodedImages(self.backbone.encode(pixel_values), ids, prompts)

    def _noisy(self, images: EncodedImages, timestep: int) -> Tensor:
        seed = self.extractor.config.seed
        return self.backbone.add_noise(images.latents, images.ids, seed=seed, timestep=timestep)

    def activations(self, images: EncodedImages, layer: str, timestep: int) -> Tensor:
        """(B, C, h, w) or (B, T, C)."""
        paths = self.backbone.resolve([layer])
        return self.backbone.activations(self._noisy(images, timestep), timestep, paths, images.prompts)[layer]

    @torch.no_grad()
    def losses(self, images: EncodedImages, timestep: int) -> Float[Tensor, " B"]:
        """Loss of each image, in fp32."""
        prediction = self.backbone.predictions(self._noisy(images, timestep), timestep, images.prompts).float()
        target = self.target(images, timestep)
        if prediction.ndim == target.ndim >= 4 and prediction.shape[1] == 2 * target.shape[1]:
            prediction = prediction[:, : target.shape[1]]  # the rest is the learned variance (Nichol & Dhariwal 2021)
        if prediction.shape != target.shape:
            raise ValueError(
                f"{type(self.backbone.denoiser).__name__} puts out {tuple(prediction.shape)} for a target of "
                f"{tuple(target.shape)}: its denoising loss is not known."
            )
        return (prediction - target).square().flatten(1).mean(1)

    def target(self, images: EncodedImages, timestep: int) -> Tensor:
        """What the denoiser should put out, packed as it does, in fp32."""
        latents, seed = images.latents, self.extractor.config.seed
        noise = noise_batch(latents, images.ids, seed=seed, timestep=timestep).to(latents.device)
        target = self.backbone.schedule.target(latents.float(), noise, timestep)
        return self.backbone.latent_space.pack(-target if self._negated else target)

    def replaced(self, layer: str, replace: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
        """See `replaced_activations`."""
        denoiser = self.backbone.denoiser
        path = resolve_layer(denoiser, layer)
        return replaced_activations(denoiser, layer, path, replace, self.backbone.stream)
