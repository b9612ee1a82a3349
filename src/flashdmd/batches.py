"""What an iteration consumes: batch n is a function of (seed, n), so resuming needs no cursor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flashdmd.algorithm import Method
from flashdmd.emoji.world import World
from flashdmd.models.families import Teacher
from flashdmd.sampler import Cond
from flashdmd.seeds import seed_of
from flashdmd.trainer import Batch

Encoder = Callable[[list[str]], Cond]


@runtime_checkable
class Source(Protocol):
    def __call__(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
        """`n` pictures (n, 3, H, W) uint8 and a caption of each."""


class EmojiSource:
    """Training pictures of the embedded world, freshly rendered and captioned."""

    def __init__(self) -> None:
        self.world = World()
        self.indices = self.world.indices("train")

    def __call__(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
        chosen = rng.choice(self.indices, size=n)
        images = np.stack([self.world.render(i, rng) for i in chosen])
        return images, [self.world.caption(i, rng) for i in chosen]


@dataclass(frozen=True)
class Batches:
    """Draws pictures and captions, encodes them with the teacher's own encoders.

    With `prompts`, the student is trained on these and the pictures serve the discriminator alone.
    """

    teacher: Teacher
    source: Source
    method: Method
    size: int
    seed: int
    rank: int = 0
    prompts: tuple[str, ...] = ()
    reward_encoder: Encoder | None = None

    def __call__(self, n: int) -> Batch:
        rng = np.random.default_rng(seed_of(self.seed, "batch", n, self.rank))
        pictures, captions = self.source(rng, self.size)
        if self.prompts:
            captions = [self.prompts[i] for i in rng.integers(len(self.prompts), size=self.size)]
        images = as_tensor(pictures)
        latents = self.teacher.encode(images)
        if self.method.real_images == "decoded":
            with torch.no_grad():
                images = self.teacher.decode(latents)
        return Batch(
            noise=torch.randn_like(latents),
            cond=self.teacher.encode_prompts(captions),
            real=images,
            real_latents=latents,
            reward_cond=self.reward_encoder(captions) if self.reward_encoder else {},
        )


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return torch.from_numpy(pictures).float() / 127.5 - 1
