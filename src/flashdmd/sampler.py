"""Few-step stochastic sampling: denoise to x_0, add fresh noise at the next level, repeat."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashdmd import draws
from flashdmd.schedule import Process, per_example

Cond = dict[str, Tensor]  # keyword tensors of the network's forward, batch first
Denoiser = Callable[[Tensor, Tensor, Cond], Tensor]  # (x_t, t, cond) -> x_0


def times(t: int | float, like: Tensor) -> Float[Tensor, "B"]:
    """(B,) filled with `t`, on the device of `like`."""
    return torch.full((len(like),), float(t), device=like.device)


def repeat(cond: Cond, k: int) -> Cond:
    """k copies of a batch of conditions, one after the other: (B, ...) -> (k B, ...)."""
    return {name: value.repeat(k, *(1,) * (value.ndim - 1)) for name, value in cond.items()}


def guided(denoiser: Denoiser, unconditional: Callable[[int], Cond], scale: float) -> Denoiser:
    """Classifier-free guidance, x_u + scale (x_c - x_u), in one pass over a doubled batch.

    Guidance is affine and x_0 is affine in the output, so acting on x_0 is acting on eps or v.
    """
    if scale == 1:
        return denoiser

    def both(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        nothing = {**cond, **unconditional(len(x_t))}  # of the same picture, if it is told of one
        pair = {name: torch.cat([nothing[name], cond[name]]) for name in cond}
        x_u, x_c = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), pair).chunk(2)
        return x_u + scale * (x_c - x_u)

    return both


@dataclass(frozen=True)
class Walk:
    """Where a walk down the steps has been: the state x_t it came to and the x_0 seen from it."""

    x_t: dict[int, Tensor]
    x0: dict[int, Tensor]
    end: Tensor  # the state at the step it stopped at; the finished sample if it did not stop


@dataclass(frozen=True)
class Sampler:
    """A student's walk down `steps` (network times). `None` stands for the end, where x = x_0.

    It is what diffusers' LCMScheduler does for score-based models, and what
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True) does for flows. `eta` below 1 keeps
    a part of the noise that is there (CPS, arXiv 2509.05952); 0 keeps all of it: DDIM, or Euler.
    """

    process: Process
    steps: tuple[int, ...]
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie in 0..1, from no fresh noise to fresh alone")
        if not self.steps or list(self.steps) != sorted(set(self.steps), reverse=True):
            raise ValueError(f"steps={self.steps} must be one or more times, strictly decreasing")
        if self.steps[-1] <= 0 or self.steps[0] > self.process.schedule.last:
            raise ValueError(
                f"steps={self.steps} must lie in 1..{self.process.schedule.last}, the times of "
                f"{type(self.process.schedule).__name__}"
            )

    def after(self, t: int) -> int | None:
        i = self.steps.index(t) + 1
        return self.steps[i] if i < len(self.steps) else None

    def transition(
        self,
        x0: Float[Tensor, "B *d"],
        t_next: int,
        seen: tuple[Float[Tensor, "B *d"], int] | None = None,
    ) -> tuple[Float[Tensor, "B *d"], Float[Tensor, "B"]]:
        """Mean and standard deviation of  p(z_next | z_t) = N(alpha' x_0(z_t, t), sigma'^2 I).

        Below eta = 1 of  N(alpha' x_0 + sigma' cos(eta pi / 2) eps, (sigma' sin(eta pi / 2))^2 I)
        with eps = (z_t - alpha x_0) / sigma; it needs `seen`, the pair (z_t, t).
        """
        alpha, sigma = self.process.at(times(t_next, x0), x0)
        if self.eta == 1:
            return alpha * x0, sigma.flatten()
        if seen is None:
            raise ValueError(f"eta={self.eta} keeps noise of the state before, and none is given")
        z_t, t = seen
        alpha_t, sigma_t = self.process.at(times(t, x0), x0)
        kept = math.cos(self.eta * math.pi / 2) * (z_t - alpha_t * x0) / sigma_t
        return alpha * x0 + sigma * kept, math.sin(self.eta * math.pi / 2) * sigma.flatten()

    def renoise(
        self,
        x0: Float[Tensor, "B *d"],
        t_next: int,
        rng: torch.Generator | None = None,
        seen: tuple[Float[Tensor, "B *d"], int] | None = None,
    ) -> Float[Tensor, "B *d"]:
        """A draw from `transition`."""
        mean, std = self.transition(x0, t_next, seen)
        return mean + per_example(std, x0) * draws.normal(x0, rng)

    def walk(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "B *d"],
        cond: Cond,
        *,
        start: int | None = None,
        stop: int | None = None,
        rng: torch.Generator | None = None,
    ) -> Walk:
        """From the state at `start` (default: noise at the first step) to the state at `stop`."""
        assert stop is None or stop in self.steps
        t: int | None = self.steps[0] if start is None else start
        x_t, x0 = {}, {}
        while t != stop and t is not None:
            x_t[t] = x
            x0[t] = denoiser(x, times(t, x), cond)
            t_next = self.after(t)
            x = x0[t] if t_next is None else self.renoise(x0[t], t_next, rng, (x, t))
            t = t_next
        return Walk(x_t, x0, x)

    def finish(
        self,
        denoiser: Denoiser,
        x0: Float[Tensor, "B *d"],
        t: int,
        cond: Cond,
        rng: torch.Generator | None = None,
    ) -> Walk:
        """The rest of the walk, from the x_0 seen at `t`."""
        t_next = self.after(t)
        if t_next is None:
            return Walk({}, {}, x0)
        x = self.renoise(x0, t_next, rng)
        return self.walk(denoiser, x, cond, start=t_next, rng=rng)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        noise: Float[Tensor, "B *d"],
        cond: Cond,
        rng: torch.Generator | None = None,
    ) -> Float[Tensor, "B *d"]:
        return self.walk(denoiser, noise, cond, rng=rng).end
