"""Faults, injected for real into a run in its own process: its end, its words, what is left."""

import contextlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
from safetensors.torch import load_file

from flashdmd import checkpoint, cli
from flashdmd.replay import replay

SECONDS = 120
Before = Callable[[], object]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tiny.score_folder(tmp_path_factory.mktemp("faults") / "teacher")
    return made


def recipe(teacher: Path, output: Path, **train: Any) -> Path:
    """Endless unless told otherwise."""
    numbers = {"train_batch_size": 2, "max_train_steps": 10**6, "checkpointing_steps": 1}
    fixed = {"gan_gradient_ratio": None}
    return tiny_run.recipe(teacher, output, numbers | train, method=fixed)


class Run:
    """`flashdmd train` in a fork, what it says in a file."""

    def __init__(self, path: Path, said: Path, before: Before = lambda: None) -> None:
        self.said = said

        def work() -> None:
            os.setsid()
            words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(words, 1), os.dup2(words, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            logging.getLogger().handlers.clear()  # pytest's
            sys.argv = ["flashdmd", "train", str(path)]
            before()
            cli.main()

        self.process = multiprocessing.get_context("fork").Process(target=work)
        self.process.start()

    def end(self) -> tuple[int | None, str]:
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
        return self.process.exitcode, self.said.read_text()

    def wait_for(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + SECONDS
        while not done():
            assert self.process.is_alive(), self.said.read_text()
            assert time.monotonic() < until
            time.sleep(0.01)


def iterations(output: Path) -> int:
    log = output / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_130(number: int, teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = Run(recipe(teacher, output, checkpointing_steps=0), tmp_path / "said")
    run.wait_for(lambda: iterations(output) >= 3)
    assert run.process.pid
    os.kill(run.process.pid, number)
    asked = time.monotonic()
    code, said = run.end()
    assert code == 130
    assert time.monotonic() - asked < 30  # Kubernetes' and torchrun's grace
    assert "the same command goes on from there" in said
    newest = checkpoint.latest(output)
    assert newest is not None
    assert checkpoint.state_of(newest)["iteration"] == iterations(output)


def test_a_signal_before_there_is_anything_ends_with_130(teacher: Path, tmp_path: Path) -> None:
    run = Run(recipe(teacher, tmp_path / "run"), tmp_path / "said")
    run.wait_for(lambda: (tmp_path / "run").is_dir())  # it is loading
    assert run.process.pid
    os.kill(run.process.pid, signal.SIGTERM)
    code, said = run.end()
    assert code == 130, said
    assert "Traceback" not in said


def test_what_stays_not_finite_stops_and_keeps_the_last_good(teacher: Path, tmp_path: Path) -> None:
    """A rate that no network stands: after its first update everything it draws is infinite."""
    output = tmp_path / "run"
    good = recipe(teacher, output, max_train_steps=2)
    run = Run(good, tmp_path / "said")
    run.wait_for(lambda: (output / "student/model_index.json").exists())
    run.process.kill()
    run.end()
    kept = checkpoint.latest(output)
    assert kept is not None
    before = {path.name: path.read_bytes() for path in kept.iterdir()}

    bad = recipe(teacher, output, learning_rate=1e30, max_bad_iterations=3)
    code, said = Run(bad, tmp_path / "said").end()
    assert code == 2, said
    assert "not finite: iteration" in said
    assert "3 iterations in a row" in said
    assert "with lower learning rates goes on from there" in said
    assert checkpoint.latest(output) == kept
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    folders = sorted((output / "not-finite").iterdir())
    assert len(folders) == 3
    for folder in folders:
        facts = json.loads((folder / "facts.json").read_text())
        assert (facts["seed"], facts["stage"]) == (0, "distill")
        assert folder.name == f"distill-{facts['iteration']}-process-0"
        assert facts["not_finite"]
        assert load_file(folder / "batch.safetensors")["noise"].shape[0] == 2
    told = replay(folders[-1])
    facts = json.loads((folders[-1] / "facts.json").read_text())
    assert told["iteration"] == facts["iteration"]
    assert not told["finite"]
    assert told["first_operation"] or told["not_finite"] == facts["not_finite"]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_out_of_memory_says_what_to_lower(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = Run(recipe(teacher, output, max_train_steps=1), tmp_path / "said")
    first.wait_for(lambda: checkpoint.all_of(output) != [])
    first.process.kill()
    first.end()

    def less_room() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 700 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    large = recipe(teacher, tmp_path / "large", train_batch_size=1024)
    code, said = Run(large, tmp_path / "said", less_room).end()
    assert code == 2, said
    assert "out of memory" in said
    for named in ("gradient_accumulation_steps", "gradient_checkpointing", "doctor"):
        assert named in said
    assert "Traceback" not in said


def test_a_read_only_folder_is_named(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = f"mount -t tmpfs -o ro,size=1m tmpfs {folder}"
    if os.geteuid() or os.system(f"{mount} 2>/dev/null"):
        pytest.skip("cannot mount a file system here")
    try:
        path = recipe(teacher, tmp_path / "other")
        path.write_text(path.read_text().replace(str(tmp_path / "other"), str(folder / "run")))
        code, said = Run(path, tmp_path / "said").end()
    finally:
        os.system(f"umount {folder}")
    assert code == 2, said
    assert "Read-only file system" in said
    assert str(folder / "run") in said
    assert "Traceback" not in said


@pytest.mark.parametrize("fault", ["truncated", "family"])
def test_a_broken_or_foreign_checkpoint_is_told(fault: str, teacher: Path, tmp_path: Path) -> None:
    """Truncated: an older one is gone on from. Of another network: refused, and left alone."""
    output = tmp_path / "run"
    run = Run(recipe(teacher, output, max_train_steps=3), tmp_path / "said")
    run.wait_for(lambda: len(checkpoint.all_of(output)) == 2)
    run.process.kill()
    run.end()
    older, newest = checkpoint.all_of(output)
    again = recipe(teacher, output, max_train_steps=4)
    if fault == "truncated":
        file = newest / "score.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        goes_on = Run(again, tmp_path / "said")
        goes_on.wait_for(lambda: f"{newest} is damaged" in (tmp_path / "said").read_text())
        goes_on.process.kill()
        _, said = goes_on.end()
        assert "score.safetensors has" in said
        assert newest.is_dir()
        return
    flow = tiny.flow_folder(tmp_path / "flow")
    with contextlib.suppress(FileNotFoundError):
        (output / "recipe.yaml").unlink()  # else it is the recipe that is told to be another
    text = again.read_text().replace(str(teacher), str(flow))
    steps = "method:\n  student_timesteps: [1000, 750, 500, 250]\n"
    again.write_text(text.replace("method:\n", steps))
    code, said = Run(again, tmp_path / "said").end()
    assert code == 2, said
    assert "is of another network" in said
    assert checkpoint.damage(newest) is None
    assert checkpoint.damage(older) is None
