"""What somebody who wishes a user ill could put into files: real pickles, real code, real tars."""

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CODE = "from pathlib import Path\nPath({mark!r}).touch()\nclass {name}:\n    pass\n"


class Touch:
    """Unpickled, it touches a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def pickled(path: Path, mark: Path) -> Path:
    """As torch saves weights; both readers of it, torch's and Python's, would run it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.ones(1), "evil": Touch(mark)}, path)
    return path


def plainly_pickled(path: Path, mark: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Touch(mark)))
    return path


def code(path: Path, mark: Path, name: str = "Evil") -> Path:
    """A module that touches `mark` when it is imported."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CODE.format(mark=str(mark), name=name))
    return path


def edited(path: Path, **changes: Any) -> Path:
    """A JSON object with some keys set."""
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **changes}))
    return path


def tarred(path: Path, good: dict[str, bytes], bad: list[tuple[str, bytes, str]]) -> Path:
    """A tar of files, and of members (name, tarfile's type, what a link points to)."""
    with tarfile.open(path, "w") as tar:
        for name, kind, target in bad:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"evil"))
        for name, content in good.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


OPENED: list[str] | None = None  # what has been opened since; None: nobody asks


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(args[0]))


sys.addaudithook(_hook)


@contextmanager
def opened() -> Iterator[list[str]]:
    """The paths that Python opens inside."""
    global OPENED
    OPENED = []
    try:
        yield OPENED
    finally:
        OPENED = None
