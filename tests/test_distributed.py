"""Several processes make the run that one makes: real ones, joined by gloo."""

import math
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import free_port, together
from test_faults import Run
from test_trainer import batches, changed, dmd2_trainer, trainer, weights

from flashdmd import distributed, draws
from flashdmd.algorithm import Loss, Method, Rollout, Update
from flashdmd.errors import UserError
from flashdmd.trainer import Batch, Trainer


def of_rows(t: Trainer) -> Trainer:
    """Draws this process's rows of the whole batch."""

    def own(n: int, updates: Any) -> Batch:
        return batches(n, updates).split(distributed.ranks())[distributed.rank()]

    t.batches = own
    return t


def ends(make: Any, iterations: int) -> tuple[list[dict[str, float]], dict[str, Any], Any]:
    t = of_rows(make())
    logs = [t.iterate() for _ in range(iterations)]
    return logs, weights(t), t.state


MADE = {
    "joint": (trainer, 14),
    "distill": (lambda: trainer("distill", parts=2), 4),
    "calibrated": (lambda: trainer("distill", calibration=(1, 3)), 8),
    "dmd2": (dmd2_trainer, 10),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("make", MADE)
def test_several_processes_make_the_updates_of_one(make: str, ranks: int) -> None:
    """Each network, both stages, to rounding: the draws of a batch are the same however cut."""
    alone, whole, state = ends(*MADE[make])
    for logs, split, theirs in together(lambda: ends(*MADE[make]), ranks):
        assert theirs.updates == state.updates
        assert (theirs.images, theirs.iteration) == (state.images, state.iteration)
        assert theirs.gan_loss_weight == pytest.approx(state.gan_loss_weight, rel=1e-4)
        for a, b in zip(alone, logs, strict=True):
            for name in ("seconds", "latent/std"):  # of a batch, not a mean over it
                a.pop(name, None), b.pop(name, None)
            assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
        for name, ours in whole.items():
            for p, q in zip(ours, split[name], strict=True):
                torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-6)


def test_parts_draw_their_rows_of_the_whole() -> None:
    def drawn(rows: int) -> list[torch.Tensor]:
        like = torch.zeros(rows, 3, 5)
        return [draws.normal(like), draws.integers(3, 9, like), draws.uniform(like)]

    torch.manual_seed(1)
    whole, after = drawn(6), torch.rand(1)
    parts = []
    torch.manual_seed(1)
    for i in range(3):
        with draws.rewound("cpu"), draws.part(i, 3):
            parts.append(drawn(2))
    drawn(6)
    assert torch.equal(torch.rand(1), after)
    for one, *cut in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(cut), one)


def test_what_one_has_all_know() -> None:
    def work() -> tuple[Any, ...]:
        me = distributed.rank()
        grads = [torch.full((3,), float(me)), torch.full((2, 2), 10.0 * me).double()]
        distributed.average(grads)
        return (
            distributed.any_of(me == 1),
            distributed.any_of(False),
            distributed.mean({"a": float(me), "b": float("nan") if me == 1 else 0.0}),
            distributed.everyones([f"{item} of {me}" for item in distributed.own(range(7))]),
            grads,
        )

    for flag, none, mean, dealt, grads in together(work, 3):
        assert (flag, none, mean["a"]) == (True, False, 1.0)
        assert mean["b"] != mean["b"]
        assert dealt == [f"{i} of {i % 3}" for i in range(7)]
        assert grads[0].tolist() == [1.0] * 3
        assert grads[1].dtype == torch.float64
        assert grads[1].flatten().tolist() == [10.0] * 4


def test_the_first_goes_first(tmp_path: Path) -> None:
    def work() -> list[str]:
        with distributed.first_alone():
            (tmp_path / f"{distributed.rank()}").touch()
            return sorted(p.name for p in tmp_path.iterdir())

    seen = together(work, 3)
    assert seen[0] == ["0"]
    assert all("0" in names for names in seen)


def test_processes_that_differ_are_told() -> None:
    def work() -> str:
        distributed.agree("same", "nothing")
        with pytest.raises(UserError, match="differ in weights: a, b"):
            distributed.agree("ab"[distributed.rank()], "weights")
        return "told"

    assert together(work) == ["told"] * 2


SECOND = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be a whole number"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR"),
        (SECOND | {"RANK": "x"}, "RANK=x must be a whole number from 0 to 1"),
        (SECOND | {"RANK": "5"}, "RANK=5 must be a whole number from 0 to 1"),
        (SECOND | {"RANK": "-1"}, "RANK=-1 must be"),
        (SECOND | {"LOCAL_RANK": "one"}, "LOCAL_RANK=one must be"),
        (SECOND | {"MASTER_PORT": "http"}, "MASTER_PORT=http must be"),
        (SECOND | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 must be.* from 1 to 65535"),
        (SECOND | {distributed.TIMEOUT: "nan"}, "MINUTES=nan must be a number of minutes"),
        (SECOND | {distributed.TIMEOUT: "0"}, "MINUTES=0 must be a number of minutes"),
        (SECOND | {distributed.TIMEOUT: "soon"}, "MINUTES=soon must be a number of minutes"),
    ],
)
def test_an_environment_that_makes_no_sense(
    given: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says), distributed.joined():
        pass


def waiting(said: Path, **given: str) -> Run:
    """The command as one of two processes of which the other never comes."""

    def before() -> None:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(free_port()), **given}
        said.with_name("begun").touch()

    return Run(Path("recipe.yaml"), said, before)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_does_not_come_is_told(rank: str, tmp_path: Path) -> None:
    code, said = waiting(tmp_path / "said", RANK=rank, FLASHDMD_TIMEOUT_MINUTES="0.01").end()
    assert code == 75, said
    assert f"process {rank}: the 2 processes of this run did not all come to MASTER_ADDR=" in said
    assert "FLASHDMD_TIMEOUT_MINUTES=0.01" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_the_others(number: int, rank: str, tmp_path: Path) -> None:
    run = waiting(tmp_path / "said", RANK=rank)
    run.wait_for((tmp_path / "begun").exists)
    time.sleep(0.5)
    assert run.process.pid
    os.kill(run.process.pid, number)
    asked = time.monotonic()
    code, said = run.end()
    assert code == 130, said
    assert time.monotonic() - asked < 5
    assert "stopped" in said


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_port_that_another_program_has_is_told(rank: str, tmp_path: Path) -> None:
    """It is that of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        given = {"MASTER_PORT": port, "FLASHDMD_TIMEOUT_MINUTES": "0.01"}
        code, said = waiting(tmp_path / "said", RANK=rank, **given).end()
    assert code == (2 if rank == "0" else 75), said
    assert f"MASTER_PORT={port}" in said
    assert "Traceback" not in said


def test_the_others_wait_for_the_first_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice: what it told the first time does not count the second."""
    monkeypatch.setenv("FLASHDMD_TIMEOUT_MINUTES", "0.03")
    began = time.monotonic()

    def work() -> float:
        for seconds in (0.2, 3.0):
            with distributed.first_alone():
                time.sleep(seconds * distributed.first())
        return time.monotonic() - began

    assert min(together(work)) > 3.0


@pytest.mark.parametrize(
    "error", [dist.DistStoreError("wait"), RuntimeError("Gloo: reset by peer")]
)
def test_the_end_of_another_process_is_known_also_at_the_start(error: RuntimeError) -> None:
    assert distributed.lost(error)
    assert not distributed.lost(RuntimeError("mat1 and mat2"))


@pytest.mark.parametrize("update", ["generator", "score"])
def test_what_is_not_finite_in_one_process_is_skipped_by_all(update: str) -> None:
    """Of one iteration, in the second of two; they are equal before, then and after."""

    def work() -> tuple[Any, ...]:
        t = of_rows(trainer("distill", Method(score_coupling=1.0)))
        loss = t.loss

        def poisoned(asked: Update, samples: Rollout | None, batch: Batch) -> Loss:
            terms, watch = loss(asked, samples, batch)
            bad = asked == update and distributed.rank() == 1
            return Loss({k: v * math.nan for k, v in terms.items()} if bad else terms, watch)

        t.iterate()
        t.iterate()
        before, counts = weights(t), dict(t.state.updates)
        t.loss = poisoned  # type: ignore[method-assign]
        record = t.iterate()
        then, skipped = weights(t), counts[update] == t.state.updates[update]
        t.loss = loss  # type: ignore[method-assign]
        logs = [t.iterate() for _ in range(2)]
        own = changed(before, then)
        return skipped, record.get(f"{update}/skipped"), own, then, weights(t), logs

    one, two = together(work)
    for skipped, told, own, *_ in (one, two):
        assert skipped
        assert told == 1
        assert update not in own
    assert not changed(one[3], two[3])
    assert not changed(one[4], two[4])
    assert all(not log.keys() & {f"{update}/skipped"} for log in one[5])
