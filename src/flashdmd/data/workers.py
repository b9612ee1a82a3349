"""Processes that draw ahead of who trains, and may be killed: what they draw is drawn again."""

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from mmap import mmap
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar, cast

from flashdmd.errors import UserError

DEATHS = 3  # one after the other, without a batch in between
ASKING = {signal.SIGINT, signal.SIGTERM}  # the parent to stop
PR_SET_PDEATHSIG = 1  # linux/prctl.h

log = logging.getLogger(__name__)
T = TypeVar("T")


class Worker(NamedTuple):
    process: BaseProcess
    line: Connection
    room: mmap  # shared; holds the arrays of an answer


class Workers(Generic[T]):
    """What `draw` gives of n, n + 1, ...: worker k of `number` draws every n that is k modulo
    `number`, one that waits to be taken and one more.

    They are forked: what a catalogue holds is shared and nothing is imported again. So `draw` may
    use no network, GPU or lock of another thread's. Ctrl-C does not reach them, and they end with
    their parent, however that ends. They are not heard: what is to be told, `draw` returns. Arrays
    of up to `room` bytes an answer need no pipe, nor any of /dev/shm, which is small in containers.
    """

    def __init__(self, draw: Callable[[int], T], number: int, room: int) -> None:
        self.draw, self.number, self.room = draw, number, room
        self.running: list[Worker] = []
        self.due: int | None = None  # what is taken next
        weakref.finalize(self, end, self.running)

    def __call__(self, n: int) -> T:
        """Raises what `draw` raised, and UserError when workers die one after the other."""
        deaths: list[str] = []
        while len(deaths) < DEATHS:
            if n != self.due:
                self.start(n)
            worker = self.running[n % self.number]
            try:
                fine, answer = take(worker)
            except (EOFError, OSError):
                self.due = None
                deaths.append(how_it_ended(worker))
                if len(deaths) < DEATHS:
                    log.warning("data worker %s; new ones draw batch %d again", deaths[-1], n)
                continue
            self.due = n + 1
            if fine:
                return cast(T, answer)
            raise answer
        raise UserError(
            f"{DEATHS} data workers ended before one had drawn batch {n} ({'; '.join(deaths)}); "
            "SIGKILL is what a machine out of memory sends: lower data.dataloader_num_workers (0: "
            "the training process draws itself) or train.train_batch_size, or give it more memory"
        )

    def start(self, n: int) -> None:
        """Workers for n, n + 1 and so on. Raises UserError when the system has no room for them."""
        self.close()
        try:
            for k in range(self.number):
                self.running.append(self.one(n + (k - n) % self.number))
        except (OSError, ValueError) as e:  # ValueError: a system that cannot fork
            raise UserError(
                f"data.dataloader_num_workers={self.number}: they cannot be started here ({e}); "
                "lower it (0: the training process draws itself)"
            ) from e
        self.due = n

    def one(self, first: int) -> Worker:
        fork = multiprocessing.get_context("fork")
        room, (mine, theirs) = mmap(-1, self.room), fork.Pipe()
        others = [worker.line for worker in self.running] + [mine]
        arguments = self.draw, first, self.number, theirs, room, others, os.getpid()
        process = fork.Process(target=work, args=arguments, daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()  # else its end would not be seen
        return Worker(process, mine, room)

    def close(self) -> None:
        """Ends the workers; they are made again when something is asked."""
        end(self.running)
        self.due = None


def take(worker: Worker) -> Any:
    """An answer; the next may take its room. Raises EOFError or OSError for a worker that ended."""
    head, sizes = worker.line.recv()
    at, arrays = 0, []
    with memoryview(worker.room) as room:
        for size in sizes:
            arrays.append(bytearray(room[at : at + size]))
            at += size
    with suppress(OSError):  # it may have ended since
        worker.line.send_bytes(b"taken")
    return pickle.loads(head, buffers=arrays)


def work(
    draw: Callable[[int], T],
    first: int,
    step: int,
    line: Connection,
    room: mmap,
    others: list[Connection],
    parent: int,
) -> None:
    """What a worker does until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    if sys.platform == "linux":  # elsewhere it ends when it has drawn
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for other in others:
        other.close()
    logging.disable()
    for n in count(first, step):
        answer = answered(draw, n)
        try:
            if n > first:
                line.recv_bytes()
            put(line, answer, room)
        except (EOFError, OSError):  # the parent is gone
            return


def answered(draw: Callable[[int], T], n: int) -> tuple[bool, T | Exception]:
    try:
        return True, draw(n)
    except (UserError, OSError, MemoryError) as e:
        return False, e
    except Exception:  # it may be of a kind that does not travel
        return False, RuntimeError(traceback.format_exc())


def put(line: Connection, answer: object, room: mmap) -> None:
    """Arrays into the room, as they lie in memory, and the rest into the line; all, if need be."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(answer, 5, buffer_callback=arrays.append)
    raw = [array.raw() for array in arrays]
    if sum(map(len, raw)) > len(room):
        head, raw = pickle.dumps(answer, 5), []
    room.seek(0)
    for array in raw:
        room.write(array)
    line.send((head, [len(array) for array in raw]))


def how_it_ended(worker: Worker) -> str:
    worker.process.join(1)
    worker.process.kill()
    worker.process.join()
    code = worker.process.exitcode or 0
    return f"{worker.process.pid} ended by " + (
        signal.Signals(-code).name if code < 0 else f"itself with code {code}"
    )


def end(running: list[Worker]) -> None:
    """Kills and buries them."""
    while running:
        process, line, room = running.pop()
        process.kill()
        process.join()
        process.close()
        line.close()
        room.close()
