"""Draws of pictures and captions: a batch is of one bucket and a function of its generator."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Int, UInt8

from flashdmd.data.buckets import Shape, nearest, time_ids
from flashdmd.data.catalogue import THREADS, Catalogue, why
from flashdmd.data.listing import MOST_LEFT_OUT, Report
from flashdmd.data.pictures import cropped
from flashdmd.errors import GOES_ON, UserError

ALL = slice(None)
TRIES = 64  # pictures drawn in the place of one, before it is the disk that is broken

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A batch: of one size, so that one tensor holds it."""

    pictures: UInt8[np.ndarray, "n 3 H W"] | None  # None where nobody asked for them
    captions: list[str]
    indices: Int[np.ndarray, "n"]  # in the catalogue
    shape: Shape  # H, W in pixels, with or without pictures
    time_ids: Int[np.ndarray, "n 6"]  # SDXL's; see `buckets.time_ids`
    failed: dict[int, str] = field(default_factory=dict)  # drawn before them: why they are not here


@dataclass
class PictureSource:
    """Pictures of a catalogue, each scaled and cut to the bucket whose shape is nearest.

    What cannot be read any more while training is told once, and another picture of the same
    bucket drawn in its place: a function of the generator and the row, as long as the same ones
    fail, that moves nothing else.
    """

    catalogue: Catalogue
    buckets: tuple[Shape, ...]  # height, width in pixels
    without: frozenset[int] = frozenset()  # of the catalogue, never drawn
    failed: dict[int, str] = field(default_factory=dict)  # while training, and told: why
    threads: int = THREADS

    @cached_property
    def nearest(self) -> Int[np.ndarray, "n"]:
        """The bucket of each picture of the catalogue."""
        return nearest(self.catalogue.sizes, self.buckets)

    @cached_property
    def members(self) -> list[Int[np.ndarray, "_"]]:
        """The pictures of each bucket that may be drawn."""
        drawable = np.ones(len(self.catalogue), dtype=bool)
        drawable[list(self.without)] = False
        return [np.flatnonzero(drawable & (self.nearest == b)) for b in range(len(self.buckets))]

    @property
    def pixels(self) -> int:
        """Of the largest bucket."""
        return max(height * width for height, width in self.buckets)

    @cached_property
    def report(self) -> Report:
        """Of the catalogue, and how many of its pictures are smaller than their bucket."""
        shapes = np.array(self.buckets)[self.nearest]  # height, width
        grown = (shapes > self.catalogue.sizes[:, ::-1]).any(1)
        return replace(self.catalogue.report, upscaled=int(grown.sum()))

    def __call__(
        self, rng: np.random.Generator, n: int, pictures: bool = True
    ) -> tuple[UInt8[np.ndarray, "n 3 H W"] | None, list[str]]:
        """`n` pictures, if `pictures` are wanted, and their captions."""
        drawn = self.draw(rng, n, pictures)
        return drawn.pictures, drawn.captions

    def draw(
        self,
        rng: np.random.Generator,
        n: int,
        pictures: bool = True,
        rows: slice = ALL,
    ) -> Drawn:
        """`n` pictures of one bucket, each as likely as the others, or these `rows` of them; see
        `Drawn`.

        The bucket is the same whether or not `pictures` are wanted, and `rng` is left the same
        whichever rows are. Raises UserError when one picture after the other cannot be read.
        """
        ends = np.cumsum([len(m) for m in self.members])
        chosen = int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))
        members, shape = self.members[chosen], self.buckets[chosen]
        indices, images = members[rng.integers(len(members), size=n)][rows], None
        failed: dict[int, str] = {}
        if pictures:
            instead = np.array(rng.spawn(n), dtype=object)[rows]  # of each row: this moves no rng
            images, indices = self.read(indices, shape, instead, members, failed)
        captions = [self.catalogue.caption(i) for i in indices.tolist()]
        ids = time_ids(self.catalogue.sizes[indices], shape)
        return Drawn(images, captions, indices, shape, ids, failed)

    def read(
        self,
        indices: Int[np.ndarray, "n"],
        shape: Shape,
        instead: Iterable[np.random.Generator],
        members: Int[np.ndarray, "_"],
        failed: dict[int, str],
    ) -> tuple[UInt8[np.ndarray, "n 3 H W"], Int[np.ndarray, "n"]]:
        """The pictures at `indices`; others for those that fail, of `members` if any can be read,
        else of the whole catalogue, drawn `instead`; and at which indices these are. Those that
        fail are put into `failed`.
        """
        images, found = [], []
        attempts = self.attempts(indices, shape)
        for i, picture, rng in zip(indices.tolist(), attempts, instead, strict=True):
            tries = 0
            while isinstance(picture, str):
                self.check_there(i, picture)
                failed[i] = picture
                self.tell(i, picture)
                if tries == TRIES:
                    raise UserError(
                        f"{TRIES} pictures of {self.catalogue.listing.where} were drawn one after "
                        f"the other and none can be read ({self.catalogue.name(i)}: {picture}); is "
                        f"the disk there? {GOES_ON}"
                    )
                near = members if tries < TRIES // 2 else np.concatenate(self.members)
                i, tries = int(near[rng.integers(len(near))]), tries + 1
                picture = self.attempt(i, shape)
            images.append(picture)
            found.append(i)
        return np.stack(images), np.array(found)

    def check_there(self, i: int, reason: str) -> None:
        """Raises UserError where it is not a picture that cannot be read, but none can."""
        if self.catalogue.listing.gone:
            raise UserError(
                f"{self.catalogue.listing.where} is not there any more, or empty "
                f"({self.catalogue.name(i)}: {reason}); put the pictures back: {GOES_ON}"
            )

    def attempts(
        self, indices: Int[np.ndarray, "n"], shape: Shape
    ) -> list[UInt8[np.ndarray, "3 H W"] | str]:
        """Each picture, or why it cannot be read."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda i: self.attempt(i, shape), indices.tolist()))

    def attempt(self, i: int, shape: Shape) -> UInt8[np.ndarray, "3 H W"] | str:
        try:
            return cropped(self.catalogue.open(i), shape)
        except UserError:
            raise
        except Exception as e:  # decoders raise whatever they stumble over
            return why(e)

    def tell(self, i: int, reason: str) -> None:
        """Once of each picture; loudly beyond one in a hundred, whenever the count doubles."""
        if i in self.failed:
            return
        self.failed[i] = reason
        where, n, limit = self.catalogue.listing.where, len(self.failed), self.limit
        log.warning("%s of %s is left out: %s", self.catalogue.name(i), where, reason)
        if n > limit and (n - 1 <= limit or n.bit_count() == 1):
            log.error(
                "%d of %d pictures of %s could be read when they were checked and cannot be now: "
                "more than one in a hundred; others are drawn in their place",
                *(n, len(self.catalogue), where),
            )

    @property
    def limit(self) -> float:
        return MOST_LEFT_OUT * len(self.catalogue)
