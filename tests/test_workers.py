"""Batches drawn ahead by processes that are killed, interrupted and left alone, all for real."""

import contextlib
import logging
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from faults import Lost, lost_iterations
from test_batches import DISTIL, FOLLOW, MADE, PREFER, drawn, folder, same
from test_faults import Run

from flashdmd.algorithm import Method
from flashdmd.batches import Batches, EmojiSource
from flashdmd.data.workers import DEATHS, Workers
from flashdmd.errors import UserError
from flashdmd.files import alone_in
from flashdmd.models.teacher import Teacher, load_pipeline

ORDER = (DISTIL, FOLLOW, PREFER)
SECONDS = 30


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_pipeline(tiny.score_folder(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def world() -> EmojiSource:
    return EmojiSource()


@contextlib.contextmanager
def drawing(draw: Callable[[int], Any], number: int, room: int = 10**6) -> Iterator[Workers[Any]]:
    workers = Workers(draw, number, room)
    try:
        yield workers
    finally:
        workers.close()


def children(of: int) -> list[int]:
    tasks = Path(f"/proc/{of}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


def there(process: int) -> bool:
    """Not even as a zombie, which waits for a parent that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon(done: Callable[[], bool], seconds: float = SECONDS) -> bool:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize(
    ("name", "number"),
    [("emoji", 1), ("emoji and prompts", 2), ("broken", 3), ("tars", 2), ("latents", 1)],
)
def test_workers_draw_what_the_process_itself_draws(
    name: str, number: int, teacher: Teacher, world: EmojiSource, tmp_path: Path
) -> None:
    made = replace(MADE[name](teacher, world, tmp_path), reward_encoder=teacher.encode_prompts)
    with_workers = replace(made, workers=number, order=ORDER)
    try:
        for n in (7, 8, 9, 10, 2, 3):  # begun at 7, then gone back
            updates = ORDER[n % 3]
            alone, theirs = made.drawn(n, updates), with_workers.taken(n, updates)
            if alone.pictures is not None:  # and as they lie in memory: convolutions round by that
                assert alone.pictures.strides == theirs.pictures.strides
            assert same(drawn(with_workers, n, updates)[0], drawn(made, n, updates)[0])
            assert (alone.captions, alone.failed) == (theirs.captions, theirs.failed)
    finally:
        with_workers.close()


def test_arrays_that_find_no_room_come_all_the_same() -> None:
    def draw(n: int) -> dict[str, np.ndarray]:
        return {"a": np.full((5, 7, 3), n).transpose(2, 0, 1), "b": np.arange(n)}

    for room in (10**6, 1000, 1):
        with drawing(draw, 2, room) as workers:
            for n in range(6):
                answer = workers(n)
                assert np.array_equal(answer["a"], draw(n)["a"])
                assert answer["a"].strides == draw(n)["a"].strides
                assert np.array_equal(answer["b"], draw(n)["b"])
                answer["a"] += 1  # it is the taker's own


def test_answers_stay_when_the_next_are_drawn() -> None:
    with drawing(lambda n: np.full(1000, n), 1) as workers:
        answers = [workers(n) for n in range(5)]
        assert [set(a.tolist()) for a in answers] == [{n} for n in range(5)]


def test_workers_draw_ahead() -> None:
    def draw(n: int) -> float:
        time.sleep(0.1)
        return time.monotonic()

    with drawing(draw, 2) as workers:
        workers(0)
        time.sleep(0.7)  # 1 and 3 by the second, 2 and 4 by the first
        asked = time.monotonic()
        assert all(workers(n) < asked for n in (1, 2, 3, 4))
        assert workers(5) > asked


@pytest.mark.fault("data: a worker is killed", "SIGKILL of both of two, later of one")
def test_a_worker_that_is_killed_costs_nothing_but_time(
    teacher: Teacher,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lost: Lost,
    chance: random.Random,
) -> None:
    made = Batches(teacher, folder(tmp_path / "x"), Method(), 4, 0)
    with_workers = replace(made, workers=2, order=ORDER)
    others = 0
    try:
        for n in range(12):
            updates = ORDER[n % 3]
            if killed := {3: 2, 7: 1}.get(n, 0):
                time.sleep(chance.uniform(0, 0.02))  # about as long as a batch takes
            for worker in with_workers.ahead.running[:killed]:
                os.kill(worker.process.pid, signal.SIGKILL)
            others += not same(drawn(with_workers, n, updates)[0], drawn(made, n, updates)[0])
            assert len(children(os.getpid())) == 2
    finally:
        with_workers.close()
    assert not children(os.getpid())
    lost(others, "batches")
    assert not others
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all(
        re.search(r"worker \d+ ended by SIGKILL; new ones draw batch \d+ ag", t) for t in told
    )


def test_workers_that_die_again_and_again_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def draw(n: int) -> int:
        if n == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    with drawing(draw, 2) as workers:
        assert [workers(n) for n in range(4)] == [0, 1, 2, 3]
        with pytest.raises(UserError, match=r"3 data workers .*batch 4 .*SIGKILL.*lower data\.da"):
            workers(4)
        assert len(caplog.records) == DEATHS - 1
        assert workers(5) == 5
    with (
        drawing(lambda n: os._exit(3), 1) as workers,
        pytest.raises(UserError, match="itself with code 3"),
    ):
        workers(0)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (UserError("the data are gone"), UserError, "the data are gone"),
        (FileNotFoundError(2, "gone", "x.png"), FileNotFoundError, "x.png"),
        (ZeroDivisionError("why"), RuntimeError, "ZeroDivisionError: why"),
    ],
)
def test_an_error_of_a_worker_is_told_as_it_is(
    error: Exception, kind: type[Exception], says: str
) -> None:
    def draw(n: int) -> int:
        if n == 2:
            raise error
        return n

    with drawing(draw, 2) as workers:
        assert [workers(n) for n in range(2)] == [0, 1]
        with pytest.raises(kind, match=says):
            workers(2)


def test_what_workers_cannot_read_is_told_once(teacher: Teacher, tmp_path: Path) -> None:
    made = Batches(teacher, folder(tmp_path / "x", 4), Method(), 8, 0, workers=3, order=(FOLLOW,))
    said = logging.FileHandler(tmp_path / "said")  # the workers inherit it
    logging.getLogger().addHandler(said)
    try:
        for n in range(12):
            made(n, FOLLOW)
    finally:
        logging.getLogger().removeHandler(said)
        made.close()
    told = [x for x in (tmp_path / "said").read_text().splitlines() if "is left out" in x]
    assert len(told) == len(set(told)) == len(made.source.failed) == 8


def test_workers_leave_the_gpu_and_ctrl_c_alone() -> None:
    def draw(n: int) -> tuple[bool, object, object]:
        return (
            torch.cuda.is_initialized(),
            signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM),
        )

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with drawing(draw, 1) as workers:
            assert workers(0) == (False, signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before)


def recipe(folder: Path, **train: object) -> Path:
    """Endless, on pictures of its own, with two workers."""
    content = {
        "model": {
            "pretrained_model_name_or_path": str(folder / "teacher"),
            "reward_model_name_or_path": None,
        },
        "data": {"train_data_dir": str(folder / "pictures"), "dataloader_num_workers": 2},
        "method": {"gan_gradient_ratio": None},
        "train": {
            "train_batch_size": 2, "max_train_steps": 10**6, "joint_train_steps": 0,
            "device": "cpu", "mixed_precision": "no", "checkpointing_steps": 2,
        } | train,
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def begun(path: Path) -> tuple[Run, list[int]]:
    """A run that has made an iteration, and its workers."""
    run, log = Run(path, path.parent / "said"), path.parent / "run/metrics.jsonl"
    run.wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    workers = children(run.process.pid)
    assert len(workers) == 2
    return run, workers


@pytest.mark.fault("stop: Ctrl-C, or SIGTERM to a group", "killpg of a run and its data workers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_with_all_its_group_saves_and_leaves_no_one(
    number: signal.Signals, teacher: Teacher, tmp_path: Path, lost: Lost
) -> None:
    (tmp_path / "teacher").symlink_to(teacher.folder)
    folder(tmp_path / "pictures")
    run, workers = begun(recipe(tmp_path))
    os.killpg(run.process.pid, number)
    code, said = run.end()
    assert code == 130, said
    assert "saved in" in said
    assert "Traceback" not in said
    lost(lost_iterations(tmp_path / "run"), "iterations")
    assert lost_iterations(tmp_path / "run") == 0
    assert not any(map(there, workers))
    with pytest.raises(ProcessLookupError):
        os.killpg(run.process.pid, 0)


def test_a_run_that_is_killed_takes_its_workers_along(teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "teacher").symlink_to(teacher.folder)
    folder(tmp_path / "pictures")
    run, workers = begun(recipe(tmp_path))
    run.process.kill()
    assert run.end()[0] == -signal.SIGKILL
    assert soon(lambda: not any(map(there, workers)), 2)
    with alone_in(tmp_path / "run"):  # the lock was the workers' too
        pass
