"""Writing that is all or nothing, stopping between two steps, and what tells contents apart."""

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from flashdmd.errors import Stopped, UserError

ERRNO = re.compile(r"os error (\d+)")  # how safetensors and tokenizers, in Rust, tell of one
BESIDE = re.compile(r"\.(.+)\.(writing|retired|removing)-\d+(?:-\w+)?(\.\w+)?")  # left by a kill


def digest(*parts: bytes) -> str:
    """12 hexadecimal digits of SHA-256."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def own() -> str:
    """What no other process calls its own: those of two machines may have the same number."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; on success it takes `folder`'s place.

    When the body raises, `folder` is as it was and what was written beside it is removed. What the
    disk refuses is an OSError, whoever wrote.
    """
    mark = own()
    beside = folder.with_name(f".{folder.name}.writing-{mark}")
    retired = folder.with_name(f".{folder.name}.retired-{mark}")
    mend(folder)
    beside.mkdir(parents=True)
    try:
        with as_os_error(folder):
            yield beside
        for path in (*beside.rglob("*"), beside):
            if path.is_file():
                path.chmod(beside.stat().st_mode & 0o666)  # safetensors leaves 0600 always
            sync(path)
        if folder.exists():
            folder.rename(retired)
        beside.rename(folder)
        sync(folder.parent)
    except BaseException:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, with its ending; on success the file there takes its place.

    When the body raises, `path` is as it was. Errors are those of `replace_folder`.
    """
    beside = path.with_name(f".{path.stem}.writing-{own()}{path.suffix}")
    beside.unlink(missing_ok=True)
    beside.touch(exist_ok=False)  # whoever may write here cannot have put a link in its place
    mode = beside.stat().st_mode
    try:
        with as_os_error(path):
            yield beside
        beside.chmod(mode)  # as the user gives; safetensors leaves 0600 always
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Inside, an error that tells of an errno only in its text becomes the OSError it is."""
    try:
        yield
    except Exception as e:
        told = ERRNO.search(str(e))
        if told is None or isinstance(e, OSError):
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from e


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def mend(folder: Path) -> None:
    """Puts back what a process that was killed between two renames set aside; clears its rest."""
    for retired in folder.parent.glob(f".{folder.name}.retired-*"):
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.rename(folder)
    for kind in ("writing", "removing"):
        for rest in folder.parent.glob(f".{folder.name}.{kind}-*"):
            with suppress(OSError):
                clear(rest)


def clear(folder: Path) -> None:
    """Removes a folder, and of a link to one the link alone."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def mend_all(parent: Path) -> None:
    """Mends every folder in `parent` that a process was killed at, and clears files half written.

    Only for who is `alone_in` it.
    """
    for path in list(parent.iterdir()):
        if (name := BESIDE.fullmatch(path.name)) is None:
            continue
        if path.is_dir() or path.is_symlink():
            mend(parent / name[1])
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Half of it is never there under its name, whenever this is killed."""
    leaving = folder.with_name(f".{folder.name}.removing-{own()}")
    folder.rename(leaving)
    clear(leaving)


def forget_origins(folder: Path) -> None:
    """Takes the paths that networks were loaded from out of the configs of a pipeline folder."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text("utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes beside `path` and renames, so that a reader never sees half a file."""
    with replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process is in `folder`; one that was killed is not in it any more.

    A folder that it made and that nothing was written to does not stay, nor do the ones around it
    that it made. Raises UserError when another process is there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as e:
        raise UserError(
            f"another process is writing to {folder}; wait until it ends, stop it, or give another "
            "folder"
        ) from e
    try:
        yield
    finally:
        if made and [path.name for path in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder)
            with suppress(OSError):  # others may have come
                for path in made[1:]:
                    path.rmdir()
        lock.release()


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM ask for a stop between two steps; the yielded call tells.

    Asked a second time, it stops at once.
    """
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise Stopped
        asked.append(number)
        tqdm.write("stopping after this step, then saving; again stops now", file=sys.stderr)

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def cut_torn_line(log: Path) -> None:
    """Takes out the part of a last line that a kill or a full disk left; it is logged again."""
    lines = log.read_bytes() if log.exists() else b""
    if lines and not lines.endswith(b"\n"):
        os.truncate(log, lines.rfind(b"\n") + 1)
