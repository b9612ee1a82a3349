"""What people bring: prompts in a file, pictures with captions in a folder."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from flashdmd.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION_KEYS = ("text", "caption", "prompt")  # of a line of metadata.jsonl
METADATA = "metadata.jsonl"
MOST_BROKEN = 0.01  # share of a folder's pictures that may be left out
TELL_AFTER = 3  # names of what was left out, in a message

log = logging.getLogger(__name__)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: .txt, one a line, or .jsonl, objects with a "prompt".

    Blank lines are skipped. Raises UserError for a file that cannot be read, is not UTF-8, holds
    no prompt, or has a line that is none.
    """
    text = read_text(
        path,
        "the prompt file",
        'give a .txt file with one prompt a line, or .jsonl with {"prompt": ...} a line',
    )
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts = [line for _, line in lines]
    if path.suffix == ".jsonl":
        prompts = [said(path, i, line, ("prompt",)) for i, line in lines]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; write one prompt a line")
    return prompts


def read_text(path: Path, what: str, wanted: str) -> str:
    """UTF-8, with or without a byte order mark. Raises UserError that says what is wanted."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{what} {path} is not UTF-8 (byte {e.start}); save it as UTF-8 text"
        ) from e
    except OSError as e:
        raise UserError(f"{what} {path} cannot be read: {e.strerror or e}; {wanted}") from e


def record(path: Path, number: int, line: str) -> dict[str, object]:
    """The object on a line of JSON. Raises UserError for anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}, line {number}: not a JSON object")
    return found


def said(path: Path, number: int, line: str, keys: tuple[str, ...]) -> str:
    """The text under the first of `keys` that a line of JSON has."""
    found = record(path, number, line)
    key = next((k for k in keys if k in found), None)
    if key is None:
        wanted = " or ".join(f'"{k}"' for k in keys)
        raise UserError(f"{path}, line {number}: not an object with a {wanted}")
    text = found[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{path}, line {number}: "{key}" must be a text that is not empty')
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f'{path}, line {number}: "{key}" holds half a surrogate pair')
    return text.strip()


@dataclass
class FolderSource:
    """The pictures of a folder, squared to `size` pixels, and their captions.

    What cannot be read while training is left out and another picture drawn in its place; when
    that befalls more than one picture in a hundred, UserError.
    """

    folder: Path
    items: list[tuple[Path, str]]  # captions are empty where nobody asks for them
    size: int
    broken: set[Path] = field(default_factory=set)

    def __call__(
        self, rng: np.random.Generator, n: int, pictures: bool = True
    ) -> tuple[np.ndarray | None, list[str]]:
        """`n` pictures (n, 3, size, size) uint8, if `pictures` are wanted, and their captions."""
        if not pictures:
            return None, [self.items[i][1] for i in rng.integers(len(self.items), size=n)]
        images: list[np.ndarray] = []
        captions: list[str] = []
        while len(images) < n:
            path, caption = self.items[rng.integers(len(self.items))]
            try:
                images.append(read_picture(path, self.size))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
                self.leave_out(path, e)
                continue
            captions.append(caption)
        return np.stack(images), captions

    def leave_out(self, path: Path, why: Exception) -> None:
        if path in self.broken:
            return
        log.warning("%s is left out: %s", path, why)
        self.broken.add(path)
        if len(self.broken) > MOST_BROKEN * len(self.items):
            names = ", ".join(str(p) for p in sorted(self.broken)[:TELL_AFTER])
            raise UserError(
                f"{len(self.broken)} of {len(self.items)} pictures of {self.folder} cannot be read "
                f"({names}, ...): more than one in a hundred; repair or remove them"
            )


def open_folder(folder: Path, size: int, captions: bool = True) -> FolderSource:
    """The pictures under `folder`, with captions from metadata.jsonl or a .txt beside each.

    Raises UserError when there is no such folder, it holds no picture, a picture has no caption
    though `captions` are wanted, or a line of metadata.jsonl names no picture of the folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.train_data_dir={str(folder)!r} is not a folder; give a folder of pictures "
            f"({', '.join(PICTURES)}) with captions, or emoji for the embedded ones"
        )
    metadata = folder / METADATA
    if metadata.exists():
        items = listed(metadata, captions)
    else:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
        items = [(p, beside(p) if captions else "") for p in paths]
    if not items:
        raise UserError(f"{folder} holds no pictures; these are read: {', '.join(PICTURES)}")
    if captions and (mute := [p for p, caption in items if not caption]):
        names = ", ".join(str(p.relative_to(folder)) for p in mute[:TELL_AFTER])
        raise UserError(
            f"{len(mute)} of {len(items)} pictures of {folder} have no caption ({names}, ...); "
            f"write a .txt beside each or {METADATA} with file_name and text, or give data.prompts "
            "to train on prompts of your own"
        )
    return FolderSource(folder, items, size)


def listed(metadata: Path, captions: bool) -> list[tuple[Path, str]]:
    """(picture, caption) of every line of metadata.jsonl; paths stay inside its folder."""
    text = read_text(metadata, "the list of pictures", "make it readable")
    items = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name = said(metadata, i, line, ("file_name",))
        inside = PurePosixPath(name)
        path = metadata.parent / inside
        if inside.is_absolute() or ".." in inside.parts or not path.is_file():
            raise UserError(f"{metadata}, line {i}: there is no picture {name!r} in its folder")
        items.append((path, said(metadata, i, line, CAPTION_KEYS) if captions else ""))
    return items


def beside(picture: Path) -> str:
    """What the .txt file next to a picture says, on one line; empty if there is none."""
    path = picture.with_suffix(".txt")
    if not path.exists():
        return ""
    return " ".join(read_text(path, "the caption", "make it readable").split())


def read_picture(path: Path, size: int) -> np.ndarray:
    """(3, size, size) uint8 RGB: turned upright, its middle square, on white where transparent."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
            depth = np.asarray(picture, dtype=np.float32)
            full = 1.0 if picture.mode == "F" and depth.max() <= 1 else 65535.0
            picture = Image.fromarray((depth * (255 / full)).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture = Image.new("RGBA", rgba.size, "white")
            picture.alpha_composite(rgba)
        square = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).transpose(2, 0, 1)
