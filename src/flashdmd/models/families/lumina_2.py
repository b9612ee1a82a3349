"""Lumina-Image 2.0: one stream of words and picture, as Gemma reads them; time from noise."""

from typing import Any

import torch
from torch import Tensor, nn

from flashdmd.models.families.base import ATTENTION, Family
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS


class Lumina2(Family):
    """What it says is x_0 - eps; every row of a guided answer is as long as the conditional one."""

    pipelines = ("Lumina2Pipeline",)
    guidance = 4.0  # the pipeline's own default
    lora_layers = (*ATTENTION, "linear_1", "linear_2", "linear_3")
    affine = False

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, False, device=device)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def unconditional(self, pipeline: Any, device: torch.device) -> Cond:
        """Without the system prompt, as the pipeline has it."""
        _, _, embeds, mask = pipeline.encode_prompt([""], True, device=device)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out: Tensor = network(x_t, timestep=1 - t / STEPS, **cond).sample
        return -out

    def middle(self, network: nn.Module) -> nn.Module:
        """The last block of the picture alone: after it, words of any number come before."""
        blocks = network.get_submodule("noise_refiner")
        assert isinstance(blocks, nn.ModuleList)
        return blocks[-1]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        guided = super().guide(unconditional, conditional, scale)
        length = conditional.norm(dim=-1, keepdim=True)
        return guided * length / guided.norm(dim=-1, keepdim=True)
