"""Noise schedules, and what a network is trained to predict.

Every process in this package is  x_t = alpha(t) x_0 + sigma(t) eps,  eps ~ N(0, I).
`t` is always the number the network is fed: near 0 is data, `STEPS` is noise.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Num, Shaped
from torch import Tensor

STEPS = 1000
Kind = Literal["x0", "eps", "v", "flow"]


def per_example(a: Shaped[Tensor, "B"], like: Num[Tensor, "B *d"]) -> Shaped[Tensor, "B *ones"]:
    """View (B,) as (B, 1, ..., 1), so that it broadcasts over `like` and nothing else."""
    return a.reshape(-1, *(1,) * (like.ndim - 1))


class VariancePreserving:
    """DDPM's process, alpha^2 + sigma^2 = 1, at whole t = 0 .. 999; Stable Diffusion's betas.

    Their `power` rises evenly: 1/2 is scaled_linear, 1 (PixArt's) linear.
    """

    last = STEPS - 1

    def __init__(
        self, beta_start: float = 0.00085, beta_end: float = 0.012, power: float = 0.5
    ) -> None:
        even = torch.linspace(beta_start**power, beta_end**power, STEPS, dtype=torch.float64)
        alpha_bar = (1 - even ** (1 / power)).cumprod(0)
        self.alpha, self.sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def __call__(self, t: Num[Tensor, "B"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        i = t.long()
        return self.alpha.to(t.device)[i], self.sigma.to(t.device)[i]


class RectifiedFlow:
    """Straight paths, alpha = 1 - sigma, for 0 <= t <= 1000 (SD3). sigma is t / 1000, exactly."""

    last = STEPS

    def __call__(self, t: Num[Tensor, "B"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        sigma = t.float() / STEPS
        return 1 - sigma, sigma


Schedule = VariancePreserving | RectifiedFlow


@dataclass(frozen=True)
class Process:
    """A schedule together with the network's parameterisation.

    A network predicts  a(t) x_0 + b(t) eps;  the pair (a, b) says everything about it, so the
    four usual kinds are four rows of a table and every conversion is one linear solve.
    """

    schedule: Schedule
    kind: Kind

    def at(
        self, t: Num[Tensor, "B"], like: Float[Tensor, "B *d"]
    ) -> tuple[Float[Tensor, "B *ones"], Float[Tensor, "B *ones"]]:
        """(alpha, sigma) at `t`, ready to multiply `like`."""
        alpha, sigma = self.schedule(t)
        return per_example(alpha, like), per_example(sigma, like)

    def row(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b): the network predicts a x_0 + b eps."""
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        table = {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}
        return table[self.kind]

    def add_noise(
        self, x0: Float[Tensor, "B *d"], eps: Float[Tensor, "B *d"], t: Num[Tensor, "B"]
    ) -> Float[Tensor, "B *d"]:
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def target(
        self, x0: Float[Tensor, "B *d"], eps: Float[Tensor, "B *d"], t: Num[Tensor, "B"]
    ) -> Float[Tensor, "B *d"]:
        """What the network should have said at x_t = alpha x_0 + sigma eps."""
        a, b = self.row(*self.at(t, x0))
        return a * x0 + b * eps

    def to_x0(
        self, out: Float[Tensor, "B *d"], x_t: Float[Tensor, "B *d"], t: Num[Tensor, "B"]
    ) -> Float[Tensor, "B *d"]:
        """Solve {out = a x_0 + b eps, x_t = alpha x_0 + sigma eps} for x_0."""
        alpha, sigma = self.at(t, x_t)
        a, b = self.row(alpha, sigma)
        return (sigma * out - b * x_t) / (a * sigma - b * alpha)

    def to_score(
        self, x0: Float[Tensor, "B *d"], x_t: Float[Tensor, "B *d"], t: Num[Tensor, "B"]
    ) -> Float[Tensor, "B *d"]:
        """grad log p_t(x_t) = (alpha E[x_0 | x_t] - x_t) / sigma^2  (Tweedie; Eq. 3)."""
        alpha, sigma = self.at(t, x_t)
        return (alpha * x0 - x_t) / sigma**2

    def error_weight(
        self, t: Num[Tensor, "B"], like: Float[Tensor, "B *d"]
    ) -> Float[Tensor, "B *ones"]:
        """w such that w (x_0_hat - x_0) is the network's own error, at a fixed x_t.

        eps: -alpha / sigma;  v and flow on their own schedules: -1 / sigma;  x0: 1.
        """
        alpha, sigma = self.at(t, like)
        a, b = self.row(alpha, sigma)
        return a - b * alpha / sigma
