"""How many bytes of tensors a piece of work needs at its peak, counted on any device."""

import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside, `now` is what tensors made inside hold, in bytes, and `peak` the most they held.

    A storage counts once, however many views it has, and until the last of them is gone; tensors
    from outside do not count. Real, fake and meta tensors are counted alike. What a kernel holds
    while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, int] = {}  # by storage: its bytes, 0 from outside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if hands_on(func):
            for tensor in tree_leaves((args, kwargs)):
                self._meet(tensor, inside=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._meet(tensor, inside=True)
        return out

    def _meet(self, tensor: Any, inside: bool) -> None:
        for storage in storages(tensor):
            key = storage._cdata
            if key in self._known:
                continue
            self._known[key] = storage.nbytes() if inside else 0
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


@cache
def hands_on(op: Any) -> bool:
    """Whether what it returns may be the storage of an argument, as of a view."""
    return any(r.alias_info is not None for r in op._schema.returns)


def storages(tensor: Any) -> list[torch.UntypedStorage]:
    """Where a tensor's numbers are; those of its parts for one that is quantised."""
    if not isinstance(tensor, Tensor):
        return []
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [s for name in names for s in storages(getattr(tensor, name))]
    found = [tensor.untyped_storage()]
    if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes' scales
        found += [s for part in tree_leaves(list(vars(state).values())) for s in storages(part)]
        if state.nested:
            found += [s for part in vars(state.state2).values() for s in storages(part)]
    return found


def held(*things: nn.Module | torch.optim.Optimizer | Tensor) -> int:
    """Bytes of networks (parameters and buffers), optimizers and tensors; shared ones once."""
    tensors: list[Any] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            tensors += [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.optim.Optimizer):
            tensors += tree_leaves(list(thing.state.values()))
        else:
            tensors.append(thing)
    found = {s._cdata: s.nbytes() for tensor in tensors for s in storages(tensor)}
    return sum(found.values())


def peak_memory(
    work: Callable[[], object], things: Iterable[nn.Module | torch.optim.Optimizer | Tensor] = ()
) -> int:
    """Bytes of tensors at the peak of `work()`: what `things` hold before it, and what it adds.

    On a GPU the allocator's own count of what is added; elsewhere `Live`'s.
    """
    before = held(*things)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return before + torch.cuda.max_memory_allocated() - allocated
    with Live() as live:
        work()
    return before + live.peak
