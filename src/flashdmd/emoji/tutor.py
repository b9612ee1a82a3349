"""What trained teachers say of a noisy latent, as a target for another: a mean, not one picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashdmd.emoji.fit import fused
from flashdmd.errors import UserError
from flashdmd.models.teacher import load_pipeline
from flashdmd.sampler import Cond, Denoiser
from flashdmd.schedule import STEPS, Process, VariancePreserving, per_example


@dataclass(frozen=True)
class Asked:
    """What a tutor needs of a teacher."""

    process: Process
    denoiser: Denoiser
    encode_prompts: Callable[[list[str]], Cond]


class Tutor:
    """E[x_0 | x_t] of `process`, as frozen teachers of the same latents give it on average.

    One picture is one draw of what x_t may have come from; a mean is a target without that noise.
    Any x_t = alpha x_0 + sigma eps is, divided by alpha + sigma, a point of a straight path at
    s = sigma / (alpha + sigma), and there each teacher is asked at a time of its own. Whole steps
    of a score-based one do that from s = 0.028 to 0.936.
    """

    def __init__(self, teachers: Sequence[Asked], process: Process) -> None:
        self.teachers, self.process = teachers, process
        schedules = [t.process.schedule for t in teachers]
        curved = [s for s in schedules if isinstance(s, VariancePreserving)]
        self.grid = straight(curved[0]) if curved else None  # (STEPS,) where one has steps only

    @classmethod
    def load(
        cls, folders: Sequence[Path], process: Process, latents: tuple[int, int, int]
    ) -> "Tutor | None":
        """Of pipeline folders; of none none. Raises UserError for one of `latents` not these."""
        teachers = [load_pipeline(folder) for folder in folders]
        for teacher in teachers:
            if teacher.latent_shape != latents:
                raise UserError(
                    f"--tutor {teacher.folder}: its latents are {teacher.latent_shape} and those "
                    f"to be learned {latents}; give a teacher on the same autoencoder"
                )
            if teacher.family.kind == "flow":  # 128 latents take 0.25 s then instead of 0.36
                teacher.denoiser.network = fused(teacher.denoiser.network)
        asked = [Asked(t.process, t.denoiser, t.encode_prompts) for t in teachers]
        return cls(asked, process) if asked else None

    def times(self, t: Tensor) -> Tensor:
        """(B,) times of `process`, moved to where every teacher has a step, if there is one near.

        Those of a score-based process are steps already.
        """
        if self.grid is None or isinstance(self.process.schedule, VariancePreserving):
            return t
        return torch.where(self.knows(t), self.grid[nearest(self.grid, t)], t)

    def knows(self, s: Tensor) -> Tensor:
        """(B,) whether every teacher has a step near `s`, in 0..1000 of a straight path."""
        if self.grid is None:
            return torch.ones_like(s, dtype=torch.bool)
        slack = 1e-3  # of a step in a thousand: `s` was multiplied and divided on its way here
        return (s >= self.grid[0] - slack) & (s <= self.grid[-1] + slack)

    @torch.no_grad()
    def __call__(
        self, x_t: Tensor, t: Tensor, x0: Tensor, captions: list[str]
    ) -> tuple[Tensor, Tensor]:
        """(x_0, eps) with x_t = alpha x_0 + sigma eps, at `times`; x_0 is `x0` where none know."""
        alpha, sigma = self.process.at(t, x_t)
        x_s, s = x_t / (alpha + sigma), STEPS * (sigma / (alpha + sigma)).flatten()
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # no gradients: fast
            told = [ask(teacher, x_s, s, captions) for teacher in self.teachers]
        mean = torch.stack(told).mean(0)
        mean = torch.where(per_example(self.knows(s), x_t), mean, x0)
        return mean, (x_t - alpha * mean) / sigma


def ask(teacher: Asked, x_s: Tensor, s: Tensor, captions: list[str]) -> Tensor:
    """What one teacher says of points of straight paths, at its own scale and time."""
    cond, schedule = teacher.encode_prompts(captions), teacher.process.schedule
    if not isinstance(schedule, VariancePreserving):
        return teacher.denoiser(x_s, s, cond)
    i = nearest(straight(schedule), s)
    alpha, sigma = schedule(i)
    return teacher.denoiser(per_example(alpha + sigma, x_s) * x_s, i.float(), cond)


def straight(schedule: VariancePreserving) -> Tensor:
    """(STEPS,) where on a straight path the noise is as strong as at each step, in 0..1000."""
    return STEPS * schedule.sigma / (schedule.alpha + schedule.sigma)


def nearest(grid: Tensor, s: Tensor) -> Tensor:
    """The index of the value of a rising `grid` that is nearest to each `s`."""
    return torch.bucketize(s, (grid[1:] + grid[:-1]) / 2)
