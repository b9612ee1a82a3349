"""FLUX.1 dev and schnell: double and single stream blocks on packed latents, CLIP and T5."""

from typing import Any

import torch
from torch import Tensor, nn

from flashdmd.models.families.base import Family
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS


class Flux(Family):
    """dev is told its guidance (one call); schnell, which is not, is guided by two."""

    pipelines = ("FluxPipeline",)
    needs = (*Family.needs, "tokenizer_2", "text_encoder_2")
    guidance = 3.5  # dev's own default

    def embeds_guidance(self, pipeline: Any) -> bool:
        return bool(pipeline.transformer.config.guidance_embeds)

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        words = cond["encoder_hidden_states"]
        out: Tensor = network(
            hidden_states=packed(x_t),
            timestep=t / STEPS,
            guidance=cond.get("guidance"),
            pooled_projections=cond["pooled_projections"],
            encoder_hidden_states=words,
            txt_ids=words.new_zeros(words.shape[1], 3),
            img_ids=places(x_t),
        ).sample
        return unpacked(out, x_t)

    def multiple(self, pipeline: Any) -> int:
        return 2 * self.factor(pipeline)

    def pack(self, pipeline: Any, noise: Tensor) -> Tensor:
        return packed(noise)

    def guided_call(self, pipeline: Any, guidance: float, n: int) -> dict[str, Any]:
        if self.embeds_guidance(pipeline):
            return {"guidance_scale": guidance}
        return {"true_cfg_scale": guidance, "negative_prompt": [""] * n}


def packed(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C): every 2 x 2 places become a token."""
    x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (B, C, h/2, 2, w/2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `packed`, to the shape of `like`."""
    _, channels, h, w = like.shape
    x = tokens.unflatten(1, (h // 2, w // 2)).unflatten(3, (channels, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def places(x: Tensor) -> Tensor:
    """(h w / 4, 3): 0, row and column of every token."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    ids = x.new_zeros(h, w, 3)
    ids[..., 1] += torch.arange(h, device=x.device)[:, None]
    ids[..., 2] += torch.arange(w, device=x.device)[None]
    return ids.flatten(0, 1)
