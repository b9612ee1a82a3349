"""Text as people bring it: files of prompts, and the captions in lines of JSON."""

from collections.abc import Mapping
from pathlib import Path

from flashdmd.errors import UserError
from flashdmd.plain import json_object

CAPTION_KEYS = ("text", "caption", "prompt")  # of an object that describes a picture


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
        prompts = [said(record(line, at(path, i)), ("prompt",), at(path, i)) for i, line in lines]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; write one prompt a line")
    return prompts


def read_text(path: Path, what: str, wanted: str) -> str:
    """UTF-8, with or without a byte order mark. Raises UserError that says what is wanted."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise UserError(
                f"{what} {path} holds a NUL; is it UTF-16, or no text? save it as UTF-8"
            )
        return text
    except UnicodeDecodeError as e:
        raise UserError(
            f"{what} {path} is not UTF-8 (byte {e.start}); save it as UTF-8 text"
        ) from e
    except OSError as e:
        raise UserError(f"{what} {path} cannot be read: {e.strerror or e}; {wanted}") from e


def at(path: Path, line: int) -> str:
    return f"{path}, line {line}"


def record(text: str | bytes, where: str) -> dict[str, object]:
    """The object that a JSON text is. Raises UserError for anything else."""
    try:
        return json_object(text)
    except ValueError as e:
        raise UserError(f"{where}: not a JSON object") from e


def said(found: Mapping[str, object], keys: tuple[str, ...], where: str) -> str:
    """The text under the first of `keys` that an object has. Raises UserError if there is none."""
    key = next((k for k in keys if k in found), None)
    if key is None:
        wanted = " or ".join(f'"{k}"' for k in keys)
        raise UserError(f"{where}: not an object with a {wanted}")
    text = found[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: "{key}" must be a text that is not empty')
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f'{where}: "{key}" holds half a surrogate pair')
    if "\0" in text and key in CAPTION_KEYS:  # a name with one is refused elsewhere
        raise UserError(f'{where}: "{key}" holds a NUL')
    return text.strip()


def one_line(text: str) -> str:
    return " ".join(text.split())
