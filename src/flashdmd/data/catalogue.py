"""Pictures by index, whatever they lie in: all were looked at, and what is broken is left out."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from flashdmd.data.listing import (
    BROKEN,
    MOST_LEFT_OUT,
    REFUSED,
    Entry,
    LeftOut,
    Listing,
    Refused,
    Report,
    check_share,
    names,
    report,
)
from flashdmd.data.pictures import read_rgb, upright_size
from flashdmd.data.prompts import one_line
from flashdmd.files import digest, write_text
from flashdmd.plain import json_object

ALL_UP_TO = 20_000  # pictures, which take minutes to decode; of more a sample is
SAMPLE = 2_000
THREADS = 8
AT_ONCE = 1_000  # pictures that wait for a thread
PATIENCE_S = 10  # before a bar is shown
LONGEST = 200  # characters of an error that are told

log = logging.getLogger(__name__)
Size = tuple[int, int]


@dataclass(frozen=True)
class Catalogue:
    """Pictures with captions, by index."""

    listing: Listing
    sizes: Int[np.ndarray, "n 2"]  # width, height in pixels, upright
    report: Report
    fingerprint: str  # of the pictures that are used, in their order

    def __len__(self) -> int:
        return len(self.listing.entries)

    def name(self, i: int) -> str:
        return self.listing.entries[i].name

    def caption(self, i: int) -> str:
        return self.listing.entries[i].caption

    def size(self, i: int) -> Size:
        """(width, height) in pixels, upright."""
        width, height = self.sizes[i]
        return int(width), int(height)

    def open(self, i: int) -> Image.Image:
        """In RGB. Raises whatever Pillow and the disk raise."""
        with self.listing.stream(self.listing.entries[i].place) as stream:
            return read_rgb(stream)


def check(listing: Listing, cache: Path | None = None) -> Catalogue:
    """Decodes every picture, or of more than 20,000 the heads of all and 2,000 in full.

    When more than one in a hundred of the 2,000 is broken, every one is decoded. The sizes are kept
    in the folder `cache`, and what was broken alone is looked at again. Raises UserError when more
    than one in a hundred of all that was found has to be left out.
    """
    entries = listing.entries
    kept = cache / f"pictures-{fingerprint(entries)}.json" if cache else None
    sizes, decoded = recalled(kept, len(entries))
    unknown = [i for i, size in enumerate(sizes) if size is None]
    if len(unknown) < len(entries):
        broken = look(listing, unknown, set(unknown), sizes)
    else:
        sample = spread(len(entries))
        broken, decoded = look(listing, unknown, sample, sizes), len(sample)
        if len(sample) < len(entries) and len(sample & broken.keys()) > MOST_LEFT_OUT * decoded:
            log.warning(
                "%s: of %d pictures that were decoded %d are broken; now all are decoded",
                *(listing.where, decoded, len(sample & broken.keys())),
            )
            rest = [i for i in unknown if i not in sample]
            broken, decoded = broken | look(listing, rest, set(rest), sizes), len(entries)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        told: dict[str, Any] = {"decoded": decoded, "sizes": sizes}
        write_text(kept, json.dumps(told | {"digest": seal(told)}))
    whole = [i for i, size in enumerate(sizes) if size is not None]
    lost = [LeftOut(broken[i][0], entries[i].name, broken[i][1]) for i in sorted(broken)]
    used = replace(
        listing, entries=[entries[i] for i in whole], left_out=[*listing.left_out, *lost]
    )
    check_share(used)
    became = report(used, min(decoded, len(whole)))
    if used.left_out:
        log.warning("left out of %s: %s", listing.where, names(used.left_out))
    shapes = np.array([sizes[i] for i in whole], dtype=np.int64).reshape(-1, 2)
    return Catalogue(used, shapes, became, fingerprint(used.entries))


def fingerprint(entries: list[Entry]) -> str:
    return digest(*(f"{len(e.name)} {e.name} {e.stamp}\n".encode() for e in entries))


def seal(told: dict[str, Any]) -> str:
    return digest(json.dumps(told).encode())


def recalled(path: Path | None, n: int) -> tuple[list[Size | None], int]:
    """The sizes that an earlier check found, None for each that is not known; how many it decoded.

    A file that cannot be read is named, and as good as none.
    """
    unknown: tuple[list[Size | None], int] = [None] * n, 0
    if path is None or not path.exists():
        return unknown
    try:
        found = json_object(path.read_bytes())
        if found.pop("digest", None) != seal(found):
            raise ValueError("it is damaged, or of an earlier version")
        sizes = [None if size is None else (size[0], size[1]) for size in found["sizes"]]
        return (sizes, found["decoded"]) if len(sizes) == n else unknown
    except (ValueError, KeyError, OSError) as e:
        log.warning("%s cannot be read and is made again: %r", path, e)
        return unknown


def spread(n: int) -> set[int]:
    """All of n indices, or of many some that are evenly spread."""
    if n <= ALL_UP_TO:
        return set(range(n))
    return set(np.linspace(0, n - 1, SAMPLE).round().astype(int).tolist())


def look(
    listing: Listing, indices: list[int], decode: set[int], sizes: list[Size | None]
) -> dict[int, tuple[str, str]]:
    """Puts the sizes of the pictures at `indices` into `sizes`; index -> (kind, why) of the broken.

    Those of `decode` are decoded, of the others the head is read.
    """
    broken = {}

    def one(i: int) -> Size | tuple[str, str]:
        try:
            with listing.stream(listing.entries[i].place) as stream:
                return upright_size(stream, decode=i in decode)
        except Exception as e:  # decoders raise whatever they stumble over
            return (REFUSED if isinstance(e, Refused) else BROKEN), why(e)

    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(indices), desc="checking pictures", delay=PATIENCE_S, leave=False) as bar,
    ):
        for start in range(0, len(indices), AT_ONCE):
            part = indices[start : start + AT_ONCE]
            for i, (a, b) in zip(part, pool.map(one, part), strict=True):
                if isinstance(a, str):
                    sizes[i], broken[i] = None, (a, str(b))
                else:
                    sizes[i] = a, int(b)
                bar.update()
    return broken


def why(e: Exception) -> str:
    """What is wrong with a picture, on one line."""
    if isinstance(e, UnidentifiedImageError):
        return "not a picture"  # Pillow's words hold an address in memory
    return one_line(f"{type(e).__name__}: {e}")[:LONGEST]
