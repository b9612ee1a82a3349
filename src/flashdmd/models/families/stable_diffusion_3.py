"""Stable Diffusion 3 and 3.5: an MMDiT on straight paths, up to three text encoders."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from flashdmd.models.families.base import Family
from flashdmd.models.families.silent import silent_clip
from flashdmd.models.padding import RepeatLast, compress
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS

LEAST = 1 / STEPS  # the sigma at which the stock grid ends, before it is stretched
CLIPS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


class Stretched(Family):
    """Pipelines that leave the grid to the scheduler: N times down to 1/1000, then shifted."""

    def scheduler(self, pipeline: Any, steps: tuple[int, ...]) -> Any:
        """Shifted by s and stretched to end at the student's last step, the scheduler's own times
        are 1, 1 - 1/N, ..., 1/N shifted by S if
        s / (s - 1) = S N / ((S - 1) (N - 1)), within a quarter of a network time.
        """
        n, wanted = len(steps), self.fitting_shift(steps)
        inverse = (wanted - 1) * (n - 1) / (wanted * n)  # (s - 1) / s
        return FlowMatchEulerDiscreteScheduler(
            shift=1 / (1 - inverse),
            shift_terminal=steps[-1] / STEPS if n > 1 else None,
            stochastic_sampling=True,
        )

    def grid(self, pipeline: Any, scheduler: Any, n: int) -> list[float]:
        scheduler.set_timesteps(n)
        return [float(t) for t in scheduler.timesteps]


class StableDiffusion3(Stretched):
    pipelines = ("StableDiffusion3Pipeline",)
    needs = ("vae", "scheduler")  # any text encoder may be absent
    guidance = 7.0  # RTDMD's for SD3-medium

    def complete(self, pipeline: Any) -> None:
        """CLIP encoders that are absent say nothing: the stock code cannot do without them."""
        absent = [names for names in CLIPS if getattr(pipeline, names[0]) is None]
        if not absent:
            return
        there = [
            getattr(pipeline, e).config.projection_dim for e, _ in CLIPS if (e, _) not in absent
        ]
        rest = int(pipeline.transformer.config.pooled_projection_dim) - sum(there)
        for encoder, tokenizer in absent:
            known = next((t for _, n in CLIPS if (t := getattr(pipeline, n))), None)
            silent, words = silent_clip(rest // len(absent), known)
            pipeline.register_modules(**{encoder: silent, tokenizer: words})
        if absent:
            pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        tokens, copies = compress(embeds)
        repeats = torch.full((len(tokens),), copies, device=device)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled, "repeats": repeats}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out: Tensor = network(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            pooled_projections=cond["pooled_projections"],
        ).sample
        return out

    def context(
        self, network: nn.Module, x_t: Tensor, cond: Cond
    ) -> Callable[[], AbstractContextManager[Any]]:
        """Padding tokens that were put in one count as often as they were."""
        patch = int(network.get_parameter("pos_embed.proj.weight").shape[-1])
        keys = x_t.shape[-2] * x_t.shape[-1] // patch**2 + cond["encoder_hidden_states"].shape[1]
        return partial(RepeatLast, keys, int(cond["repeats"][0]))

    def sample(
        self, pipeline: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float
    ) -> Any:
        """The pipeline's own loop, on prompts whose padding is computed once."""
        cond, nothing = (self.encode_prompts(pipeline, p, noise.device) for p in (prompts, [""]))
        if not torch.equal(cond["repeats"][:1], nothing["repeats"]):  # guidance needs one length
            return super().sample(pipeline, prompts, noise, steps, guidance)
        nothing = {k: v.expand(len(prompts), *v.shape[1:]) for k, v in nothing.items()}
        with self.context(pipeline.transformer, noise, cond)():
            return pipeline(
                prompt_embeds=cond["encoder_hidden_states"],
                pooled_prompt_embeds=cond["pooled_projections"],
                negative_prompt_embeds=nothing["encoder_hidden_states"],
                negative_pooled_prompt_embeds=nothing["pooled_projections"],
                latents=noise,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="np",
            ).images
