"""The embedded kinds of teacher at tiny size with random weights: real classes, saved folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd.emoji.teacher import text_config
from flashdmd.emoji.world import ASSETS
from flashdmd.models.families.silent import silent_t5

WIDTH = 32
CHANNELS = 4


def vae() -> AutoencoderKL:
    """64 px -> 4 x 8 x 8, with a scale and a shift that must not be forgotten."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.7,
        shift_factor=None,
    )


def score_folder(folder: Path, prediction_type: str = "v_prediction") -> Path:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "score/tokenizer")
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer, WIDTH, layers=1)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def flow_folder(folder: Path, t5: bool = True) -> Path:
    third, third_tokenizer = silent_t5(2 * WIDTH) if t5 else (None, None)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "score/tokenizer")
    encoder = text_config(tokenizer, WIDTH, layers=1)
    autoencoder = vae()
    autoencoder.register_to_config(shift_factor=0.1)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=CLIPTextModelWithProjection(encoder),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(encoder),
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    ).save_pretrained(folder)
    return folder
