"""What a place holds before any picture is looked at, and what may be left out of it."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flashdmd.data.pictures import Stream
from flashdmd.errors import UserError
from flashdmd.plain import regular

MOST_LEFT_OUT = 0.01  # share of what was found that may be left out
NO_FILE = "no regular file"  # a pipe, a device, a folder
TELL_AFTER = 3  # names of each kind of what was left out, in a message

BROKEN, MUTE, BLIND, REFUSED, COPY = (
    "broken",
    "without caption",
    "without a picture of a format that is read",
    "refused",
    "given twice",
)
ADVICE = {  # what a person can do about each kind
    BROKEN: "repair or remove what is broken",
    MUTE: "write the captions, or give data.prompts to train on prompts of your own",
    BLIND: "convert pictures to png, jpg or webp",
    REFUSED: "take out what is no plain file inside the data set; nothing else is ever read",
}


class Entry(NamedTuple):
    """A picture that is said to be there."""

    name: str  # what messages call it
    caption: str  # empty where nobody asks for captions
    place: Any  # what the listing's `stream` opens
    stamp: str  # with the name, tells these contents from others


class Refused(ValueError):  # noqa: N818 - a kind, as broken is
    """What names a file outside its data set, or what is no file."""


def opened(path: Path) -> Stream:
    """Raises Refused for a pipe or a device, which may never end, and OSError as open does."""
    if not regular(path):
        raise Refused(NO_FILE)
    return path.open("rb")


class LeftOut(NamedTuple):
    kind: str
    name: str
    why: str = ""


@dataclass
class Listing:
    where: str
    stream: Callable[[Any], Stream]  # opens a `place`
    entries: list[Entry] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    duplicates: int = 0  # names met again, whether or not what they name is kept
    unlisted: int = 0  # pictures that the metadata does not name
    root: Path | None = None  # the folder, of files that are opened one by one

    @property
    def gone(self) -> bool:
        """Whether its folder is not there any more, or empty, as where a disk was mounted."""
        if self.root is None:
            return False
        try:
            with os.scandir(self.root) as inside:
                return next(inside, None) is None
        except OSError:
            return True

    @property
    def total(self) -> int:
        return len(self.entries) + len(self.left_out)

    def add(self, name: str, caption: str, place: Any, stamp: str) -> None:
        self.entries.append(Entry(shown(name), caption, place, stamp))

    def leave_out(self, kind: str, name: str, why: str = "") -> None:
        self.left_out.append(LeftOut(kind, shown(name), why))


def shown(name: str) -> str:
    """A name on one line of text: what cannot be printed, or is no character, is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


@dataclass(frozen=True)
class Report:
    """What became of the pictures of a place. `total` is `used` and all that was left out."""

    where: str
    total: int
    used: int
    decoded: int  # in full when they were checked; of the others the header
    broken: int = 0
    without_caption: int = 0
    without_picture: int = 0
    refused: int = 0
    copies: int = 0
    duplicates: int = 0
    unlisted: int = 0
    upscaled: int = 0

    @property
    def tells(self) -> bool:
        """Whether there is more to tell than that all pictures are used as they are."""
        return self.used < self.total or any((self.duplicates, self.unlisted, self.upscaled))

    def __str__(self) -> str:
        counts = [
            (self.broken, BROKEN),
            (self.without_caption, MUTE),
            (self.without_picture, BLIND),
            (self.refused, REFUSED),
            (self.copies, COPY),
            (self.duplicates, "names met again"),
            (self.unlisted, "not named in the metadata"),
            (self.upscaled, "smaller than they are wanted and scaled up"),
            (self.decoded if self.decoded < self.used else 0, "checked in full, the others' head"),
        ]
        told = "".join(f"; {n} {what}" for n, what in counts if n)
        return f"{self.where}: {self.used} of {self.total} pictures are used{told}"


def report(listing: Listing, decoded: int) -> Report:
    kinds = Counter(kind for kind, _, _ in listing.left_out)
    return Report(
        listing.where,
        listing.total,
        len(listing.entries),
        decoded,
        kinds[BROKEN],
        kinds[MUTE],
        kinds[BLIND],
        kinds[REFUSED],
        kinds[COPY],
        listing.duplicates,
        listing.unlisted,
    )


def names(left_out: list[LeftOut]) -> str:
    """Of each kind how many, and some by name."""
    kinds = Counter(kind for kind, _, _ in left_out)
    told = []
    for kind, n in kinds.items():
        some = [one for one in left_out if one.kind == kind][:TELL_AFTER]
        named = ", ".join(f"{one.name}: {one.why}" if one.why else one.name for one in some)
        told.append(f"{n} {kind} ({named}{', ...' if n > TELL_AFTER else ''})")
    return "; ".join(told)


def check_share(listing: Listing) -> None:
    """Raises UserError when there is nothing, or more than 1 % of it would be left out."""
    lost = [one for one in listing.left_out if one.kind != COPY]
    if not listing.total:
        raise UserError(f"{listing.where} holds no pictures; read are png, jpg and webp")
    if len(lost) > MOST_LEFT_OUT * listing.total:
        advice = "; ".join(ADVICE[kind] for kind in dict.fromkeys(one.kind for one in lost))
        raise UserError(
            f"{len(lost)} of {listing.total} pictures of {listing.where} cannot be used, more than "
            f"one in a hundred: {names(lost)}; {advice}"
        )
