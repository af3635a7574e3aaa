"""DiffusionImageProcessor: images to pixel_values, as the extraction does it."""

from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend


class DiffusionImageProcessor(PilBackend):
    """Crop, resize, values in [-1, 1]: the extractor's own preprocessing, nothing beside it."""

    model_input_names = ["pixel_values"]  # noqa: RUF012  transformers' own annotation

    def __init__(self, size: int = 512, crop: str = "center", resample: str = "bicubic", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size  # type: ignore[assignment]
        self.crop = crop
        self.resample = resample  # type: ignore[assignment]

    def preprocess(self, images: Any, return_tensors: str = "pt", **_: Any) -> BatchFeature:  # type: ignore[override]
        from .pipeline import preprocess_images

        pixel_values = preprocess_images(images, self.size, crop=self.crop, resample=self.resample)
        # as tensors they are made: to look for what is none takes time at every image
        return BatchFeature({"pixel_values": pixel_values}, None if return_tensors == "pt" else return_tensors)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        return self.preprocess(images, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {"image_processor_type": type(self).__name__, "size": self.size} | {
            "crop": self.crop,
            "resample": self.resample,
        }
