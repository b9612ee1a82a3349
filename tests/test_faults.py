"""Faults, injected for real into a run in its own process: its end, its words, what is left."""

import atexit
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pytest
import tiny
import tiny_run
from faults import Figure, Lost, contents, lost_files, lost_iterations
from safetensors.torch import load_file

from flashdmd import checkpoint, cli, config
from flashdmd.files import mend_all
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
        atexit.register(self.process.kill)  # of a test that failed: else it is waited for

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


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            signal.SIGTERM, marks=pytest.mark.fault("stop: SIGTERM", "while a run iterates")
        ),
        pytest.param(
            signal.SIGINT, marks=pytest.mark.fault("stop: SIGINT", "while a run iterates")
        ),
    ],
)
def test_a_signal_saves_and_ends_with_130(
    number: int, teacher: Path, tmp_path: Path, lost: Lost, figure: Figure, chance: random.Random
) -> None:
    output = tmp_path / "run"
    run = Run(recipe(teacher, output, checkpointing_steps=0), tmp_path / "said")
    run.wait_for(lambda: iterations(output) >= 3)
    time.sleep(chance.uniform(0, 0.1))  # an iteration takes about as long
    assert run.process.pid
    os.kill(run.process.pid, number)
    asked = time.monotonic()
    code, said = run.end()
    figure("from a signal until a small run has saved and ended", time.monotonic() - asked, "s")
    assert code == 130
    assert time.monotonic() - asked < 30  # Kubernetes' and torchrun's grace
    assert "the same command goes on from there" in said
    lost(lost_iterations(output), "iterations")
    assert lost_iterations(output) == 0


def test_a_signal_before_there_is_anything_ends_with_130(teacher: Path, tmp_path: Path) -> None:
    run = Run(recipe(teacher, tmp_path / "run"), tmp_path / "said")
    run.wait_for(lambda: (tmp_path / "run").is_dir())  # it is loading
    assert run.process.pid
    os.kill(run.process.pid, signal.SIGTERM)
    code, said = run.end()
    assert code == 130, said
    assert "stopped; what was saved before is intact, and the same command uses it" in said
    assert "Traceback" not in said


@pytest.mark.fault("numbers: losses that stay not finite", "a rate of 1e30, from a checkpoint on")
def test_what_stays_not_finite_stops_and_keeps_the_last_good(
    teacher: Path, tmp_path: Path, lost: Lost
) -> None:
    """A rate that no network stands: after its first update everything it draws is infinite."""
    output = tmp_path / "run"
    good = recipe(teacher, output, max_train_steps=2)
    run = Run(good, tmp_path / "said")
    run.wait_for(lambda: (output / "student/model_index.json").exists())
    run.process.kill()
    run.end()
    kept = checkpoint.latest(output)
    assert kept is not None
    before = contents(kept)
    assert lost_iterations(output) == 0

    endless = recipe(teacher, output, learning_rate=1e30, max_bad_iterations=10**6)
    run = Run(endless, tmp_path / "said")
    run.wait_for(lambda: len(list((output / "not-finite").glob("distill-*"))) >= 2)
    assert run.process.pid
    os.kill(run.process.pid, signal.SIGTERM)
    code, said = run.end()
    assert code == 130, said
    assert "is from before them" in said
    assert checkpoint.latest(output) == kept  # what led there is not saved
    assert contents(kept) == before

    bad = recipe(teacher, output, learning_rate=1e30, max_bad_iterations=3)
    code, said = Run(bad, tmp_path / "said").end()
    assert code == 2, said
    assert "not finite: iteration" in said
    assert "3 of these updates in a row" in said
    assert "with lower learning rates goes on from there" in said
    assert checkpoint.latest(output) == kept
    assert contents(kept) == before
    lost(lost_iterations(output), "iterations, all at that rate")
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
    assert contents(kept) == before


@pytest.mark.fault("memory: none left", "RLIMIT_AS, 1 GiB; 2048 preferences at once in stage 2")
def test_out_of_memory_says_what_to_lower(tmp_path: Path, lost: Lost) -> None:
    output = tmp_path / "run"

    def less_room() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    short = ("train.max_train_steps=1", "train.gan_calibration_steps=[0, 1]")
    parts, many = kills.ingredients(tmp_path / "parts"), "train.preference_batch_size=2048"
    large = tmp_path / "large.yaml"
    large.write_text(config.dump(kills.recipe_of("both stages", parts, output, *short, many)))
    code, said = Run(large, tmp_path / "said", less_room).end()
    assert code == 2, said
    assert "out of memory" in said
    for named in ("gradient_accumulation_steps", "gradient_checkpointing", "doctor"):
        assert named in said
    assert "Traceback" not in said
    newest = checkpoint.latest(output)
    assert newest is not None
    assert newest.name == "checkpoint-2"  # where stage 1 ended
    lost(lost_iterations(output), "iterations")


@pytest.mark.fault("disk: read-only", "a tmpfs, mounted anew with `ro` between two starts of a run")
def test_a_read_only_folder_is_named(teacher: Path, tmp_path: Path, lost: Lost) -> None:
    disk, output = tmp_path / "disk", tmp_path / "disk/run"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=64m tmpfs {disk} 2>/dev/null"):
        pytest.skip("cannot mount a file system here")
    try:
        run = Run(recipe(teacher, output, max_train_steps=1), tmp_path / "said")
        run.wait_for(lambda: (output / "student/model_index.json").exists())
        run.process.kill()
        run.end()
        before, more = contents(output), recipe(teacher, output, max_train_steps=2)
        assert os.system(f"mount -o remount,ro {disk}") == 0
        code, said = Run(more, tmp_path / "said").end()
        lost(lost_files(before, output), "files")
        assert contents(output) == before
        assert os.system(f"mount -o remount,rw {disk}") == 0
        run = Run(more, tmp_path / "again")
        run.wait_for(lambda: (output / "checkpoint-4").exists())
        run.process.kill()
        run.end()
    finally:
        os.system(f"umount --lazy {disk}")
    assert code == 2, said
    assert "Read-only file system" in said
    assert str(output) in said
    assert "Traceback" not in said


@pytest.mark.fault("stop: two runs in one folder", "the same command, while it runs")
def test_a_second_run_in_a_folder_is_refused(teacher: Path, tmp_path: Path, lost: Lost) -> None:
    output = tmp_path / "run"
    path = recipe(teacher, output, checkpointing_steps=0)
    first = Run(path, tmp_path / "first")
    first.wait_for(lambda: iterations(output) >= 2)
    code, said = Run(path, tmp_path / "second").end()
    assert code == 2, said
    assert f"another process is writing to {output}" in said
    done = iterations(output)
    first.wait_for(lambda: iterations(output) > done)
    assert first.process.pid
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.end()[0] == 130
    lost(lost_iterations(output), "iterations of the first")
    assert lost_iterations(output) == 0


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            "truncated",
            marks=pytest.mark.fault(
                "checkpoint: a file is truncated", "half of the newest one's score.safetensors"
            ),
        ),
        pytest.param(
            "family",
            marks=pytest.mark.fault(
                "checkpoint: of another family", "a flow teacher for one that predicts noise"
            ),
        ),
    ],
)
def test_a_broken_or_foreign_checkpoint_is_told(
    fault: str, teacher: Path, tmp_path: Path, lost: Lost
) -> None:
    """Truncated: an older one is gone on from. Of another network: refused, and left alone."""
    output = tmp_path / "run"
    run = Run(recipe(teacher, output, max_train_steps=3), tmp_path / "said")
    run.wait_for(lambda: (output / "student/model_index.json").exists())
    run.process.kill()
    run.end()
    newest = checkpoint.all_of(output)[-1]
    again = recipe(teacher, output, max_train_steps=4)
    if fault == "truncated":
        file = newest / "score.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        lost(lost_iterations(output), "iterations")
        goes_on = Run(again, tmp_path / "said")
        goes_on.wait_for(lambda: (output / "checkpoint-8").exists())
        goes_on.process.kill()
        _, said = goes_on.end()
        assert f"{newest} is damaged" in said
        assert "score.safetensors has" in said
        assert newest.with_name(f"{newest.name}.damaged").is_dir()
        return
    mend_all(output)  # of what the kill left half written, as every start does
    before = contents(output)
    flow = tiny.flow_folder(tmp_path / "flow")
    del before["recipe.yaml"]
    (output / "recipe.yaml").unlink()  # as where checkpoints alone were brought here
    text = again.read_text().replace(str(teacher), str(flow))
    steps = "method:\n  student_timesteps: [1000, 750, 500, 250]\n"
    again.write_text(text.replace("method:\n", steps))
    code, said = Run(again, tmp_path / "said").end()
    assert code == 2, said
    assert "holds a run of another recipe" in said
    assert f"model.pretrained_model_name_or_path: was '{teacher}', is '{flow}'" in said
    lost(lost_files(before, output), "files")
    assert lost_files(before, output) == 0
