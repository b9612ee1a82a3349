"""What an iteration consumes: batch n is a function of (seed, stage, n); resuming needs no cursor.

Every process of a run draws the same batch, and opens and encodes its own rows of it alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flashdmd import draws
from flashdmd.algorithm import Method, Update
from flashdmd.cache import Latents
from flashdmd.data.buckets import time_ids
from flashdmd.data.catalogue import THREADS
from flashdmd.data.source import ALL, Drawn, PictureSource
from flashdmd.data.workers import Workers
from flashdmd.emoji.world import SIZE, World
from flashdmd.models.teacher import Teacher
from flashdmd.sampler import Cond
from flashdmd.seeds import seed_of
from flashdmd.trainer import Batch

Encoder = Callable[[list[str]], Cond]


@runtime_checkable
class Source(Protocol):
    @property
    def pixels(self) -> int:
        """Of its largest pictures."""

    def draw(
        self, rng: np.random.Generator, n: int, pictures: bool = True, rows: slice = ALL
    ) -> Drawn:
        """`n` pictures of one size, if `pictures` are wanted, and what goes with them; of these
        the `rows`. Whichever they are, `rng` is left the same.
        """


class EmojiSource:
    """Training pictures of the embedded world, freshly rendered and captioned."""

    pixels = SIZE**2

    def __init__(self) -> None:
        self.world = World()
        self.indices = self.world.indices("train")

    def draw(
        self, rng: np.random.Generator, n: int, pictures: bool = True, rows: slice = ALL
    ) -> Drawn:
        chosen = rng.choice(self.indices, size=n)
        captions = [self.world.caption(i, rng) for i in chosen]
        images = np.stack([self.world.render(i, rng) for i in chosen])[rows] if pictures else None
        ids = time_ids(np.array([(SIZE, SIZE)] * n), (SIZE, SIZE))
        return Drawn(images, captions[rows], chosen[rows], (SIZE, SIZE), ids[rows])


@dataclass(frozen=True)
class Batches:
    """Draws pictures and captions, encodes them with the teacher's own encoders.

    With `prompts`, the student is trained on these and the pictures serve the discriminator alone.
    """

    teacher: Teacher
    source: Source
    method: Method
    size: int  # of all processes together
    seed: int
    preferring: int = 32  # the size in preference updates, of all together
    rank: int = 0  # which rows are this process's
    ranks: int = 1
    prompts: tuple[str, ...] = ()
    reward_encoder: Encoder | None = None
    stage: str = "distill"  # each draws batches of its own
    in_latents: bool = False  # the discriminator judges latents (DMD2), not pictures
    decode: Callable[[Tensor], Tensor] | None = None  # of real latents too; None: the teacher's
    latents: Latents | None = None  # of real pictures, encoded before
    parts: int = 1  # pictures go through the autoencoder in so many parts
    order: tuple[tuple[Update, ...], ...] = ()  # of iterations, in turn; workers have to know
    workers: int = 0  # processes that draw ahead

    def __call__(self, n: int, updates: tuple[Update, ...]) -> Batch:
        """What these updates of iteration `n` need, and no more: this process's rows."""
        drawn = self.taken(n, updates) if self.workers else self.drawn(n, updates)
        looks, share = looking(updates), self.share(updates)
        noise = torch.randn(share * self.ranks, *self.teacher.latent_shape_of(*drawn.shape))
        encode = self.reward_encoder if "preference" in updates else None
        device = self.teacher.device
        words = encode(drawn.captions) if encode else {}
        return Batch(
            noise=noise[self.rows(share)].to(device),
            cond=self.teacher.encode_prompts(
                drawn.captions, torch.from_numpy(drawn.time_ids).float()
            ),
            reward_cond={k: v.to(device) for k, v in words.items()},
            **(self.reals(drawn) if looks else {}),
        )

    def share(self, updates: tuple[Update, ...]) -> int:
        """How many rows each process has."""
        size = self.preferring if updates == ("preference",) else self.size
        assert size % self.ranks == 0
        return size // self.ranks

    def rows(self, share: int) -> slice:
        return slice(self.rank * share, (self.rank + 1) * share)

    def drawn(self, n: int, updates: tuple[Update, ...]) -> Drawn:
        """Pictures, if they are looked at, and captions: what takes no network and no GPU."""
        rng = np.random.default_rng(seed_of(self.seed, self.stage, "batch", n, 0))
        pictures = looking(updates) and self.latents is None
        share = self.share(updates)
        size, rows = share * self.ranks, self.rows(share)
        drawn = self.source.draw(rng, size, pictures=pictures, rows=rows)
        if not self.prompts:
            return drawn
        captions = [self.prompts[i] for i in rng.integers(len(self.prompts), size=size)[rows]]
        height, width = drawn.shape  # a whole picture of that size, as when it is used
        ids = np.array([[height, width, 0, 0, height, width]] * share)
        return replace(drawn, captions=captions, time_ids=ids)

    def taken(self, n: int, updates: tuple[Update, ...]) -> Drawn:
        """As `drawn`, by workers: what they could not read is told here, once."""
        assert self.order[n % len(self.order)] == updates
        drawn = self.ahead(n)
        if isinstance(self.source, PictureSource):
            for i, why in drawn.failed.items():
                self.source.tell(i, why)
        return drawn

    @cached_property
    def ahead(self) -> Workers[Drawn]:
        if isinstance(self.source, PictureSource):
            self.source.threads = max(1, THREADS // self.workers)
            self.source.members  # noqa: B018 - computed once, for all
        row = 3 * self.source.pixels + 64  # bytes; 64 of indices and sizes
        room = max(map(self.share, self.order)) * row
        return Workers(lambda n: self.drawn(n, self.order[n % len(self.order)]), self.workers, room)

    def close(self) -> None:
        """Ends the workers."""
        if "ahead" in vars(self):
            self.ahead.close()

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
        return {"real": self.decoded(latents.split(at_once))}

    def decoded(self, chunks: tuple[Tensor, ...]) -> Tensor:
        """Each with its rows of the same draws, as the student's are."""
        decode, found = self.decode or self.teacher.decode, []
        first, of = self.rank * len(chunks), self.ranks * len(chunks)
        for i, latents in enumerate(chunks):
            again = draws.rewound(latents.device.type) if i + 1 < len(chunks) else nullcontext()
            with again, draws.part(first + i, of):
                found.append(decode(latents))
        return torch.cat(found)


@contextmanager
def ended(batches: Callable[[int, tuple[Update, ...]], Batch]) -> Iterator[None]:
    """Whatever happens inside, no worker of theirs is left."""
    try:
        yield
    finally:
        if isinstance(batches, Batches):
            batches.close()


def looking(updates: tuple[Update, ...]) -> bool:
    """Whether real pictures are looked at."""
    return not {"score", "discriminator"}.isdisjoint(updates)


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return torch.from_numpy(pictures).float() / 127.5 - 1
