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

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.provenance import ExtractorConfig

torch.set_num_threads(1)

CLASS_NAMES = ("bag", "dress", "shoe")
# Stable Diffusion's
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_vae() -> AutoencoderKL:
    """32 px images to latents of 8 × 8; the factor brings its latents near unit variance."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=4.0,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with a vocabulary learned from a few captions; any other text still encodes, byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"a photo of a {name}" for name in CLASS_NAMES], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=12)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_sd_pipeline(seed: int = 101) -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 24),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,  # groups of few values amplify rounding where the grid is 1 × 1
        )
        return StableDiffusionPipeline(
            vae=build_vae(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def build_dit_pipeline(seed: int = 102) -> DiTPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
        return DiTPipeline(transformer, build_vae(), DDIMScheduler(**SCHEDULE), id2label=dict(enumerate(CLASS_NAMES)))


@pytest.fixture(scope="session")
def tiny_sd_pipeline() -> StableDiffusionPipeline:
    """Shared by all tests: whoever changes weights works on a copy."""
    return build_sd_pipeline()


@pytest.fixture(scope="session")
def tiny_dit_pipeline() -> DiTPipeline:
    return build_dit_pipeline()


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
