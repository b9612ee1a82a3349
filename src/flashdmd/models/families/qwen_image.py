"""Qwen-Image: double stream blocks on packed latents, words of a vision language model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdmd.models.families.base import JOINT_ATTENTION, Family
from flashdmd.models.families.flux import packed, unpacked
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS

WORDS = 512  # tokens of a prompt, the pipeline's default
NOTHING = " "  # the negative prompt that its authors give where nothing is to be avoided


class QwenImage(Family):
    """Every token of a guided answer is as long as that of the conditional one."""

    pipelines = ("QwenImagePipeline",)
    guidance = 4.0  # the pipeline's own default
    lora_layers = (*JOINT_ATTENTION, "net.0.proj", "net.2")
    affine = False

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        words, mask = pipeline.encode_prompt(prompts, device, max_sequence_length=WORDS)
        if mask is None:  # all are of one length
            mask = torch.ones(words.shape[:2], dtype=torch.long, device=device)
        rest = WORDS - words.shape[1]
        return {
            "encoder_hidden_states": F.pad(words, (0, 0, 0, rest)),
            "encoder_hidden_states_mask": F.pad(mask, (0, rest)),
        }

    def unconditional(self, pipeline: Any, device: torch.device) -> Cond:
        return self.encode_prompts(pipeline, [NOTHING], device)

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        shape = (1, x_t.shape[2] // 2, x_t.shape[3] // 2)  # frames, rows, columns
        out: Tensor = network(
            packed(x_t), timestep=t / STEPS, img_shapes=[[shape]] * len(x_t), **cond
        ).sample
        return unpacked(out, x_t)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        guided = packed(super().guide(unconditional, conditional, scale))
        length = packed(conditional).norm(dim=-1, keepdim=True)
        return unpacked(guided * length / guided.norm(dim=-1, keepdim=True), conditional)

    def channels(self, pipeline: Any) -> int:
        return int(pipeline.vae.config.z_dim)

    def multiple(self, pipeline: Any) -> int:
        return 2 * self.factor(pipeline)

    def encode(self, pipeline: Any, images: Tensor) -> Tensor:
        mean, std = statistics(pipeline.vae, images)
        latents: Tensor = pipeline.vae.encode(images.unsqueeze(2)).latent_dist.mode().float()
        return (latents.squeeze(2) - mean) / std

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        mean, std = statistics(pipeline.vae, latents)
        images: Tensor = pipeline.vae.decode((latents * std + mean).unsqueeze(2)).sample
        return images[:, :, 0]

    def pack(self, pipeline: Any, noise: Tensor) -> Tensor:
        return packed(noise)

    def guided_call(self, pipeline: Any, guidance: float, n: int) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": [NOTHING] * n}


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents, each (C, 1, 1)."""
    both = vae.config.latents_mean, vae.config.latents_std
    mean, std = (like.new_tensor(numbers)[:, None, None] for numbers in both)
    return mean, std
