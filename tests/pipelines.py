"""Twins of the supported generators: the real classes with a few thousand random weights, made and saved offline."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prism_ray.models.small_world import build_tokenizer

TEXTS = ["a photo of a small red cat", "a photo of a large blue dog"]


def tokenizer() -> Any:
    return build_tokenizer(TEXTS, max_length=77)


def made(kind: Any, **parts: Any) -> Any:
    """An object of diffusers, which annotates its parts more narrowly than it takes them."""
    return kind(**parts)


def vae(*, shift: float | None = None) -> Any:
    return made(
        AutoencoderKL,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.6,
        shift_factor=shift,
    )


def tiny() -> AutoencoderTiny:
    blocks: dict[str, Any] = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    return AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


def text_config(tokenizer: Any, width: int = 16, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def vp_scheduler(prediction: str = "epsilon") -> Any:
    return made(
        DDIMScheduler,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def unet(**more: Any) -> Any:
    return made(
        UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **{"cross_attention_dim": 16, **more},
    )


def stable_diffusion(prediction: str = "epsilon") -> Any:
    tokens = tokenizer()
    return made(
        StableDiffusionPipeline,
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokens)),
        tokenizer=tokens,
        unet=unet(),
        scheduler=vp_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(prediction: str = "epsilon") -> Any:
    tokens = tokenizer()
    return made(
        StableDiffusionXLPipeline,
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokens, 32, 32)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokens, 32, 32)),
        tokenizer=tokens,
        tokenizer_2=tokenizer(),
        unet=unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
        scheduler=vp_scheduler(prediction),
        add_watermarker=False,
    )


def stable_diffusion_3(prediction: str = "flow_prediction") -> Any:
    assert prediction == "flow_prediction"
    tokens = tokenizer()
    return made(
        StableDiffusion3Pipeline,
        transformer=made(
            SD3Transformer2DModel,
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift=0.06),
        text_encoder=CLIPTextModelWithProjection(text_config(tokens, 32, 32)),
        tokenizer=tokens,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokens, 32, 32)),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def dit(prediction: str = "epsilon") -> Any:
    return made(
        DiTPipeline,
        transformer=made(
            DiTTransformer2DModel,
            sample_size=8,
            num_layers=2,
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        vae=vae(),
        scheduler=vp_scheduler(prediction),
    )


TWINS = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "dit": dit}


def save_twin(kind: str, folder: Path, *, prediction: str | None = None, seed: int = 0, with_tiny: bool = True) -> Path:
    """A twin as a pipeline folder, with a tiny decoder inside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = TWINS[kind](prediction) if prediction else TWINS[kind]()
        decoder = tiny()
    pipe.save_pretrained(folder, safe_serialization=True)
    if with_tiny:
        decoder.save_pretrained(folder / "tiny_decoder", safe_serialization=True)
    return folder
