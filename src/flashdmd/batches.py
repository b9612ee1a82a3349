"""What an iteration consumes: batch n is a function of (seed, n), so resuming needs no cursor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flashdmd.algorithm import Method, Update
from flashdmd.cache import Latents
from flashdmd.data.buckets import time_ids
from flashdmd.data.source import Drawn
from flashdmd.emoji.world import SIZE, World
from flashdmd.models.teacher import Teacher
from flashdmd.sampler import Cond
from flashdmd.seeds import seed_of
from flashdmd.trainer import Batch

Encoder = Callable[[list[str]], Cond]


@runtime_checkable
class Source(Protocol):
    def draw(self, rng: np.random.Generator, n: int, pictures: bool = True) -> Drawn:
        """`n` pictures of one size, if `pictures` are wanted, and what goes with them."""


class EmojiSource:
    """Training pictures of the embedded world, freshly rendered and captioned."""

    def __init__(self) -> None:
        self.world = World()
        self.indices = self.world.indices("train")

    def draw(self, rng: np.random.Generator, n: int, pictures: bool = True) -> Drawn:
        chosen = rng.choice(self.indices, size=n)
        captions = [self.world.caption(i, rng) for i in chosen]
        images = np.stack([self.world.render(i, rng) for i in chosen]) if pictures else None
        whole = np.array([(SIZE, SIZE)] * n)
        return Drawn(images, captions, chosen, (SIZE, SIZE), time_ids(whole, (SIZE, SIZE)))


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
    preferring: int = 32  # the size in preference updates
    rank: int = 0
    prompts: tuple[str, ...] = ()
    reward_encoder: Encoder | None = None
    stage: str = "distill"  # each draws batches of its own
    in_latents: bool = False  # the discriminator judges latents (DMD2), not pictures
    decode: Callable[[Tensor], Tensor] | None = None  # of real latents too; None: the teacher's
    latents: Latents | None = None  # of real pictures, encoded before
    parts: int = 1  # pictures go through the autoencoder in so many parts

    def __call__(self, n: int, updates: tuple[Update, ...]) -> Batch:
        """What these updates of iteration `n` need, and no more."""
        rng = np.random.default_rng(seed_of(self.seed, self.stage, "batch", n, self.rank))
        looks = not {"score", "discriminator"}.isdisjoint(updates)
        size = self.preferring if updates == ("preference",) else self.size
        drawn = self.source.draw(rng, size, pictures=looks and self.latents is None)
        captions, sizes = drawn.captions, torch.from_numpy(drawn.time_ids).float()
        if self.prompts:
            captions = [self.prompts[i] for i in rng.integers(len(self.prompts), size=size)]
            height, width = drawn.shape  # a whole picture of that size, as when it is used
            sizes = torch.tensor([[height, width, 0.0, 0.0, height, width]]).expand(size, 6)
        encode = self.reward_encoder if "preference" in updates else None
        device = self.teacher.device
        return Batch(
            noise=torch.randn(size, *self.teacher.latent_shape_of(*drawn.shape)).to(device),
            cond=self.teacher.encode_prompts(captions, sizes),
            reward_cond={k: v.to(device) for k, v in encode(captions).items()} if encode else {},
            **(self.reals(drawn) if looks else {}),
        )

    @torch.no_grad()
    def reals(self, drawn: Drawn) -> dict[str, Tensor]:
        """What the discriminator compares the student with."""
        device, at_once = self.teacher.device, max(1, len(drawn.captions) // self.parts)
        if drawn.pictures is not None:
            images = as_tensor(drawn.pictures)
            if self.method.real_images == "raw" and not self.in_latents:
                return {"real": images.to(device)}
            latents = torch.cat([self.teacher.encode(chunk) for chunk in images.split(at_once)])
        else:
            assert self.latents is not None
            latents = self.latents(drawn.indices).to(device)
        if self.in_latents:
            return {"real_latents": latents}
        decode = self.decode or self.teacher.decode
        return {"real": torch.cat([decode(z) for z in latents.split(at_once)])}


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return torch.from_numpy(pictures).float() / 127.5 - 1
