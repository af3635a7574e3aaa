"""Diffusion pipelines of the real classes made tiny, with random weights from a seed: one of each family."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_tiny_diffusion

SCHEDULE = train_tiny_diffusion.SCHEDULE  # Stable Diffusion's
CLASS_NAMES = ("bag", "dress", "shoe")
SIZE = 32
"""Image size of all of them; sixteen latent positions a side or fewer."""


def build_vae(stride: int = 4, **config: Any) -> AutoencoderKL:
    """32 px images to latents of 8 × 8; the factor brings its latents near unit variance.

    Some pipelines count on the stride 8 of the published autoencoders.
    """
    widths = {4: (8, 8, 16), 8: (8, 8, 16, 16)}[stride]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
        **{"scaling_factor": 4.0} | config,
    )


def build_tokenizer() -> CLIPTokenizer:
    """The training script's, with a vocabulary of a few captions."""
    return train_tiny_diffusion.build_tokenizer([f"a photo of a {name}" for name in CLASS_NAMES], length=12)


def byte_tokenizer(length: int = 64, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A token a byte, with padding and end marks: stands for the tokenizers of T5, Gemma, GLM and Qwen."""
    marks = ["<pad>", "</s>", "<unk>", "<bos>"]
    vocabulary = {token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(zip(("pad_token", "eos_token", "unk_token", "bos_token"), marks, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, padding_side=padding_side, **names
    )


VOCABULARY = 260  # of byte_tokenizer


def clip_config(tokenizer: CLIPTokenizer, **config: Any) -> CLIPTextConfig:
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**sizes | config)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(clip_config(tokenizer))


def build_t5(width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2))


def build_umt5(width: int = 16) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=VOCABULARY, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    )


def decoder_config(kind: Any, **config: Any) -> Any:
    """Of a small language model that serves as text encoder."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 3,
    }
    return kind(**sizes | config)


def build_unet(**config: Any) -> UNet2DConditionModel:
    sizes = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 24),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,  # groups of few values amplify rounding where the grid is 1 × 1
    }
    return UNet2DConditionModel(**sizes | config)


def build_sd(scheduler: Any = None, **unet: Any) -> diffusers.StableDiffusionPipeline:
    tokenizer = build_tokenizer()
    unet_model = build_unet(**unet)
    return diffusers.StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet_model,
        scheduler=scheduler or DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd2() -> diffusers.StableDiffusionPipeline:
    """v-prediction, linear projections, as Stable Diffusion 2.1."""
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")
    return build_sd(scheduler, use_linear_projection=True, attention_head_dim=(1, 2, 2, 3))


def build_sdxl(scheduler: Any = None, **vae: Any) -> diffusers.StableDiffusionXLPipeline:
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 3),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=build_vae(**vae),
        text_encoder=build_text_encoder(tokenizer),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler
        or EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
        add_watermarker=False,
    )


def build_playground() -> diffusers.StableDiffusionXLPipeline:
    """SDXL's architecture with EDM's noise and latents normalised by channel, as Playground 2.5."""
    latents = {"latents_mean": [-1.6, 1.1, 3.5, -0.8], "latents_std": [8.4, 6.0, 5.6, 4.6], "scaling_factor": 0.5}
    return build_sdxl(EDMEulerScheduler(sigma_max=80.0, sigma_min=0.002, sigma_data=0.5), **latents)


def build_dit() -> diffusers.DiTPipeline:
    transformer = diffusers.DiTTransformer2DModel(
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
    vae = build_vae()
    return diffusers.DiTPipeline(transformer, vae, DDIMScheduler(**SCHEDULE), id2label=dict(enumerate(CLASS_NAMES)))


def build_pixart(pipeline: Any = diffusers.PixArtAlphaPipeline) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return pipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=build_t5(),
        vae=build_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def build_pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    return build_pixart(diffusers.PixArtSigmaPipeline)


def build_sd3() -> diffusers.StableDiffusion3Pipeline:
    tokenizer = build_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        dual_attention_layers=(0,),  # as SD 3.5 medium
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=build_t5(32),
        tokenizer_3=byte_tokenizer(),
    )


def build_flux(guidance: bool = True) -> diffusers.FluxPipeline:
    tokenizer = build_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=build_vae(shift_factor=0.1),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_t5(),
        tokenizer_2=byte_tokenizer(),
        transformer=transformer,
    )


def build_flux_schnell() -> diffusers.FluxPipeline:
    return build_flux(guidance=False)


def build_ddpm() -> diffusers.DDPMPipeline:
    unet = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return diffusers.DDPMPipeline(unet, DDPMScheduler())


def build_ldm() -> diffusers.LDMPipeline:
    vqvae = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=16,
    )
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return diffusers.LDMPipeline(vqvae, unet, DDIMScheduler(**SCHEDULE))


def build_sana() -> diffusers.SanaPipeline:
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=16,
    )
    return diffusers.SanaPipeline(
        tokenizer=byte_tokenizer(400, padding_side="right"),
        text_encoder=Gemma2Model(decoder_config(Gemma2Config)),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def build_lumina2() -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 128, 128),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_vae(8, shift_factor=0.1),
        text_encoder=Gemma2Model(decoder_config(Gemma2Config)),
        tokenizer=byte_tokenizer(256),
    )


def build_hunyuan_dit() -> diffusers.HunyuanDiTPipeline:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=4,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=4,
        hidden_size=24,
        activation_fn="gelu-approximate",
        text_len=77,
        text_len_t5=256,
        use_style_cond_and_image_meta_size=True,
    )
    bert = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        max_position_embeddings=96,
    )
    return diffusers.HunyuanDiTPipeline(
        vae=build_vae(8),
        text_encoder=BertModel(bert),
        tokenizer=byte_tokenizer(77),
        transformer=transformer,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=build_t5(),
        tokenizer_2=byte_tokenizer(256),
    )


def build_aura_flow() -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=build_umt5(),
        vae=build_vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def build_cogview4() -> diffusers.CogView4Pipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=4,
    )
    return diffusers.CogView4Pipeline(
        tokenizer=byte_tokenizer(64, padding_side="left"),
        text_encoder=GlmModel(decoder_config(GlmConfig)),
        vae=build_vae(8),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )


def build_wan() -> diffusers.WanPipeline:
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=build_umt5(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


def build_qwen_image() -> diffusers.QwenImagePipeline:
    vae = AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=sizes, vision_config=vision))
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=byte_tokenizer(1024),
        transformer=transformer,
    )


def build_sd_pndm() -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.x as it is published: with PNDM."""
    return build_sd(PNDMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "clip_sample"}, skip_prk_steps=True))


BUILDERS: dict[str, Callable[[], Any]] = {
    "Stable Diffusion 1.x": build_sd_pndm,
    "Stable Diffusion 2.x (v-prediction)": build_sd2,
    "SDXL, SDXL-Turbo": build_sdxl,
    "Playground 2.5 (EDM)": build_playground,
    "DiT": build_dit,
    "PixArt-α": build_pixart,
    "PixArt-Σ": build_pixart_sigma,
    "Stable Diffusion 3, 3.5": build_sd3,
    "Flux dev": build_flux,
    "Flux schnell": build_flux_schnell,
    "DDPM": build_ddpm,
    "Unconditional latent diffusion": build_ldm,
    "Sana": build_sana,
    "Lumina 2": build_lumina2,
    "HunyuanDiT": build_hunyuan_dit,
    "AuraFlow": build_aura_flow,
    "CogView 4": build_cogview4,
    "Wan (one frame)": build_wan,
    "Qwen-Image": build_qwen_image,
}


def build_seeded(builder: Callable[[], Any], seed: int = 101) -> Any:
    """A pipeline with random weights from a seed, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder()
