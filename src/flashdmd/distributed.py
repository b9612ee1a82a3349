"""Several processes on one run: the only file that knows how many there are.

Started by torchrun, `accelerate launch` or a scheduler that sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Every process draws the same batches and works through its own rows of them; gradients
are averaged. One process is the case in which nothing here does anything.
"""

import copy
import ctypes
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flashdmd.errors import UserError

T = TypeVar("T")
BUCKET = 2**24  # numbers that travel together
PARTS = 16  # of a network: what is put together at a time holds no more than one of so many
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h: bytes from which memory is the system's once freed
FILES = 64  # of a process's shares of a checkpoint, at most some more
TIMEOUT = "FLASHDMD_TIMEOUT_MINUTES"  # how long a process waits for the others; 30 unless set
LONGEST = 10**6  # minutes, two years
MOST = 2**16  # processes
ASK_AGAIN = 0.1  # seconds


class Absent(RuntimeError):  # noqa: N818 - of processes
    """Others did not come in time."""


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes of this run know each other: by NCCL on GPUs, else by gloo.

    Raises UserError when the environment that says who they are makes no sense, Absent when the
    others do not come.
    """
    of = asked("WORLD_SIZE", 1, MOST, "1")
    if of == 1:
        yield
        return
    if missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(
            f"WORLD_SIZE={of} but {', '.join(sorted(missing))} are not set; start several "
            "processes with torchrun or `accelerate launch`, or unset WORLD_SIZE"
        )
    asked("RANK", 0, of - 1), asked("MASTER_PORT", 1, 2**16 - 1)
    here, timeout = asked("LOCAL_RANK", 0, MOST, "0"), patience()
    if torch.cuda.is_available():
        torch.cuda.set_device(here % torch.cuda.device_count())
    meet(timeout)
    yield
    barrier()  # the first holds what the others find each other by
    dist.destroy_process_group()  # after an error the end of the process does it


def asked(name: str, least: int, most: int, default: str = "") -> int:
    """A whole number from the environment. Raises UserError for what is none or out of range."""
    given = os.environ.get(name, default)
    value = int(given) if given.isdecimal() else -1
    if not least <= value <= most:
        raise UserError(
            f"{name}={given} must be a whole number from {least} to {most}; torchrun and "
            "`accelerate launch` set it, and for one process WORLD_SIZE is unset"
        )
    return value


def patience() -> timedelta:
    """How long a process waits for another. Raises UserError for no time."""
    given = os.environ.get(TIMEOUT, "30")
    try:
        minutes = float(given)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= LONGEST:
        raise UserError(
            f"{TIMEOUT}={given} must be a number of minutes, above 0, at most {LONGEST}"
        )
    return timedelta(minutes=minutes)


def meet(timeout: timedelta) -> None:
    """Begins the process group, in a thread: no signal would end torch's own wait for the others.

    Raises UserError for a port that is taken, Absent when the others do not come.
    """
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            dist.init_process_group(timeout=timeout)
        except BaseException as e:
            errors.append(e)

    thread, until = Thread(target=begin, daemon=True), time.monotonic() + timeout.total_seconds()
    thread.start()
    while thread.is_alive() and time.monotonic() < until:
        thread.join(ASK_AGAIN)
    told = f"{errors[0]}".partition("\n")[0] if errors else "they are still awaited"
    place = " ".join(f"{name}={os.environ[name]}" for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in told:
        raise UserError(f"{place}: another program has this port; give one that is free")
    if thread.is_alive() or (errors and isinstance(errors[0], dist.DistError)):
        of, minutes = os.environ["WORLD_SIZE"], timeout.total_seconds() / 60
        raise Absent(
            f"the {of} processes of this run did not all come to {place} in {TIMEOUT}={minutes:g} "
            f"({told})"
        ) from (errors[0] if errors else None)
    if errors:
        raise errors[0]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def barrier() -> None:
    if ranks() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the body alone, the others after it: they find what it made.

    They wait as long as it takes. An error of one of them is told to the others by its end.
    """
    if ranks() == 1:
        yield
        return
    assert dist.group.WORLD
    store, done = dist.group.WORLD.get_group_store(), "the first is done"
    if first():
        yield
        store.set(done, "")
    while not store.check([done]):  # it fails when who keeps the store has ended
        time.sleep(ASK_AGAIN)
    barrier()
    if first():
        store.delete_key(done)  # for the next time
    barrier()
    if not first():
        yield


def told(value: T) -> T:
    """What the first process has, in all of them."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_of(flag: bool) -> bool:
    """Whether it is so in any of the processes: all get the same answer."""
    if ranks() == 1:
        return flag
    told = torch.tensor(float(flag), device=device())
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def mean(values: dict[str, float]) -> dict[str, float]:
    """Of numbers that every process has under the same names; not finite where any is not."""
    if ranks() == 1 or not values:
        return values
    told = torch.tensor(list(values.values()), dtype=torch.float64, device=device())
    dist.all_reduce(told)
    return dict(zip(values, (told / ranks()).tolist(), strict=True))


def average(tensors: Sequence[Tensor]) -> None:
    """Each replaced by its mean over the processes; all of them have them in the same order.

    Gradients of a sharded network are left alone: they were averaged when they were dealt out.
    """
    if ranks() == 1:
        return
    for bucket in buckets(t for t in tensors if not isinstance(t, DTensor)):
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat)
        flat /= ranks()
        for t, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(mean.view_as(t))


def buckets(tensors: Iterable[Tensor], most: int = BUCKET) -> Iterator[list[Tensor]]:
    """Neighbours of one type, as many as `most` numbers or one."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and (size + t.numel() > most or t.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.numel()
    if bucket:
        yield bucket


def everyones(mine: list[Any]) -> list[Any]:
    """What all processes have, dealt out as `own` deals: item i from process i % ranks."""
    if ranks() == 1:
        return mine
    lists: list[list[Any]] = [[] for _ in range(ranks())]
    dist.all_gather_object(lists, mine)
    n = sum(map(len, lists))
    return [lists[i % ranks()][i // ranks()] for i in range(n)]


def own(items: Sequence[Any]) -> list[Any]:
    """This process's share: every `ranks`-th, so that no one has more than one above another."""
    return list(items[rank() :: ranks()])


def agree(fact: str, what: str) -> None:
    """Raises UserError, in all of them, when `fact` is not the same in all processes."""
    facts = everyones([fact])
    if len(set(facts)) > 1:
        raise UserError(
            f"the processes of this run differ in {what}: {', '.join(sorted(set(facts)))}; give "
            "all the same files and versions"
        )


def device() -> str:
    """Where what travels lies: both of NCCL and gloo are there where there are GPUs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def lost(error: RuntimeError) -> bool:
    """Whether an error is the end of another process, as those who wait for it meet it."""
    told = str(error).lower()
    signs = ("gloo", "nccl", "connection closed", "connection reset", "timeout", "timed out")
    return isinstance(error, dist.DistError) or any(sign in told for sign in signs)


def shard(network: nn.Module) -> None:
    """Leaves each process a share of the weights, and so of gradients and moments (FSDP2).

    Its parts are put together when they run, one at a time.
    """
    mesh = init_device_mesh(device(), (ranks(),))
    for part in [*parts(network, count(network) // PARTS), network]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device() == "cpu" and mallopt:  # glibc would keep what parts that come and go leave behind
        mallopt(M_MMAP_THRESHOLD, 2**17)


def parts(module: nn.Module, most: int) -> Iterator[nn.Module]:
    """Those of lists, and the largest others until no more than `most` numbers are left: the levels
    of a UNet are few and large.
    """
    left = count(module)
    for child in sorted(module.children(), key=count, reverse=True):
        if count(child) and (left > most or isinstance(module, nn.ModuleList)):
            yield from parts(child, most)
            if not isinstance(child, nn.ModuleList):
                yield child
            left -= count(child)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def outline(network: nn.Module) -> nn.Module:
    """A copy that learns in float32 but has no weights yet: `deal` makes room for shares of them.

    So no process ever holds it whole.
    """
    weights = {
        id(p): nn.Parameter(torch.empty_like(p, dtype=torch.float32, device="meta"), False)
        for p in network.parameters()
    }
    return copy.deepcopy(network, weights)


def deal(outline: nn.Module) -> None:
    """Shards what `outline` made; its weights may then be filled. One that is sharded stays."""
    if isinstance(outline, FSDPModule):
        return
    buffers = {name: buffer.clone() for name, buffer in outline.named_buffers()}
    shard(outline)
    outline.to_empty(device=device())
    for name, buffer in outline.named_buffers():
        buffer.copy_(buffers[name])


def plain(network: nn.Module) -> type[nn.Module]:
    """The class of a network as it was before it was sharded."""
    kind = type(network)
    return kind.__mro__[2] if issubclass(kind, FSDPModule) else kind


def number(value: Tensor) -> float:
    """Of one that each process may have a share of, such as a norm."""
    return float(gathered(value))


def fill(own: Tensor, whole: Tensor) -> None:
    """Writes a tensor, whole or shared alike, to one that each process may have a share of.

    Raises RuntimeError for one of another shape.
    """
    dealt = isinstance(whole, DTensor) or own.shape != whole.shape
    if isinstance(own, DTensor) and not dealt:
        mesh, where = own.device_mesh, own.placements
        own.copy_(distribute_tensor(whole.to(own.device), mesh, where, src_data_rank=None))
    else:
        own.copy_(whole)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the processor of the first process; the others, who have to call as well, get nothing."""
    found = {}
    for name, tensor in tensors.items():
        full = gathered(tensor)
        if first():
            found[name] = full.detach().cpu()
    return found


def gathered(tensor: Tensor) -> Tensor:
    """Whole, in all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shards(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def save_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Safetensors files of each process with its shares; all of them have to call.

    Several, for each is put together in memory, twice, before it is written. What one of them
    meets, first of all an OSError of its disk, is raised in all.
    """
    most = max(BUCKET, sum(t.numel() for t in tensors.values()) // FILES)
    names, cut = iter(tensors), buckets(tensors.values(), most)
    files = {next(names): n for n, bucket in enumerate(cut, start=1) for _ in bucket}
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        save_state(dict(tensors), storage_writer=writer, no_dist=ranks() == 1)
    except CheckpointException as e:
        met = [error for error, _ in e.failures.values()]
        error = next((one for one in met if isinstance(one, OSError)), met[0])
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(folder)
        raise error from e


def shapes_of_shards(folder: Path) -> dict[str, torch.Size]:
    """Of the whole tensors that `save_shards` wrote."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: told.size for name, told in found.items()}  # type: ignore[union-attr]


def load_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills `tensors`, whole or sharded over any number of processes, from what `save_shards` of
    any number wrote.
    """
    load_state(
        dict(tensors),
        storage_reader=HuggingFaceStorageReader(str(folder)),
        no_dist=ranks() == 1,
    )
