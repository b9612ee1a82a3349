"""FLUX.2, dev and klein: a token is 2 x 2 places of the autoencoder, whitened."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.models.families.base import JOINT_ATTENTION, Family
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS


class Flux2(Family):
    """A latent's place is a token: four times the autoencoder's channels, twice its pixels.

    dev is told its guidance (one call); klein, which is not, is guided by two.
    """

    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    guidance = 4.0  # the pipelines' own default
    lora_layers = (*JOINT_ATTENTION, "to_qkv_mlp_proj")

    def embeds_guidance(self, pipeline: Any) -> bool:
        return bool(pipeline.transformer.config.guidance_embeds)

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        embeds, _ = pipeline.encode_prompt(prompts, device)
        return {"encoder_hidden_states": embeds}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        words = cond["encoder_hidden_states"]
        out: Tensor = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t / STEPS,
            guidance=cond.get("guidance"),
            encoder_hidden_states=words,
            txt_ids=grid(words, (1, 1, 1, words.shape[1])),
            img_ids=grid(words, (1, x_t.shape[2], x_t.shape[3], 1)),
        ).sample
        return out.transpose(1, 2).reshape(x_t.shape)

    def channels(self, pipeline: Any) -> int:
        return 4 * super().channels(pipeline)

    def factor(self, pipeline: Any) -> int:
        return 2 * super().factor(pipeline)

    def multiple(self, pipeline: Any) -> int:
        return self.factor(pipeline)

    def resolution(self, pipeline: Any) -> int:
        return int(pipeline.default_sample_size * pipeline.vae_scale_factor)

    def encode(self, pipeline: Any, images: Tensor) -> Tensor:
        mean, std = statistics(pipeline.vae)
        latents: Tensor = pipeline.vae.encode(images).latent_dist.mode().float()
        return (F.pixel_unshuffle(latents, 2) - mean) / std

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        mean, std = statistics(pipeline.vae)
        images: Tensor = pipeline.vae.decode(F.pixel_shuffle(latents * std + mean, 2)).sample
        return images

    def check(self, pipeline: Any) -> None:
        super().check(pipeline)
        if pipeline.config.get("is_distilled"):
            raise UserError(
                "model_index.json says is_distilled, so it is a few-step student already; give "
                "the base model that it came from"
            )


def grid(like: Tensor, sides: tuple[int, ...]) -> Tensor:
    """(product of sides, 4): frame, row, column and word of every token."""
    axes = [torch.arange(n, device=like.device) for n in sides]
    return torch.cartesian_prod(*axes)


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of unshuffled latents, each (4 C, 1, 1)."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean[:, None, None], variance.sqrt()[:, None, None]
