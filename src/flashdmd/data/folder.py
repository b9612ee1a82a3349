"""Folders of pictures, with captions in .txt files beside them or in a metadata file."""

import csv
import filecmp
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from flashdmd.data.listing import BLIND, BROKEN, COPY, MUTE, NO_FILE, REFUSED, Listing, opened
from flashdmd.data.pictures import PICTURES, UNREAD
from flashdmd.data.prompts import CAPTION_KEYS, at, one_line, read_text, record, said, sound
from flashdmd.errors import UserError
from flashdmd.plain import LARGEST, regular

METADATA = ("metadata.jsonl", "metadata.csv")


def list_folder(folder: Path, captions: bool) -> Listing:
    """The pictures under a folder: those that its metadata files name, or all if it has none.

    A picture whose name differs from another's in the ending alone shares its caption, and is left
    out when it is the same file byte for byte. Raises UserError for metadata that is no table.
    """
    listing = Listing(str(folder), lambda name: opened(folder / name), root=folder)
    files = walk(folder)
    tables = [name for name in files if PurePosixPath(name).name in METADATA]
    pictures = [name for name in files if suffix(name) in PICTURES]
    for name in files:
        if suffix(name) in UNREAD:
            listing.leave_out(BLIND, name, "read are " + ", ".join(PICTURES))
    if tables:
        listed = {name for table in tables for name in add_listed(listing, folder, table, captions)}
        listing.unlisted = len(set(pictures) - listed)
    else:
        add_all(listing, folder, pictures, captions)
    return listing


def suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def walk(folder: Path) -> list[str]:
    """Every file under a folder, through links to folders too, but none that is hidden."""
    found, seen = [], {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        inner = {d: os.path.realpath(os.path.join(root, d)) for d in sorted(folders)}
        folders[:] = [d for d, real in inner.items() if d[0] != "." and real not in seen]
        seen.update(inner.values())
        here = Path(root).relative_to(folder)
        found += [(here / name).as_posix() for name in files if name[0] != "."]
    return sorted(found)


def add_all(listing: Listing, folder: Path, pictures: list[str], captions: bool) -> None:
    first: dict[str, list[str]] = {}  # by name without ending
    for name in pictures:
        same = first.setdefault(name.removesuffix(PurePosixPath(name).suffix), [])
        listing.duplicates += bool(same)
        if not there(listing, folder, name):
            continue
        if any(filecmp.cmp(folder / name, folder / other, shallow=False) for other in same):
            listing.leave_out(COPY, name, f"the same file as {same[0]}")
            continue
        same.append(name)
        try:
            caption = beside(folder / name) if captions else ""
        except UserError as e:
            listing.leave_out(MUTE, name, str(e))
            continue
        if captions and not caption:
            listing.leave_out(MUTE, name, "no .txt with words beside it, nor a " + METADATA[0])
            continue
        add(listing, folder, name, caption)


def beside(picture: Path) -> str:
    """What the .txt file next to a picture says, on one line; empty if there is none."""
    path = picture.with_suffix(".txt")
    if not path.exists():
        return ""
    text = read_text(path, "the caption", "make it readable", LARGEST)
    return sound(one_line(text), f"the caption {path}")


def there(listing: Listing, folder: Path, name: str) -> bool:
    """Whether a file is one that may be opened; leaves it out if not."""
    try:
        if regular(folder / name):
            return True
        listing.leave_out(REFUSED, name, NO_FILE)
    except OSError as e:
        listing.leave_out(BROKEN, name, e.strerror or str(e))
    return False


def add(listing: Listing, folder: Path, name: str, caption: str) -> None:
    facts = (folder / name).stat()
    listing.add(name, caption, name, f"{facts.st_size}-{facts.st_mtime_ns}")


def add_listed(listing: Listing, folder: Path, table: str, captions: bool) -> Iterator[str]:
    """Adds what a metadata file names, and yields the names. Paths stay inside its folder."""
    path = folder / table
    seen: dict[str, set[str]] = {}
    for line, row in rows(path):
        given = said(row, ("file_name",), at(path, line))
        inside = PurePosixPath(given)
        if inside.is_absolute() or ".." in inside.parts or "\\" in given or "\0" in given:
            listing.leave_out(REFUSED, given, f"{at(path, line)}: outside the folder")
            continue
        name = (PurePosixPath(table).parent / inside).as_posix()
        yield name
        try:
            caption = one_line(said(row, CAPTION_KEYS, at(path, line))) if captions else ""
        except UserError as e:
            listing.leave_out(MUTE, name, str(e))
            continue
        before = seen.setdefault(name, set())
        listing.duplicates += bool(before)
        if caption in before:
            listing.leave_out(COPY, name, f"{at(path, line)}: with the same caption")
            continue
        before.add(caption)
        if there(listing, folder, name):
            add(listing, folder, name, caption)


def rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(line number, columns) of a table of JSON lines or comma-separated values with a head."""
    text = read_text(path, "the list of pictures", "make it readable")
    if path.suffix == ".jsonl":
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield i, record(line, at(path, i))
        return
    table = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in table:
            yield table.line_num, row
    except csv.Error as e:
        raise UserError(f"{at(path, table.line_num)}: {e}; write a table of file_name,text") from e
