"""Text as people bring it: files of prompts, and the captions in lines of JSON."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from flashdmd.errors import UserError
from flashdmd.plain import Json, Pairs, json_object, limited, regular

CAPTION_KEYS = ("text", "caption", "prompt")  # of an object that describes a picture
ENDINGS = (".txt", ".jsonl", "")  # of files of prompts, in small letters or large
LONGEST = 10_000  # characters of a prompt; an encoder reads its first 77 to 512 tokens
LIST = 2**30  # bytes of a file that lists prompts or pictures: about ten million


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: .txt or no ending, one a line, or .jsonl, objects with a "prompt".

    Blank lines are skipped. Raises UserError for a file that cannot be read, is of another ending,
    is not UTF-8, holds no prompt, or has a line that is none.
    """
    wanted = 'give a .txt file with one prompt a line, or .jsonl with {"prompt": ...} a line'
    text = read_text(path, "the prompt file", wanted)
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"the prompt file {path} ends in {path.suffix}; {wanted}")
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".jsonl":
        prompts = [said(record(line, at(path, i)), ("prompt",), at(path, i)) for i, line in lines]
    else:
        prompts = [sound(line, at(path, i)) for i, line in lines]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; write one prompt a line")
    return prompts


def read_text(path: Path, what: str, wanted: str, most: int = LIST) -> str:
    """UTF-8, with or without a byte order mark, of a regular file of at most so many bytes.

    Raises UserError that says what is wanted.
    """
    try:
        if not regular(path):
            raise OSError("it is no regular file")
        text = limited(path, what, most).decode("utf-8-sig")
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
    """The object that a JSON text is. Raises UserError for anything else, or a key given twice."""
    try:
        return json_object(text, once)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    except ValueError as e:
        raise UserError(f"{where}: not a JSON object") from e


def once(pairs: Pairs) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"the key {twice!r} is given twice")
    return found


def said(found: Mapping[str, object], keys: tuple[str, ...], where: str) -> str:
    """The text under the first of `keys` that an object has. Raises UserError if there is none."""
    key = next((k for k in keys if k in found), None)
    if key is None:
        wanted = " or ".join(f'"{k}"' for k in keys)
        raise UserError(f"{where}: not an object with a {wanted}")
    text = found[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: "{key}" must be a text that is not empty')
    if key in CAPTION_KEYS:
        return sound(text.strip(), f'{where}: "{key}"')
    if halves(text):  # a name that is too long, or has a NUL, is refused elsewhere
        raise UserError(f'{where}: "{key}" holds half a surrogate pair')
    return text.strip()


def sound(prompt: str, where: str) -> str:
    """A prompt as it is. Raises UserError, which begins with `where`, for one no encoder takes."""
    if halves(prompt):
        raise UserError(f"{where} holds half a surrogate pair, or is not UTF-8")
    if "\0" in prompt:
        raise UserError(f"{where} holds a NUL")
    if len(prompt) > LONGEST:
        raise UserError(
            f"{where} has {len(prompt)} characters; a prompt has at most {LONGEST}: encoders read "
            "a few hundred words, so shorten it"
        )
    return prompt


def halves(text: str) -> bool:
    """Whether it holds half a surrogate pair, as bytes become that are not UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def one_line(text: str) -> str:
    return " ".join(text.split())
