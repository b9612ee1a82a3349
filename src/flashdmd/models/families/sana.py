"""Sana: linear attention on latents of a deep autoencoder; Gemma reads an instruction as well."""

import inspect
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline
from torch import Tensor

from flashdmd.errors import UserError
from flashdmd.models.families.base import ATTENTION
from flashdmd.models.families.stable_diffusion_3 import Stretched
from flashdmd.sampler import Cond
from flashdmd.schedule import Process

# what the pipeline puts before a prompt, though not before a negative one
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]


class Sana(Stretched):
    pipelines = ("SanaPipeline",)
    guidance = 4.5  # the pipeline's own default
    lora_layers = ATTENTION
    # else it draws at 1024 pixels what is asked for at 512, and shrinks it
    call: ClassVar[dict[str, Any]] = {"use_resolution_binning": False}

    def process(self, pipeline: Any) -> Process:
        config = pipeline.scheduler.config
        kind = config.get("prediction_type", "flow_prediction")  # flow schedulers know no other
        if kind != "flow_prediction" or not config.get("use_flow_sigmas", True):
            raise UserError(
                f"the teacher's scheduler has prediction_type={kind!r}; a Sana teacher needs "
                "flow_prediction with use_flow_sigmas"
            )
        return super().process(pipeline)

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        return self.read(pipeline, prompts, device, INSTRUCTION.default)

    def unconditional(self, pipeline: Any, device: torch.device) -> Cond:
        return self.read(pipeline, [""], device, None)

    def read(
        self, pipeline: Any, prompts: list[str], device: torch.device, told: list[str] | None
    ) -> Cond:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts, False, device=device, complex_human_instruction=told
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def output(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out: Tensor = network(x_t, timestep=t * network.config.timestep_scale, **cond).sample
        return out[:, : x_t.shape[1]]

    def encode(self, pipeline: Any, images: Tensor) -> Tensor:
        latents: Tensor = pipeline.vae.encode(images).latent.float()
        return latents * pipeline.vae.config.scaling_factor

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        images: Tensor = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return images
