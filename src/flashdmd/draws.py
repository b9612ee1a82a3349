"""Random numbers of a whole batch, of which a part keeps its rows.

What an update is must not depend on in how many parts, or by how many processes, a batch is worked
through. So every part draws what the whole batch needs, from the same state of torch's generator,
and keeps the rows that are its own. Outside of `part` the batch is whole and nothing is cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

_part: ContextVar[tuple[int, int]] = ContextVar("part", default=(0, 1))  # number, of how many


@contextmanager
def part(number: int, of: int) -> Iterator[None]:
    """Inside, tensors are part `number` of `of` equal parts of a batch."""
    token = _part.set((number, of))
    try:
        yield
    finally:
        _part.reset(token)


def normal(
    like: Float[Tensor, "B *d"], rng: torch.Generator | None = None
) -> Float[Tensor, "B *d"]:
    """N(0, I)."""
    n = len(like) * _part.get()[1]
    return own(torch.randn(n, *like.shape[1:], generator=rng, dtype=like.dtype, device=like.device))


def uniform(like: Float[Tensor, "B *d"]) -> Float[Tensor, "B"]:
    """A number of 0..1 for each example."""
    n = len(like) * _part.get()[1]
    return own(torch.rand(n, dtype=like.dtype, device=like.device))


def integers(low: int, high: int, like: Float[Tensor, "B *d"]) -> Int[Tensor, "B"]:
    """A number of low..high - 1 for each example."""
    return own(torch.randint(low, high, (len(like) * _part.get()[1],), device=like.device))


def own(whole: Tensor) -> Tensor:
    number, of = _part.get()
    return whole.chunk(of)[number] if of > 1 else whole


@contextmanager
def rewound(device: str) -> Iterator[None]:
    """Draws inside, on the processor and on a `device`, are drawn again by what comes after."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    yield
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
