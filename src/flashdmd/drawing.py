"""Something that draws: a pipeline, its steps and its guidance; or a student as it stands."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flashdmd import distributed
from flashdmd.models.denoiser import NetworkDenoiser
from flashdmd.models.teacher import Teacher, to_uint8
from flashdmd.sampler import Sampler
from flashdmd.seeds import seed_of

DRAWN_AT_ONCE = 64  # pictures of 64 pixels; of larger ones as many fewer


@dataclass(frozen=True)
class Arm:
    """A pipeline, its steps and its guidance: something that draws."""

    teacher: Teacher
    steps: int
    guidance: float

    @property
    def nfe(self) -> int:
        """Network calls a picture: two a step under guidance."""
        told = self.teacher.family.embeds_guidance(self.teacher.pipeline)
        return self.steps * (2 if self.guidance > 1 and not told else 1)

    @property
    def at_once(self) -> int:
        return at_once(self.teacher)

    def draw(self, prompts: list[str], seed: int) -> np.ndarray:
        """(N, 3, H, W) uint8; noise i is the same for every arm, and so are later draws.

        Several processes draw a share each, and all get all.
        """

        def some(part: list[str], noise: Tensor) -> np.ndarray:
            return self.teacher.sample(part, noise, self.steps, self.guidance)

        return in_batches(self.teacher, prompts, seed, some)


@dataclass(frozen=True)
class Standing:
    """A student within its run: what the plain call of its folder would draw, without the folder.

    Of a score-based pipeline to the rounding; other pipelines round their times otherwise.
    """

    teacher: Teacher
    student: NetworkDenoiser
    sampler: Sampler

    @property
    def nfe(self) -> int:
        return len(self.sampler.steps)

    @torch.no_grad()
    def draw(self, prompts: list[str], seed: int) -> np.ndarray:
        """(N, 3, H, W) uint8, from the noise of any `Arm`."""
        device, half = self.teacher.device, self.student.dtype == torch.bfloat16

        def some(part: list[str], noise: Tensor) -> np.ndarray:
            cond = self.teacher.encode_prompts(part)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                latents = self.sampler.sample(self.student, noise.to(device), cond)
                return to_uint8(self.teacher.decode(latents))

        shared = distributed.shards(dict(self.student.named_parameters()))
        return in_batches(self.teacher, prompts, seed, some, deals=not shared)


def at_once(teacher: Teacher) -> int:
    """Pictures in a batch."""
    return max(1, DRAWN_AT_ONCE * 64**2 // teacher.image_size**2)


def in_batches(
    teacher: Teacher,
    prompts: list[str],
    seed: int,
    draw: Callable[[list[str], Tensor], np.ndarray],
    deals: bool = True,
) -> np.ndarray:
    """What `draw` makes of some prompts and their noise, for all prompts in order.

    Several processes have the batches dealt out, unless each needs the others to draw.
    """
    images, n = [], at_once(teacher)
    starts = range(0, len(prompts), n)
    mine = distributed.own(starts) if deals else starts
    for start in tqdm(mine, desc="draw", unit="batch", leave=False, delay=10):
        some = prompts[start : start + n]
        torch.manual_seed(seed_of("draw", seed, start))
        images.append(draw(some, teacher.noise(len(some), seed + start)))
    return np.concatenate(distributed.everyones(images) if deals else images)
