"""Noise schedules and parameterisations, against algebra, diffusers and exact distributions."""

import pytest
import torch
from diffusers import DDPMScheduler
from gaussian import Gaussian, TwoModes

from flashdmd.sampler import times
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

SCHEDULES = [VariancePreserving(), RectifiedFlow()]
# v needs sigma^2 + alpha^2 != 0 and flow alpha + sigma != 0: every pair can be solved
CASES = [
    pytest.param(s, k, id=f"{type(s).__name__}-{k}")
    for s in SCHEDULES
    for k in ("x0", "eps", "v", "flow")
]
ROUNDING = 2**-23


def stable_diffusion(**config):
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **config
    )


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_what_the_network_says_determines_x0(schedule, kind):
    process = Process(schedule, kind)
    t = torch.tensor([1, 20, 249, 499, 749, 980, 999])
    x0, eps = torch.randn(2, len(t), 3, 4, 4)
    out, x_t = process.target(x0, eps, t), process.add_noise(x0, eps, t)
    alpha, sigma = process.at(t, x0)
    a, b = process.row(alpha, sigma)
    # two products of numbers below 5, each rounded a few times, over the determinant
    bound = 5 * 4 * ROUNDING * (sigma * a.abs() + b.abs() + 1) / (a * sigma - b * alpha).abs()
    error = (process.to_x0(out, x_t, t) - x0).abs()
    assert (error <= bound).all()
    assert error.max() < 0.01


def test_each_kind_predicts_what_its_name_says():
    x0, eps = torch.randn(2, 5, 3)
    t = torch.tensor([20, 249, 499, 749, 980])
    for schedule in SCHEDULES:
        alpha, sigma = (per[:, None] for per in schedule(t))
        expected = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
        for kind, target in expected.items():
            torch.testing.assert_close(Process(schedule, kind).target(x0, eps, t), target)


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_score_of_a_gaussian(schedule, kind):
    process = Process(schedule, kind)
    gaussian = Gaussian(process, mean=1.5, std=0.5)
    t = torch.linspace(20, 980, 8).long()
    x_t = torch.randn(8, 3, requires_grad=True)
    log_p = gaussian.marginal(t).log_prob(x_t.T).sum()
    (score,) = torch.autograd.grad(log_p, x_t)
    with torch.no_grad():
        ours = process.to_score(gaussian.denoiser(x_t, t), x_t, t)
    torch.testing.assert_close(ours, score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_score_of_a_mixture(schedule):
    process = Process(schedule, "eps")
    mixture = TwoModes(process, centre=1.2, std=0.3, right=0.3)
    t = torch.linspace(20, 980, 50).long()
    x_t = torch.randn(50, 2, requires_grad=True)
    (score,) = torch.autograd.grad(mixture.log_density(x_t, t).sum(), x_t)
    with torch.no_grad():
        ours = process.to_score(mixture.denoiser(x_t, t), x_t, t)
    torch.testing.assert_close(ours, score, atol=1e-3, rtol=1e-4)


def test_vp_is_diffusers():
    scheduler, process = stable_diffusion(), Process(VariancePreserving(), "v")
    x0, eps = torch.randn(2, 1000, 3)
    t = torch.arange(1000)
    # diffusers multiplies up alpha_bar in float32: 1000 roundings, 6e-5 of alpha at worst
    close = {"atol": 5e-5, "rtol": 1e-4}
    theirs = scheduler.add_noise(x0, eps, t)
    torch.testing.assert_close(process.add_noise(x0, eps, t), theirs, **close)
    theirs = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(process.target(x0, eps, t), theirs, **close)


def test_vp_has_the_values_of_sdxl():
    table = torch.tensor(
        [  # t, alpha_bar, alpha, sigma: rounded to the last digit shown
            [999, 0.0047, 0.0683, 0.9977],
            [749, 0.0566, 0.2380, 0.9713],
            [499, 0.2777, 0.5269, 0.8499],
            [399, 0.4261, 0.6528, 0.7576],
            [249, 0.6754, 0.8218, 0.5697],
        ]
    )
    alpha, sigma = VariancePreserving()(table[:, 0])
    ours = torch.stack([alpha**2, alpha, sigma], dim=1)
    torch.testing.assert_close(ours, table[:, 1:], atol=5.1e-5, rtol=0)


def test_vp_keeps_the_variance_and_flow_keeps_the_sum():
    t = torch.arange(1000)
    alpha, sigma = VariancePreserving()(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    assert (sigma.diff() > 0).all()
    alpha, sigma = RectifiedFlow()(t)
    torch.testing.assert_close(alpha + sigma, torch.ones(1000))
    assert (sigma.diff() > 0).all()


def test_flow_is_the_velocity_of_the_path():
    process = Process(RectifiedFlow(), "flow")
    x0, eps = torch.randn(2, 4, 3)
    before, after = (process.add_noise(x0, eps, times(t, x0)) for t in (250, 750))
    torch.testing.assert_close((after - before) / 0.5, process.target(x0, eps, times(400, x0)))


def test_flow_ends_in_data_and_in_noise():
    process = Process(RectifiedFlow(), "flow")
    x0, eps = torch.randn(2, 4, 3)
    data, noise = times(0, x0), times(RectifiedFlow.last, x0)
    assert torch.equal(process.add_noise(x0, eps, data), x0)
    assert torch.equal(process.add_noise(x0, eps, noise), eps)
    torch.testing.assert_close(process.to_x0(eps - x0, eps, noise), x0)
    assert torch.equal(process.to_x0(eps - x0, x0, data), x0)


def test_vp_ends_at_its_first_and_last_beta():
    schedule = VariancePreserving()
    alpha, sigma = schedule(torch.tensor([0, VariancePreserving.last]))
    assert sigma[0].item() == pytest.approx(0.00085**0.5, rel=1e-5)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert alpha[1].item() == pytest.approx((1 - betas).log().sum().div(2).exp().item(), rel=1e-6)
    with pytest.raises(IndexError):
        schedule(torch.tensor([1000]))


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_error_weight_is_the_networks_own_error(schedule, kind):
    process = Process(schedule, kind)
    t = torch.tensor([100, 249, 499, 749, 900])
    x0, eps, x0_hat = torch.randn(3, 5, 3, 2, 2)
    alpha, sigma = (per[:, None, None, None] for per in schedule(t))
    x_t = alpha * x0 + sigma * eps
    eps_hat = (x_t - alpha * x0_hat) / sigma  # what a network that says x0_hat takes eps to be
    error = {
        "x0": x0_hat - x0,
        "eps": eps_hat - eps,
        "v": (alpha * eps_hat - sigma * x0_hat) - (alpha * eps - sigma * x0),
        "flow": (eps_hat - x0_hat) - (eps - x0),
    }[kind]
    torch.testing.assert_close(
        process.error_weight(t, x0) * (x0_hat - x0), error, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_times_belong_to_examples_even_where_the_width_is_the_batch(schedule, kind):
    process = Process(schedule, kind)
    t = torch.tensor([100.0, 300.0, 600.0, 900.0])
    x, y = torch.randn(2, 4, 4, 4, 4)  # B == C == H == W
    for f in (
        lambda x, y, t: process.add_noise(x, y, t),
        lambda x, y, t: process.target(x, y, t),
        lambda x, y, t: process.to_x0(x, y, t),
        lambda x, y, t: process.to_score(x, y, t),
        lambda x, y, t: process.error_weight(t, x) * x,
    ):
        singly = torch.cat([f(x[i : i + 1], y[i : i + 1], t[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(f(x, y, t), singly)


def test_a_time_that_is_not_one_per_example_is_refused():
    process = Process(VariancePreserving(), "eps")
    x = torch.zeros(4, 3)
    for t in (torch.zeros(4, 1).long(), torch.zeros(3).long(), torch.zeros(()).long()):
        with pytest.raises(Exception, match="Type-check"):
            process.add_noise(x, x, t)


def test_noise_is_added_in_float32():
    process = Process(VariancePreserving(), "eps")
    x0, eps = torch.randn(2, 8, 16).bfloat16()
    t = torch.full((8,), 20)
    x_t = process.add_noise(x0, eps, t)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, process.add_noise(x0.float(), eps.float(), t))


def test_linear_betas_are_diffusers():
    theirs = DDPMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    alpha, sigma = VariancePreserving(0.0001, 0.02, power=1.0)(torch.arange(1000))
    torch.testing.assert_close(alpha**2, theirs.alphas_cumprod, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(sigma**2, 1 - theirs.alphas_cumprod, atol=2e-6, rtol=1e-5)
