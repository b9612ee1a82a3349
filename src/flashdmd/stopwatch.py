"""Where the milliseconds of an iteration go, by part, forward and backward."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

REST = "everything else"


class Stopwatch:
    """Self time of each part, in seconds; what no part claims is "everything else".

    `attach` times a module with hooks. Its backward pass begins when the gradient of its output is
    known and ends when that of its input is; where no gradient goes on to an input, it ends with
    the `part` around `backward()`. A part within a part pauses the outer one.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.iterations = 0
        self.total = 0.0
        self._running: list[str] = []
        self._since = 0.0

    def attach(self, module: nn.Module, part: str) -> None:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
                    x.register_hook(lambda _: self._leave(part))
            self._enter(part)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self._leave(part)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda _: self._enter(part))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times the block; whatever was entered inside and not left ends with it."""
        depth = len(self._running)
        self._enter(name)
        try:
            yield
        finally:
            self._charge()
            del self._running[depth:]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done inside is no part of an iteration."""
        before = self.seconds.copy()
        try:
            yield
        finally:
            self.seconds = before

    def iteration(self, seconds: float) -> None:
        self.iterations += 1
        self.total += seconds

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds an iteration by part, everything else last."""
        n = max(1, self.iterations)
        named = {name: s for name, s in sorted(self.seconds.items()) if name != REST}
        parts = {name: 1000 * s / n for name, s in named.items()}
        return parts | {REST: 1000 * (self.total - sum(named.values())) / n}

    def _enter(self, name: str) -> None:
        self._charge()
        self._running.append(name)

    def _leave(self, name: str) -> None:
        self._charge()
        if name in self._running:
            last = len(self._running) - 1 - self._running[::-1].index(name)
            del self._running[last:]

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
