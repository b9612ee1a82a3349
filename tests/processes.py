"""Real processes that know each other, forked from the test: the imports are made already."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

from flashdmd import distributed

SECONDS = 120


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def packed(fine: bool, value: Any) -> bytes:
    """The plain pickle: torch's own hands tensors over as files of a process that then ends."""
    return pickle.dumps((fine, value))


def together(work: Callable[[], Any], ranks: int = 2) -> list[Any]:
    """What `work` returns in each of `ranks` processes; the traceback of one that fails."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    ends = [fork.Pipe(duplex=False) for _ in range(ranks)]

    def one(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        try:
            with distributed.joined():
                ends[rank][1].send_bytes(packed(True, work()))
        except BaseException:
            ends[rank][1].send_bytes(packed(False, traceback.format_exc()))

    running = [fork.Process(target=one, args=(rank,)) for rank in range(ranks)]
    for process in running:
        process.start()
    answers = [
        pickle.loads(end.recv_bytes()) if end.poll(SECONDS) else (False, "no answer")
        for end, _ in ends
    ]
    for process in running:
        process.join(10)
        process.kill()
    failed = [told for fine, told in answers if not fine]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]
