"""PixArt-Sigma: a transformer under linear betas that hears T5's words by cross attention."""

from typing import Any, ClassVar

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from flashdmd.models.families.base import ATTENTION, Family
from flashdmd.models.families.stable_diffusion import StableDiffusion
from flashdmd.sampler import Cond

CLEANS = is_bs4_available() and is_ftfy_available()  # captions; so the plain call decides, too
NO_SIZE: dict[str, Any] = {"resolution": None, "aspect_ratio": None}  # those are PixArt-alpha's


class PixArtSigma(StableDiffusion):
    """Stable Diffusion's process and walk, a transformer's inside."""

    pipelines = ("PixArtSigmaPipeline",)
    network = "transformer"
    guidance = 4.5  # the pipeline's own default
    lora_layers = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
    # else it draws at 1024 pixels what is asked for at 512, and shrinks it
    call: ClassVar[dict[str, Any]] = {"use_resolution_binning": False, "clean_caption": CLEANS}

    middle = Family.middle
    feature = Family.feature
    multiple = Family.multiple

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts, False, device=device, clean_caption=CLEANS
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out: Tensor = network(x_t, timestep=t, added_cond_kwargs=NO_SIZE, **cond).sample
        return out[:, : x_t.shape[1]]  # the other half is the variance, which no sampler here asks
