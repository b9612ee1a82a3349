"""Writing that is all or nothing."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_SPACE = "os error 28"  # how safetensors, which is no Python, tells of ENOSPC


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; on success it takes `folder`'s place.

    When the body raises, `folder` is as it was and what was written beside it is removed. A full
    disk is an OSError with errno ENOSPC, whoever wrote.
    """
    beside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    retired = folder.with_name(f".{folder.name}.retired-{os.getpid()}")
    mend(folder)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                with path.open("rb") as f:
                    os.fsync(f.fileno())
        if folder.exists():
            folder.rename(retired)
        beside.rename(folder)
    except BaseException as e:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)
        if NO_SPACE in str(e) and not isinstance(e, OSError):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from e
        raise
    shutil.rmtree(retired, ignore_errors=True)


def mend(folder: Path) -> None:
    """Puts back what a process that was killed between two renames set aside; clears its rest."""
    for retired in folder.parent.glob(f".{folder.name}.retired-*"):
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.rename(folder)
    for unfinished in folder.parent.glob(f".{folder.name}.writing-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def forget_origins(folder: Path) -> None:
    """Takes the paths that networks were loaded from out of the configs of a pipeline folder."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text("utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes beside `path` and renames, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
