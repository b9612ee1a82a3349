"""The four kinds of pipeline that are exported, real classes at tiny size with random weights.

Text encoders of one pipeline have different widths: diffusers tells them apart by that.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flashdmd.emoji.world import ASSETS

SIDE = 8  # latent places across
CHANNELS = 4
L, G = 16, 24  # widths of the two CLIP encoders
KINDS = ("sd1", "sd2", "sdxl", "sd3", "flux")
ALSO = ("sd3-no-t5", "schnell")


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ASSETS / "score/tokenizer")


def clip(width: int, projected: bool = False) -> Any:
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    words = tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    words += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config), T5Tokenizer(vocab=words, extra_ids=0, model_max_length=16)


def vae(quant_conv: bool = True) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=4 * SIDE,
        scaling_factor=0.7,
        shift_factor=None if quant_conv else 0.1,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )


def unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=2,
        norm_num_groups=4,
        **{
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "block_out_channels": (8, 16, 16),
            **more,
        },
    )


def betas() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd1(**more: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(L),
        tokenizer=tokenizer(),
        unet=unet(cross_attention_dim=L, **more),
        scheduler=betas(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2() -> StableDiffusionPipeline:
    return sd1(use_linear_projection=True)


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(L),
        text_encoder_2=clip(G, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            cross_attention_dim=L + G,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 1),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + G,
        ),
        scheduler=betas(),
    )


def sd3() -> StableDiffusion3Pipeline:
    """Medium 3.5's oddity, a second attention in some blocks; 64 units a layer, as ComfyUI has."""
    third, third_tokenizer = t5(48)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=128,
            pooled_projection_dim=L + G,
            pos_embed_max_size=SIDE,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(quant_conv=False),
        text_encoder=clip(L, projected=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(G, projected=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    )
    nn.init.eye_(pipeline.text_encoder.text_projection.weight)  # as Stable Diffusion 3 has it
    return pipeline


def flux(guidance: bool = True) -> FluxPipeline:
    second, second_tokenizer = t5(24)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=L,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae(quant_conv=False),
        text_encoder=clip(L),
        tokenizer=tokenizer(),
        text_encoder_2=second,
        tokenizer_2=second_tokenizer,
    )


def without(made: StableDiffusion3Pipeline, *numbers: str) -> StableDiffusion3Pipeline:
    """An SD3 that lacks some of its text encoders."""
    for number in numbers:
        ending = "" if number == "1" else f"_{number}"
        made.register_modules(**{f"text_encoder{ending}": None, f"tokenizer{ending}": None})
    return made


def pipeline(kind: str) -> Any:
    """In evaluation mode; every weight is drawn, those that start as zeros or ones as well."""
    torch.manual_seed(0)
    makers: dict[str, Any] = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux}
    makers |= {"sd3-no-t5": lambda: without(sd3(), "3"), "schnell": lambda: flux(guidance=False)}
    made: Any = makers[kind]()
    for part in (network(made), made.vae):
        for p in part.parameters():
            p.data += 0.05 * torch.randn_like(p)
    for part in made.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    made.set_progress_bar_config(disable=True)
    return made


def network(made: Any) -> nn.Module:
    return getattr(made, component(made))


def component(made: Any) -> str:
    return "unet" if hasattr(made, "unet") else "transformer"


def parts(made: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of all its networks."""
    found = {k: v for k, v in made.components.items() if isinstance(v, nn.Module)}
    return {k: v.state_dict() for k, v in found.items()}


def layers(of: nn.Module) -> dict[str, nn.Module]:
    """What LoRA can move, by name."""
    return {k: v for k, v in of.named_modules() if isinstance(v, nn.Linear | nn.Conv2d)}


def adapter(of: nn.Module, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA of every layer, drawn large enough to change a picture."""
    drawn = {}
    for name, layer in layers(of).items():
        out, into, *kernel = layer.weight.shape
        drawn[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, into, *kernel)
        drawn[f"{name}.lora_B.weight"] = 0.1 * torch.randn(out, rank, *(1 for _ in kernel))
    return drawn


def picture(made: Any) -> torch.Tensor:
    """(1, 3, H, W) in 0..1, of two steps from the same noise whenever it is called."""
    how: dict[str, Any] = {"max_sequence_length": 16} if hasattr(made, "transformer") else {}
    return made(
        "fluent emoji of a strawberry",
        height=4 * SIDE,
        width=4 * SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **how,
    ).images
