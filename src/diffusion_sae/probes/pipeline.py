"""Where extraction and head meet: `pipeline("diffusion-probe")`."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.pipelines import ImageClassificationPipeline

from ..extraction.extractor import DiffusionFeatureExtractor
from ..extraction.images import load_image, to_pixel_values
from ..extraction.loading import default_device
from ..provenance import ProvenanceMismatchError

if TYPE_CHECKING:
    from .modeling import DiffusionProbe


def extractor_of(probe: "DiffusionProbe") -> DiffusionFeatureExtractor:
    """The extractor that a probe's provenance describes, on the probe's device.

    Raises:
        ValueError: if the probe has no provenance.
        ProvenanceMismatchError: if the base model now has other weights.
    """
    recorded = probe.provenance
    if recorded is None:
        raise ValueError(
            "This probe does not say which extraction it was trained on (it has no extractor_config.json), so that it "
            "cannot take images. Call it with features=…, or train it on a FeatureStore."
        )
    settings = recorded.settings.to_dict()
    device = probe.device if probe.device.type != "meta" else default_device()
    extractor = DiffusionFeatureExtractor.from_pretrained(
        settings.pop("model"), revision=settings.pop("revision"), device=device, **probe.hub_arguments, **settings
    )
    if extractor.provenance.weights != recorded.weights:
        raise ProvenanceMismatchError(
            f"The probe was trained with weights {recorded.weights} of {recorded.model!r}, which now has "
            f"{extractor.provenance.weights}. Load the revision it was trained with."
        )
    return extractor


def preprocess_images(images: Any, size: int, **how: str) -> Tensor:
    """(B, 3, size, size) in [-1, 1]."""
    return to_pixel_values(images, size, **how)


class DiffusionProbePipeline(ImageClassificationPipeline):
    """Image → labels with scores, like `image-classification`; broken images are named.

    For regression the scores are the numbers themselves. A label of an `sae` probe also says what decided:
    `contributions`, the latents that add most to its logit or take most from it, the largest first. The argument
    `contributions` is how many (5; 0 leaves them out).
    """

    def _sanitize_parameters(self, contributions: int | None = None, **given: Any) -> Any:  # type: ignore[override]
        preprocessing, forward, postprocessing = super()._sanitize_parameters(**given)
        if contributions is not None:
            postprocessing["contributions"] = contributions
        return preprocessing, forward, postprocessing

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        is_url = isinstance(image, str) and image.startswith(("http://", "https://"))
        if is_url:
            return super().preprocess(image, timeout)
        return self.image_processor(load_image(image))  # type: ignore[misc]

    def postprocess(self, model_outputs: Any, contributions: int | None = None, **given: Any) -> Any:  # type: ignore[override]
        answers = super().postprocess(model_outputs, **given)
        latent_acts = model_outputs.get("latent_acts")
        if latent_acts is None:
            if contributions:
                raise ValueError("contributions are those of latents, which only an sae probe has: leave them out.")
            return answers
        count = 5 if contributions is None else contributions
        if count:
            by_class = self.model.head.contributions(latent_acts.to(self.model.device))[0].float().cpu()  # type: ignore
            for answer in answers:
                of_class = by_class[self.model.config.label2id[answer["label"]]]  # type: ignore[index]
                answer["contributions"] = self._largest(of_class, latent_acts[0], count)
        return answers

    def _largest(self, of_class: Tensor, latent_acts: Tensor, count: int) -> list[dict[str, Any]]:
        """The latents that are not 0 for a class, by the size of what they add."""
        names = self.model.config.latent_names or {}
        latents = of_class.abs().topk(min(count, len(of_class))).indices.tolist()
        return [
            {
                "latent": latent,
                "name": names.get(str(latent), f"latent {latent}"),
                "activation": latent_acts[latent].item(),
                "contribution": of_class[latent].item(),
            }
            for latent in latents
            if of_class[latent] != 0
        ]
