"""Something that draws: a pipeline, its steps and its guidance."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from flashdmd import distributed
from flashdmd.models.teacher import Teacher
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
        """Pictures in a batch."""
        return max(1, DRAWN_AT_ONCE * 64**2 // self.teacher.image_size**2)

    def draw(self, prompts: list[str], seed: int) -> np.ndarray:
        """(N, 3, H, W) uint8; noise i is the same for every arm, and so are later draws.

        Several processes draw a share each, and all get all.
        """
        images = []
        starts = range(0, len(prompts), self.at_once)
        for start in tqdm(
            distributed.own(starts), desc="draw", unit="batch", leave=False, delay=10
        ):
            some = prompts[start : start + self.at_once]
            torch.manual_seed(seed_of("draw", seed, start))
            noise = self.teacher.noise(len(some), seed + start)
            images.append(self.teacher.sample(some, noise, self.steps, self.guidance))
        return np.concatenate(distributed.everyones(images))
