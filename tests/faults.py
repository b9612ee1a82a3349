"""What a fault cost a run: what was done and is not in what is gone on from."""

import json
from collections.abc import Callable
from pathlib import Path

from flashdmd import checkpoint

Lost = Callable[[int, str], None]  # conftest's fixtures `lost` and `figure`
Figure = Callable[[str, float, str], None]


def lost_iterations(output: Path) -> int:
    """Logged, but not in the newest checkpoint that is whole: to be made again."""
    log = output / "metrics.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []  # a torn one is none
    done = [(line["stage"], line["iteration"]) for line in map(json.loads, lines)]
    newest = checkpoint.latest(output)
    if newest is None:
        return len(done)
    state = checkpoint.state_of(newest)
    return len(done) - 1 - done.index((state["stage"], state["iteration"]))


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def lost_files(before: dict[str, bytes], folder: Path) -> int:
    """Those that are gone or not as they were."""
    now = contents(folder)
    return sum(now.get(name) != content for name, content in before.items())
