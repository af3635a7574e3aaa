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
    """Image → labels with scores, like `image-classification`; broken images are named."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        is_url = isinstance(image, str) and image.startswith(("http://", "https://"))
        if is_url:
            return super().preprocess(image, timeout)
        return self.image_processor(load_image(image))  # type: ignore[misc]
