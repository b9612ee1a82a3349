"""Transformer families at tiny size with random weights: real classes, tokenizers built in code."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_export import CHANNELS, SIDE, network, t5, vae
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

WIDTH = 16  # of a text encoder
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, the marks of a chat, and its template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(marks + letters)},
        merges=[],
        extra_special_tokens=marks[1:],
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"]
    letters = [chr(i) for i in range(33, 127)]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(marks + letters)}, merges=[])


def decoder_only(layers: int = 2) -> dict[str, Any]:
    """What a small language model of any make is told."""
    return {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def flow(**more: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**more)


def multistep(**more: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **more)


def pixart() -> PixArtSigmaPipeline:
    """It learned its variance as well, in a second half of its channels."""
    encoder, tokenizer = t5(24)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae(),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=24,
            sample_size=SIDE,
            patch_size=2,
            interpolation_scale=1,
            use_additional_conditions=False,
        ),
        scheduler=multistep(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


def zimage() -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=flow(shift=6.0),
        vae=vae(quant_conv=False),
        text_encoder=Qwen3Model(Qwen3Config(**decoder_only(3))),
        tokenizer=qwen_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=CHANNELS,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[600, 32, 32],
        ),
    )


def qwen() -> QwenImagePipeline:
    text = {
        **decoder_only(),
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    return QwenImagePipeline(
        scheduler=flow(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.4, 0.2, 0.1, 0.3],
            latents_std=[1.3, 0.7, 1.1, 0.9],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def sana() -> SanaPipeline:
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(**decoder_only())),
        vae=AutoencoderDC(
            latent_channels=CHANNELS,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(4, 8, 8),
            decoder_block_out_channels=(4, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.7,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=SIDE,
        ),
        scheduler=multistep(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def whitened() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=4 * SIDE,
    )


def flux2_network(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def flux2() -> Flux2Pipeline:
    """It reads its text encoder after layers 10, 20 and 30.

    A tokenizer stands where dev has a processor, whose class needs torchvision; both answer
    `apply_chat_template` alike.
    """
    marks = ["<pad>", "</s>", "<s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(marks + letters)},
        merges=[],
        unk_token="<pad>",
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=marks[2:],
    )
    words.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{{ part['text'] }}"
        "{% endfor %}{% endfor %}"
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "head_dim": 8,
        "model_type": "pixtral",
    }
    text = {**decoder_only(30), "model_type": "mistral"}
    return Flux2Pipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=whitened(),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(vision_config=vision, text_config=text, image_token_index=3)
        ),
        tokenizer=words,
        transformer=flux2_network(guidance_embeds=True),
    )


def klein() -> Flux2KleinPipeline:
    """It reads its text encoder after layers 9, 18 and 27."""
    return Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=whitened(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**decoder_only(27))),
        tokenizer=qwen_tokenizer(),
        transformer=flux2_network(guidance_embeds=False),
    )


def deep() -> AutoencoderKL:
    """Lumina's pipeline takes it for granted that its autoencoder's places are 8 pixels across."""
    more = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 8, 8, 8),
    }
    made: AutoencoderKL = AutoencoderKL.from_config({**vae(quant_conv=False).config, **more})
    return made


def lumina() -> Lumina2Pipeline:
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(300, 32, 32),
            cap_feat_dim=WIDTH,
        ),
        scheduler=flow(shift=6.0),
        vae=deep(),
        text_encoder=Gemma2Model(Gemma2Config(**decoder_only(3))),
        tokenizer=gemma_tokenizer(),
    )


MAKE = {
    "pixart": pixart,
    "zimage": zimage,
    "qwen": qwen,
    "sana": sana,
    "flux2": flux2,
    "klein": klein,
    "lumina": lumina,
}


def pipeline(kind: str) -> Any:
    """In evaluation mode; every weight is drawn, those that start as zeros or ones as well."""
    torch.manual_seed(0)
    made: Any = MAKE[kind]()
    for part in (network(made), made.vae):
        for p in part.parameters():
            p.data += 0.05 * torch.randn_like(p)
        for name, b in part.named_buffers():
            if name.startswith("bn.running"):
                b += 0.2 * torch.rand_like(b)
    for part in made.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    made.set_progress_bar_config(disable=True)
    return made
