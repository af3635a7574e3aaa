"""What all tests share: diffusion pipelines of the real classes made tiny, and images."""

import atexit
import os
import shutil
import tempfile

# before anything imports huggingface_hub, which reads these once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-cache-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.provenance import ExtractorConfig
from tiny_pipelines import CLASS_NAMES, build_dit, build_sd, build_seeded, build_tokenizer, clip_config

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def threads_are_left_as_they_were() -> Generator[None]:
    """With another number of them the last digits are others, and later tests compare bytes."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"torch was left with {left} threads"


@pytest.fixture(scope="session")
def tiny_sd_pipeline() -> StableDiffusionPipeline:
    """Shared by all tests: whoever changes weights works on a copy."""
    return build_seeded(build_sd, 101)


@pytest.fixture(scope="session")
def tiny_dit_pipeline() -> DiTPipeline:
    return build_seeded(build_dit, 102)


@pytest.fixture(scope="session")
def make_sd_extractor(tiny_sd_pipeline: StableDiffusionPipeline) -> Callable[..., DiffusionFeatureExtractor]:
    """`make_sd_extractor(layers=…, timesteps=…, …)` on the shared pipeline, or on the one given as `pipeline`."""
    return partial(_make_extractor, tiny_sd_pipeline)


@pytest.fixture(scope="session")
def make_dit_extractor(tiny_dit_pipeline: DiTPipeline) -> Callable[..., DiffusionFeatureExtractor]:
    return partial(_make_extractor, tiny_dit_pipeline)


def _make_extractor(shared: Any, pipeline: Any = None, **settings: Any) -> DiffusionFeatureExtractor:
    config = ExtractorConfig(model="tiny-test", **settings)
    return DiffusionFeatureExtractor(shared if pipeline is None else pipeline, config)


@pytest.fixture(scope="session")
def tiny_sd_folder(tiny_sd_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd-test"
    tiny_sd_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dit_folder(tiny_dit_pipeline: DiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-dit-test"
    tiny_dit_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Twelve distinct RGB images of 32 × 32: coarse random patterns, so that resizing and JPEG keep them apart."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(pattern).resize((32, 32), Image.Resampling.BICUBIC) for pattern in patterns]


@pytest.fixture(scope="session")
def image_folder(images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as PNG and JPEG files in three class sub-folders of four."""
    folder = tmp_path_factory.mktemp("image-folder")
    for i, image in enumerate(images):
        class_folder = folder / CLASS_NAMES[i // 4]
        class_folder.mkdir(exist_ok=True)
        suffix = ".jpg" if i % 4 == 3 else ".png"
        image.save(class_folder / f"image-{i:02d}{suffix}", quality=95)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP of random weights, saved with its tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer()
    text = clip_config(tokenizer).to_dict()
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"initializer_factor": 8.0}  # else all pictures look alike to random weights
    config = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8}, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 16}
    CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
