"""The objectives, as functions of tensors. No networks, no randomness, no devices."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flashdmd.schedule import per_example

SMALLEST_SCALE = 1e-6  # keeps a student that equals its teacher from dividing by zero


def matching_gradient(
    x0: Float[Tensor, "B *d"], x0_real: Float[Tensor, "B *d"], x0_fake: Float[Tensor, "B *d"]
) -> Float[Tensor, "B *d"]:
    """The direction in which KL(student || teacher) grows, in units of the teacher's error (Eq. 4).

    `x0_real` and `x0_fake` are what the guided teacher and the score estimator make of the same
    re-noised `x0`. The unit is mean |x0 - x0_real| of each example (DMD, Eq. 8).
    """
    real = x0_real.float()
    scale = (x0.float() - real).abs().flatten(1).mean(1).clamp_min(SMALLEST_SCALE)
    return (x0_fake.float() - real) / per_example(scale, x0)


def with_gradient(x: Float[Tensor, "B *d"], grad: Float[Tensor, "B *d"]) -> Float[Tensor, ""]:
    """A scalar whose gradient in `x` is `grad` / numel, exactly, whatever the dtype of `x`.

    The usual `0.5 * mse(x, (x - grad).detach())` rounds `grad` to the precision of `x`: with x of
    size 1 in bfloat16, a gradient of size 0.01 comes out 17% wrong. The value itself means nothing.
    """
    return (x.float() * grad.detach().float()).mean()


def hinge_discriminator(
    real: Float[Tensor, "B K"], fake: Float[Tensor, "B K"]
) -> Float[Tensor, ""]:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    return -fake.mean()


def logistic_discriminator(
    real: Float[Tensor, "B K"], fake: Float[Tensor, "B K"]
) -> Float[Tensor, ""]:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def logistic_generator(fake: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Non-saturating: DMD2's generator term."""
    return F.softplus(-fake).mean()


def approximate_r1(clean: Float[Tensor, "B K"], noisy: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Mean |D(x) - D(x + sigma eps)|^2 of real x (Seaweed-APT, arXiv 2501.08316).

    To first order sigma^2 |grad D|^2, which is R1 without a second derivative.
    """
    return (clean - noisy).square().mean()


def gaussian_log_prob(
    x: Float[Tensor, "B *d"], mean: Float[Tensor, "B *d"], std: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """log N(x; mean, std^2 I) in nats, averaged over all but the batch (LPO's convention).

    This is the one reduction of log-probabilities in the project, and every beta is quoted with
    it: a sum instead of the mean would rescale beta by the size of the latent.
    """
    var = per_example(std.float(), x) ** 2
    error = x.float() - mean.float()
    return -0.5 * (error**2 / var + (2 * math.pi * var).log()).flatten(1).mean(1)


def preference(
    gain_win: Float[Tensor, "B"], gain_lose: Float[Tensor, "B"], beta: float, clamp: float
) -> Float[Tensor, ""]:
    """-log sigmoid(beta (gain_win - gain_lose)), gain = log p_theta - log p_ref (Eq. 13).

    Each likelihood ratio exp(gain) is kept in [1 - clamp, 1 + clamp] as LPO does: past that a
    pair has no gradient. Nothing else inside the loss bounds the drift from the reference.
    """
    low, high = math.log(1 - clamp), math.log(1 + clamp)
    margin = gain_win.clamp(low, high) - gain_lose.clamp(low, high)
    return -F.logsigmoid(beta * margin).mean()


def best_and_worst(
    pool: Float[Tensor, "K B *d"], scores: Float[Tensor, "K B"]
) -> tuple[Float[Tensor, "B *d"], Float[Tensor, "B *d"]]:
    """The candidates with the highest and the lowest score, example by example."""
    rows = torch.arange(scores.shape[1], device=scores.device)
    return pool[scores.argmax(0), rows], pool[scores.argmin(0), rows]
