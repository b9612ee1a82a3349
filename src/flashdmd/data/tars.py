"""Pictures in webdataset tars, read from where they lie; nothing is ever unpacked to the disk."""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from glob import glob
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from flashdmd.data.folder import suffix, walk
from flashdmd.data.listing import BLIND, COPY, MUTE, REFUSED, Listing
from flashdmd.data.pictures import PICTURES, Stream
from flashdmd.data.prompts import CAPTION_KEYS, one_line, record, said, sound
from flashdmd.errors import GOES_ON, UserError
from flashdmd.plain import LARGEST

TEXTS = ("txt", "text", "caption")  # endings; then json
BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # key: to the base name's 1st dot
PATIENCE_S = 10  # before a bar is shown
BLOCK = 2**20  # bytes
MOST = 100_000  # tars of a pattern


class Span(NamedTuple):
    """Where a member's bytes are."""

    tar: Path
    offset: int
    size: int


def shards(pattern: str) -> list[Path]:
    """The tars of a folder, a brace pattern (train-{000..012}.tar) or a glob, in order.

    Raises UserError for those that are not there.
    """
    if Path(pattern).is_dir():
        tars = [Path(pattern) / name for name in walk(Path(pattern)) if suffix(name) == ".tar"]
        if odd := [str(p) for p in tars if not p.is_file()]:
            raise UserError(f"{odd[0]} is no regular file; give tars")
        return tars
    named = [] if "\0" in pattern else list(islice(expanded(pattern), MOST + 1))
    if not 0 < len(named) <= MOST:
        raise UserError(f"data.train_data_dir={pattern!r} names no tar, or more than {MOST}")
    paths = [Path(p) for one in named for p in (sorted(glob(one)) or [one])]
    if absent := [str(p) for p in paths if not p.is_file()]:
        raise UserError(
            f"{len(absent)} of the {len(paths)} tars of {pattern!r} are not there: "
            f"{', '.join(absent[:3])}"
        )
    return list(dict.fromkeys(paths))


def expanded(pattern: str) -> Iterator[str]:
    """{000..012} and {a,b} written out, one after the other: a few letters can name billions."""
    found = BRACES.search(pattern)
    if not found:
        yield pattern
        return
    first, last, words = found.groups()
    inner: Iterable[str] = words.split(",") if words else []
    if first:
        inner = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    ends = pattern[: found.start()], pattern[found.end() :]
    for word in inner:
        yield from expanded(word.join(ends))


def list_tars(where: str, paths: list[Path], captions: bool) -> Listing:
    """One picture of each key of each tar, the first; a key of an earlier tar is counted, and kept.

    Raises UserError for what is no whole tar.
    """
    stamps: dict[Path, str] = {}
    listing = Listing(where, partial(read, stamps))
    seen: set[str] = set()
    for path in tqdm(paths, "reading tars", delay=PATIENCE_S, leave=False):
        stamps[path] = stamp(path.stat())
        groups = grouped(listing, path)
        listing.duplicates += len(seen & groups.keys())
        seen |= groups.keys()
        with path.open("rb") as f:
            for key, members in groups.items():
                add(listing, key, members, f"{stamps[path]}@", f if captions else None)
    return listing


def stamp(facts: os.stat_result) -> str:
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def read(stamps: dict[Path, str], span: Span) -> BytesIO:
    """Raises UserError when the tar is not the one that was listed: at its places are others."""
    back = f"put the tar back as it was; {GOES_ON}"
    try:
        with span.tar.open("rb") as f:
            if stamp(os.fstat(f.fileno())) != stamps[span.tar]:
                raise UserError(f"{span.tar} was changed since it was listed; {back}")
            return BytesIO(cut(f, span))
    except FileNotFoundError as e:
        raise UserError(f"{span.tar} is not there any more; {back}") from e


def cut(f: Stream, span: Span) -> bytes:
    f.seek(span.offset)
    return f.read(span.size)


def grouped(listing: Listing, path: Path) -> dict[str, dict[str, Span]]:
    """key -> ending -> where; what is no plain file inside, or there again, is left out."""
    groups: dict[str, dict[str, Span]] = {}
    for member in members(path):
        name = f"{path.name}:{member.name}"
        parts = PurePosixPath(member.name).parts
        if member.isdir():
            continue
        if member.name.startswith("/") or ".." in parts or not member.isreg() or member.issparse():
            why = "a link or a device" if not member.isreg() else "outside, or not in one piece"
            listing.leave_out(REFUSED, name, why)
            continue
        found = MEMBER.fullmatch(PurePosixPath(member.name).as_posix())
        if found is None or any(part[0] == "." for part in parts):
            continue
        key, ending = found[1], found[2].lower()
        group = groups.setdefault(key, {})
        if f".{ending}" in PICTURES and any(f".{e}" in PICTURES for e in group):
            listing.duplicates += 1
            listing.leave_out(COPY, name, f"another picture of the key {key}")
            continue
        group.setdefault(ending, Span(path, member.offset_data, member.size))
    return groups


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Raises UserError when the tar is none or ends before its end mark or goes on after it."""
    wanted = "give tars that are whole and not compressed: pictures are read from their middle"
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.__dict__["members"].clear()  # or every one is kept
                yield member
            end = tar.offset
        with path.open("rb") as f:  # tarfile stops at what it does not know, and says nothing
            f.seek(end)
            rest = f.read(BLOCK)
            if not rest:
                raise UserError(f"{path} has no end mark and so is cut off; {wanted}")
            while rest:
                if rest.count(0) < len(rest):
                    raise UserError(
                        f"{path} goes on after byte {end}, where it ends or is damaged: tars that "
                        f"are joined are not read; {wanted}"
                    )
                rest = f.read(BLOCK)
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"{path} cannot be read as a tar: {e}; {wanted}") from e


def add(
    listing: Listing, key: str, group: dict[str, Span], stamp: str, captions: Stream | None
) -> None:
    """Adds the picture of a group, with its caption out of the open tar `captions` if given."""
    ending = next((e for e in group if f".{e}" in PICTURES), None)
    tar = next(iter(group.values())).tar
    if ending is None:
        listing.leave_out(BLIND, f"{tar.name}:{key}", "it has " + ", ".join(group))
        return
    span, name, caption = group[ending], f"{tar.name}:{key}.{ending}", ""
    if captions is not None:
        try:
            caption = caption_of(group, captions, name)
        except (UserError, UnicodeDecodeError) as e:
            listing.leave_out(MUTE, name, str(e))
            return
    listing.add(name, caption, span, f"{stamp}{span.offset}")


def caption_of(group: dict[str, Span], tar: Stream, name: str) -> str:
    if any(group[ending].size > LARGEST for ending in (*TEXTS, "json") if ending in group):
        raise UserError(f"its caption is larger than {LARGEST} bytes")
    for ending in TEXTS:
        if ending in group and (text := one_line(cut(tar, group[ending]).decode("utf-8-sig"))):
            return sound(text, f"its {ending}")
    if "json" in group:
        return one_line(said(record(cut(tar, group["json"]), name), CAPTION_KEYS, name))
    raise UserError(f"no {', '.join(TEXTS)} or json with words")
