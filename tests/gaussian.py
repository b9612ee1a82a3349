"""The distributions whose denoiser and score are known exactly: one Gaussian, and two of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdmd.schedule import Process


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I)."""

    process: Process
    mean: float
    std: float

    def sample(self, *shape: int) -> Tensor:
        return self.mean + self.std * torch.randn(shape)

    def denoiser(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        """E[x_0 | x_t]."""
        alpha, sigma = self.process.at(t, x_t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)

    def marginal(self, t: Tensor) -> torch.distributions.Normal:
        """p_t, the law of x_t: one Normal for each entry of `t`."""
        alpha, sigma = self.process.schedule(t)
        var = alpha**2 * self.std**2 + sigma**2
        return torch.distributions.Normal(alpha * self.mean, var.sqrt())


@dataclass(frozen=True)
class TwoModes:
    """(1 - right) N(-centre, std^2) + right N(centre, std^2), independently in each coordinate."""

    process: Process
    centre: float
    std: float
    right: float

    def sample(self, *shape: int) -> Tensor:
        side = 2 * (torch.rand(shape) < self.right).float() - 1
        return self.centre * side + self.std * torch.randn(shape)

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t), summed over all but the batch."""
        alpha, sigma = self.process.at(t, x_t)
        std = (alpha**2 * self.std**2 + sigma**2).sqrt()
        sides = [
            torch.distributions.Normal(side * alpha * self.centre, std).log_prob(x_t)
            + torch.tensor(weight).log()
            for side, weight in ((-1, 1 - self.right), (1, self.right))
        ]
        return torch.stack(sides).logsumexp(0).flatten(1).sum(1)

    def denoiser(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        """E[x_0 | x_t]: the two Gaussians' answers, weighted by whose x_t it is."""
        alpha, sigma = self.process.at(t, x_t)
        var = alpha**2 * self.std**2 + sigma**2
        log_odds = 2 * alpha * self.centre * x_t / var  # of the two likelihoods
        is_right = torch.sigmoid(log_odds + torch.tensor(self.right / (1 - self.right)).log())
        gain = alpha * self.std**2 / var
        left, right = (m + gain * (x_t - alpha * m) for m in (-self.centre, self.centre))
        return left + is_right * (right - left)
