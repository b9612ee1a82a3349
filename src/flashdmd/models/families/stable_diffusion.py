"""Stable Diffusion 1.x and 2.x, and SDXL: a UNet under scaled-linear betas, CLIP for the words."""

import inspect
from typing import Any, ClassVar, Literal

import torch
from diffusers import LCMScheduler
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.models.families.base import ATTENTION, Family, number
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS, Kind, Process, VariancePreserving

# Any multiple of the number of steps gives LCMScheduler the grid 999, 999 - 1000/n, ...; with 40
# students of 1, 2, 4 and 8 steps are all right. Its default of 50 gives 999, 759, 499, 259.
ORIGINAL_INFERENCE_STEPS = 40
KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
POWERS = {"scaled_linear": 0.5, "linear": 1.0}  # of the betas, which rises evenly


class StableDiffusion(Family):
    pipelines = ("StableDiffusionPipeline",)
    kind: ClassVar[Literal["score", "flow"]] = "score"
    network = "unet"
    guidance = 1.75  # DMD2's for SD 1.5
    lora_layers: ClassVar[tuple[str, ...]] = (  # DMD2's for SDXL
        *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "time_emb_proj",
        "downsamplers.0.conv", "upsamplers.0.conv",
    )  # fmt: skip

    def process(self, pipeline: Any) -> Process:
        config = pipeline.scheduler.config
        if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
            raise UserError(
                "the teacher's scheduler has trained_betas or rescale_betas_zero_snr; only plain "
                f"betas are supported: {', '.join(POWERS)}"
            )
        betas, steps = config.get("beta_schedule"), config.get("num_train_timesteps")
        if betas not in POWERS or steps != STEPS:
            raise UserError(
                f"the teacher's scheduler has beta_schedule={betas!r} over {steps} steps; "
                f"supported are {' and '.join(POWERS)} over {STEPS}"
            )
        if config.prediction_type not in KINDS:
            raise UserError(
                f"the teacher's scheduler has prediction_type={config.prediction_type!r}; "
                f"supported are {', '.join(KINDS)}"
            )
        ends, spacing = (config.beta_start, config.beta_end), config.get("timestep_spacing")
        if not all(number(beta) and 0 < beta < 1 for beta in ends):
            raise UserError(
                f"the teacher's scheduler has beta_start={ends[0]!r} and beta_end={ends[1]!r}; "
                "accepted are numbers between 0 and 1"
            )
        if spacing not in (None, "leading", "trailing", "linspace"):
            raise UserError(
                f"the teacher's scheduler has timestep_spacing={spacing!r}; supported are leading, "
                "trailing and linspace"
            )
        schedule = VariancePreserving(config.beta_start, config.beta_end, POWERS[betas])
        return Process(schedule, KINDS[config.prediction_type])

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        embeds, _ = pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": embeds}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out: Tensor = network(x_t, t, **cond).sample
        return out

    def middle(self, network: nn.Module) -> nn.Module:
        return network.get_submodule("mid_block")

    def feature(self, answer: Any, x_t: Tensor, network: nn.Module) -> Tensor:
        feature: Tensor = answer
        return feature

    def multiple(self, pipeline: Any) -> int:
        """The UNet halves the latent between its levels."""
        return self.factor(pipeline) * 2 ** (len(pipeline.unet.config.down_block_types) - 1)

    def steps(self, pipeline: Any) -> tuple[int, ...]:
        return (999, 749, 499, 249)

    def scheduler(self, pipeline: Any, steps: tuple[int, ...]) -> Any:
        known = inspect.signature(LCMScheduler.__init__).parameters
        shared = {k: v for k, v in pipeline.scheduler.config.items() if k in known}
        ours = {
            "original_inference_steps": ORIGINAL_INFERENCE_STEPS,
            "timestep_spacing": "leading",
            "clip_sample": False,
            "set_alpha_to_one": True,  # the last step returns x_0
        }
        return LCMScheduler(**(shared | ours))

    def grid(self, pipeline: Any, scheduler: Any, n: int) -> list[float]:
        scheduler.set_timesteps(n)
        return [float(t) for t in scheduler.timesteps]


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, and it is told the pictures' size; it is guided away from zeros."""

    pipelines = ("StableDiffusionXLPipeline",)
    needs = (*StableDiffusion.needs, "tokenizer_2", "text_encoder_2")
    guidance = 8.0  # DMD2's

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def unconditional(self, pipeline: Any, device: torch.device) -> Cond:
        empty = self.encode_prompts(pipeline, [""], device)
        if not pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return {name: torch.zeros_like(value) for name, value in empty.items()}

    def sized(self, pipeline: Any, sizes: Tensor) -> Cond:
        return {"time_ids": sizes}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        added = {name: cond[name] for name in ("text_embeds", "time_ids")}
        out: Tensor = network(
            x_t, t, encoder_hidden_states=cond["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
        return out

    def check(self, pipeline: Any) -> None:
        super().check(pipeline)
        if pipeline.unet.config.get("time_cond_proj_dim") is not None:
            raise UserError(
                "the unet has time_cond_proj_dim, so it is a consistency model that was distilled "
                "already; give the model that it came from"
            )
