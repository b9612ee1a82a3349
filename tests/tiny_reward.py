"""Pipelines of the families that have latent reward models, real classes at tiny size; pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flashdmd.emoji.teacher import text_config
from flashdmd.emoji.world import ASSETS

WIDTH, PROJECTED = 32, 24
KINDS = ("sd", "sdxl", "sd3")
PROMPTS = ["a red heart", "a blue whale", "two green apples on a table"]


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ASSETS / "score/tokenizer")


def config(projected: int = WIDTH) -> CLIPTextConfig:
    made = text_config(tokenizer(), WIDTH, layers=2)
    made.projection_dim = projected
    return made


def unet(xl: bool) -> UNet2DConditionModel:
    """The levels and layers of SD 1.5's or SDXL's, so that their down-residuals have its numbers.

    These levels are of widths that tell them apart.
    """
    levels = (
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
        if xl
        else (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    )
    extra: dict[str, Any] = {"cross_attention_dim": WIDTH}
    if xl:
        extra = {
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + PROJECTED,
            "transformer_layers_per_block": [1, 2, 2],
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=tiny.CHANNELS,
        out_channels=tiny.CHANNELS,
        down_block_types=levels,
        up_block_types=tuple(n.replace("Down", "Up") for n in reversed(levels)),
        block_out_channels=(8, 16, 24, 24)[: len(levels)],
        layers_per_block=2,
        attention_head_dim=2,
        norm_num_groups=4,
        **extra,
    )


def seeing_vae() -> AutoencoderKL:
    """The tiny autoencoder with latents as a trained one's: unit variance, nearly no noise."""
    made, rng = tiny.vae(), np.random.default_rng(0)
    pictures = np.stack([np.asarray(picture(x, rng)) for x in np.linspace(0, 1, 16)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = made.encode(images).latent_dist.mean
        std = mean.std((0, 2, 3))
        made.quant_conv.weight[:4] /= std[:, None, None, None]
        made.quant_conv.bias[:4] = (made.quant_conv.bias[:4] - mean.mean((0, 2, 3))) / std
        made.quant_conv.weight[4:] = 0
        made.quant_conv.bias[4:] = -12
    return made


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )


def sd(folder: Path) -> Path:
    StableDiffusionPipeline(
        vae=seeing_vae(),
        text_encoder=CLIPTextModel(config()),
        tokenizer=tokenizer(),
        unet=unet(xl=False),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    StableDiffusionXLPipeline(
        vae=seeing_vae(),
        text_encoder=CLIPTextModel(config()),
        text_encoder_2=CLIPTextModelWithProjection(config(PROJECTED)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(xl=True),
        scheduler=scheduler(),
    ).save_pretrained(folder)
    return folder


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 that tells the letters apart."""
    letters = [(x, -2.0) for x in "abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    made = T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=256)
    widths = {"d_model": 2 * WIDTH + 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(special) + len(letters), **widths)), made


def sd3(folder: Path, with_t5: bool = True) -> Path:
    third, third_tokenizer = t5() if with_t5 else (None, None)
    autoencoder = seeing_vae()
    autoencoder.register_to_config(shift_factor=0.1)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=tiny.CHANNELS,
            out_channels=tiny.CHANNELS,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH + 16,
            caption_projection_dim=32,
            pooled_projection_dim=WIDTH + PROJECTED,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=CLIPTextModelWithProjection(config()),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(config(PROJECTED)),
        tokenizer_2=tokenizer(),
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    ).save_pretrained(folder)
    return folder


def folder_of(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    return {"sd": sd, "sdxl": sdxl, "sd3": sd3}[kind](folder)


def stirred(module: nn.Module) -> nn.Module:
    """`module` with every parameter moved: what is zero or one at the start tells nothing apart."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def residuals(network: UNet2DConditionModel, **call: Any) -> tuple[list[Tensor], Tensor]:
    """The down-residuals of a stock UNet's own forward, in its own order, and the middle's map."""
    seen: list[Tensor] = []
    middle: list[Tensor] = []
    hooks = [
        network.conv_in.register_forward_hook(lambda _, __, out: seen.append(out)),
        network.mid_block.register_forward_hook(lambda _, __, out: middle.append(out)),
    ]
    for block in network.down_blocks:
        hooks.append(block.register_forward_hook(lambda _, __, out: seen.extend(out[1])))
    network(**call)
    for hook in hooks:
        hook.remove()
    return seen, middle[0]


def picture(level: float, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Grey of brightness `level` in 0..1 with a little grain."""
    grain = rng.normal(level * 255, 12, size=(size, size, 3)).clip(0, 255)
    return Image.fromarray(grain.astype(np.uint8))
