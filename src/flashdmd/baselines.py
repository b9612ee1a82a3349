"""DMD2 (arXiv 2405.14867), the method that Flash-DMD is compared with, on the same page.

It differs in four things: distribution matching at every step of the student; a GAN in latent
space, its head on the score estimator's bottleneck; the score estimator trained by both losses at
once; five of its updates a generator update and no coupling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from flashdmd import draws, losses
from flashdmd.algorithm import (
    Loss,
    Method,
    Rollout,
    Stage,
    Update,
    diffusion_loss,
    matching_loss,
    one_each,
    pick,
    watch_latents,
)
from flashdmd.sampler import Cond, Denoiser, Sampler, times
from flashdmd.schedule import STEPS

TTUR = 5
NUMBERS: dict[str, Any] = {  # of a `Method` that are DMD2's own; it matches at every step as well
    "ttur": TTUR,
    "score_coupling": 1.0,
    "renoise": "full",
    "gan_loss_weight": 5e-3,  # of the GAN term in the generator's loss, SDXL
    "gan_gradient_ratio": None,
}
DISCRIMINATOR_WEIGHT = 1e-2  # of the GAN term in the score estimator's loss
Bottleneck = Callable[[Tensor, Tensor, Cond], Tensor]


def dmd2_cycle(method: Method, stage: Stage) -> tuple[tuple[Update, ...], ...]:
    """The generator in the first of `ttur` iterations, score estimator and head in every one."""
    if stage != "distill":
        raise ValueError(f"stage={stage!r}: DMD2 has no reinforcement learning, only 'distill'")
    return (("generator", "score"), *(("score",),) * (method.ttur - 1))


@dataclass
class DMD2:
    method: Method
    sampler: Sampler
    teacher: Denoiser  # guided, frozen
    generator: nn.Module
    score: nn.Module  # with .bottleneck(x_t, t, cond) -> (B, C, H, W) features
    discriminator: nn.Module  # features -> (B, K) logits

    trains: ClassVar[dict[Update, tuple[str, ...]]] = {
        "generator": ("generator",),
        "score": ("score", "discriminator"),
    }

    def __post_init__(self) -> None:
        self.gan_loss_weight = self.method.gan_loss_weight

    def draw_steps(self, rng: torch.Generator) -> tuple[int, int]:
        """(t, t): one step of the student; there is no separate low-noise step."""
        t = pick(self.method.matching_timesteps, rng)
        return t, t

    def rollout(self, noise: Tensor, cond: Cond, t: int, t_hat: int) -> Rollout:
        """x_t <- backward simulation; x_0 <- G(x_t, t), differentiable unless under `no_grad`."""
        with torch.no_grad():
            before = self.sampler.walk(self.generator, noise, cond, stop=t)
        return Rollout(t, t_hat, {t: self.generator(before.end, times(t, noise), cond)}, None)

    def generator_loss(self, samples: Rollout, cond: Cond) -> Loss:
        x0 = samples.x0[samples.t]
        matching = matching_loss(
            self.sampler, self.method, self.teacher, self.score, x0, samples.t, cond
        )
        adversarial = self.gan_loss_weight * losses.logistic_generator(self.logits(x0, cond))
        return Loss(
            {"matching": matching, "adversarial": adversarial},
            watch_latents(x0),
        )

    def score_loss(self, samples: Rollout, cond: Cond, real: Tensor) -> Loss:
        """Diffusion loss on the student's samples plus the GAN loss on latents, `real` and ours."""
        x0 = one_each(torch.stack(list(samples.x0.values())).detach())
        on_real, on_fake = self.logits(real, cond), self.logits(x0, cond)
        logistic = losses.logistic_discriminator(on_real, on_fake)
        return Loss(
            {
                "diffusion": diffusion_loss(self.sampler, self.method, self.score, x0, cond),
                "logistic": DISCRIMINATOR_WEIGHT * logistic,
            },
            {
                "discriminator/real": on_real.detach().mean(),
                "discriminator/fake": on_fake.detach().mean(),
            },
        )

    def couple(self) -> None:
        """DMD2's score estimator never sees the student's weights."""

    def logits(self, x0: Tensor, cond: Cond) -> Tensor:
        """The head's verdict on `x0` at a noise level of its own (diffusion-GAN)."""
        t = draws.integers(1, STEPS, x0).float()
        x_t = self.sampler.process.add_noise(x0, draws.normal(x0), t)
        features = cast(Bottleneck, self.score.bottleneck)(x_t, t, cond)
        logits: Tensor = self.discriminator(features)
        return logits
