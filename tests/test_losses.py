"""The objectives against closed forms: KL divergences, torch's distributions, sums by hand."""

import math

import pytest
import torch
from gaussian import Gaussian
from torch.distributions import Normal, kl_divergence

from flashdmd import losses
from flashdmd.sampler import Sampler, guided, times
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

STEPS = (999, 749, 499, 249)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-5])
def test_with_gradient_gives_exactly_that_gradient(dtype, size):
    x = (10 * torch.randn(4, 8, 2)).to(dtype).requires_grad_()
    grad = (size * torch.randn(4, 8, 2)).to(dtype)
    losses.with_gradient(x, grad).backward()
    assert torch.equal(x.grad * x.numel(), grad)  # numel is a power of two


def test_with_gradient_lets_none_into_the_direction():
    x, grad = torch.randn(2, 4, 3, requires_grad=True)
    grad = grad.detach().requires_grad_()
    losses.with_gradient(x, grad).backward()
    assert grad.grad is None


@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
@pytest.mark.parametrize("t", [150, 400, 900])
def test_the_matching_direction_is_the_gradient_of_kl(schedule, t):
    process = Process(schedule, "eps")
    real, fake = Gaussian(process, mean=1.0, std=0.5), Gaussian(process, mean=-0.5, std=0.8)
    x0 = fake.sample(200_000, 1)
    x_t = process.add_noise(x0, torch.randn_like(x0), times(t, x0))
    x0_real, x0_fake = (g.denoiser(x_t, times(t, x0)) for g in (real, fake))
    unit = (x0 - x0_real).abs()  # in one dimension the unit is the error itself
    alpha, sigma = (v.item() for v in schedule(torch.tensor([t])))
    direction = (alpha / sigma) ** 2 * unit * losses.matching_gradient(x0, x0_real, x0_fake)

    mean, std = (torch.tensor(v, requires_grad=True) for v in (fake.mean, fake.std))
    noisy = Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt())
    kl_divergence(noisy, real.marginal(torch.tensor([t]))).sum().backward()

    z = (x0 - fake.mean) / fake.std  # x0 = mean + std z
    for estimate, exact in ((direction, mean.grad), (direction * z, std.grad)):
        error = 4 * estimate.std().item() / len(x0) ** 0.5  # 4 standard errors
        assert estimate.mean().item() == pytest.approx(exact.item(), abs=error)
        assert error < 0.05 * abs(exact.item()) + 0.01


def test_the_matching_direction_is_in_units_of_each_examples_error():
    x0, x0_real, x0_fake = torch.randn(3, 4, 3, 2, 2)
    x0[0] *= 100
    direction = losses.matching_gradient(x0, x0_real, x0_fake)
    for i in range(4):
        unit = sum(abs(v) for v in (x0[i] - x0_real[i]).flatten().tolist()) / 12
        torch.testing.assert_close(direction[i], (x0_fake[i] - x0_real[i]) / unit)


def test_the_matching_direction_survives_half_precision():
    x0, real = torch.randn(2, 4, 64).bfloat16()
    fake = real + (0.01 * torch.randn(4, 64)).bfloat16()
    exact = losses.matching_gradient(x0.float(), real.float(), fake.float())
    assert torch.equal(losses.matching_gradient(x0, real, fake), exact)


def test_a_student_that_is_its_teacher_does_not_move():
    x0, x_t = torch.randn(2, 4, 3)
    assert torch.equal(losses.matching_gradient(x0, x_t, x_t), torch.zeros(4, 3))
    at_home = losses.matching_gradient(x0, x0, x0)  # and no error to measure it with
    assert torch.equal(at_home, torch.zeros(4, 3))


def test_guidance_adds_the_pure_cfg_term_and_nothing_else():
    """With the score estimator equal to the teacher, only (s - 1) (x_c - x_u) is left of L_DM."""
    x0, x_t = torch.randn(2, 4, 3)
    t, scale = times(500, x0), 7.5

    def teacher(x_t, t, cond):
        return 0.4 * x_t + cond["c"].tanh()

    def unconditional(n):
        return {"c": torch.full((n, 3), -0.2)}

    cond = {"c": torch.randn(4, 3)}
    real = guided(teacher, unconditional, scale)(x_t, t, cond)
    x_c, x_u = teacher(x_t, t, cond), teacher(x_t, t, unconditional(4))
    unit = (x0 - real).abs().mean(1, keepdim=True)
    direction = losses.matching_gradient(x0, x0_real=real, x0_fake=x_c)
    torch.testing.assert_close(direction, -(scale - 1) * (x_c - x_u) / unit)


def test_hinge_by_hand():
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])  # 1 - real: 0, .5, 2, 0
    fake = torch.tensor([[-3.0, 0.0], [0.5, -1.0]])  # 1 + fake: 0, 1, 1.5, 0
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx(2.5 / 4 + 2.5 / 4)
    assert losses.hinge_discriminator(real, -5 - fake.abs()).item() == pytest.approx(2.5 / 4)
    assert losses.hinge_generator(fake).item() == pytest.approx(3.5 / 4)


def test_logistic_by_hand():
    real, fake = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, -1.0]])
    likely = [1 / (1 + math.exp(-v)) for v in (0.0, 2.0)], [1 / (1 + math.exp(-v)) for v in (0, 1)]
    expected = -sum(math.log(p) / 2 for side in likely for p in side)
    assert losses.logistic_discriminator(real, fake).item() == pytest.approx(expected)
    taken_for_real = [1 / (1 + math.exp(-v)) for v in (0.0, -1.0)]
    expected = -sum(math.log(p) / 2 for p in taken_for_real)
    assert losses.logistic_generator(fake).item() == pytest.approx(expected)


def test_log_prob_is_the_mean_of_torchs_normal():
    x, mean = torch.randn(2, 4, 3, 2, 2)
    std = torch.tensor([0.1, 0.5, 1.0, 3.0])
    expected = Normal(mean, std[:, None, None, None]).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(losses.gaussian_log_prob(x, mean, std), expected)


def test_log_prob_survives_half_precision():
    x = torch.randn(4, 64).bfloat16()
    mean = x + (0.01 * torch.randn(4, 64)).bfloat16()
    std = torch.full((4,), 0.5)
    exact = losses.gaussian_log_prob(x.float(), mean.float(), std)
    assert torch.equal(losses.gaussian_log_prob(x, mean, std), exact)


def log_ratios(x0, x0_ref, win, lose, sampler, t_next):
    """(gain_win, gain_lose) under the policy's transition to `t_next`."""
    (mean, std), (ref, _) = (sampler.transition(v, t_next) for v in (x0, x0_ref))
    log_p = losses.gaussian_log_prob
    return (log_p(win, mean, std) - log_p(win, ref, std)), (
        log_p(lose, mean, std) - log_p(lose, ref, std)
    )


@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
@pytest.mark.parametrize("t_next", [749, 499, 249])
def test_the_four_densities_leave_a_term_linear_in_the_drift(schedule, t_next):
    sampler = Sampler(Process(schedule, "eps"), STEPS)
    x0_old, n_win, n_lose = torch.randn(3, 4, 8)
    x0, x0_ref = (x0_old + 0.3 * torch.randn(4, 8) for _ in range(2))
    alpha, sigma = (v.item() for v in schedule(torch.tensor([t_next])))
    win, lose = (alpha * x0_old + sigma * n for n in (n_win, n_lose))
    gain_win, gain_lose = log_ratios(x0, x0_ref, win, lose, sampler, t_next)
    linear = (alpha / sigma) * ((n_win - n_lose) * (x0 - x0_ref)).mean(1)
    torch.testing.assert_close(gain_win - gain_lose, linear, atol=1e-5, rtol=1e-4)
    swapped_win, swapped_lose = log_ratios(x0, x0_ref, lose, win, sampler, t_next)
    assert torch.equal(swapped_win - swapped_lose, -(gain_win - gain_lose))


@pytest.mark.parametrize("t_next", [749, 499])
def test_at_the_reference_a_preference_pulls_along_the_winning_noise(t_next):
    beta, process = 500.0, Process(VariancePreserving(), "eps")
    sampler = Sampler(process, STEPS)
    x0 = torch.randn(4, 8, requires_grad=True)
    n_win, n_lose = torch.randn(2, 4, 8)
    alpha, sigma = (v.item() for v in process.schedule(torch.tensor([t_next])))
    win, lose = (alpha * x0.detach() + sigma * n for n in (n_win, n_lose))
    loss = losses.preference(
        *log_ratios(x0, x0.detach(), win, lose, sampler, t_next), beta=beta, clamp=0.1
    )
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    expected = -(beta / 2) * (alpha / sigma) * (n_win - n_lose) / 8  # of one example
    torch.testing.assert_close(x0.grad, expected / 4, rtol=1e-3, atol=1e-4)


def test_preference_by_hand():
    win, lose = torch.tensor([0.02, -0.01]), torch.tensor([-0.03, 0.01])
    expected = [math.log(1 + math.exp(-20 * m)) for m in (0.05, -0.02)]
    loss = losses.preference(win, lose, beta=20.0, clamp=0.1)
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    swapped = losses.preference(lose, win, beta=20.0, clamp=0.1)
    # log(1 + e^m) - log(1 + e^-m) = m
    assert (swapped - loss).item() == pytest.approx(20 * (0.05 - 0.02) / 2, rel=1e-5)


def test_a_likelihood_ratio_beyond_the_clamp_has_no_gradient():
    inside = math.log(1.09), math.log(0.91)
    outside = math.log(1.11), math.log(0.89)
    for gain, moves in [(g, True) for g in inside] + [(g, False) for g in outside]:
        win = torch.tensor([gain], requires_grad=True)
        lose = torch.tensor([gain], requires_grad=True)
        losses.preference(win, torch.zeros(1), beta=1.0, clamp=0.1).backward()
        losses.preference(torch.zeros(1), lose, beta=1.0, clamp=0.1).backward()
        assert (win.grad.item() < 0) == moves
        assert (lose.grad.item() > 0) == moves
    far = losses.preference(torch.tensor([5.0]), torch.tensor([-5.0]), beta=10.0, clamp=0.1)
    margin = math.log(1.1) - math.log(0.9)
    assert far.item() == pytest.approx(math.log(1 + math.exp(-10 * margin)), rel=1e-5)


def test_best_and_worst_are_each_examples_own():
    pool = torch.arange(24.0).reshape(4, 3, 2)  # K, B, d
    scores = torch.tensor([[0.0, 9.0, 1.0], [5.0, 2.0, 2.0], [-1.0, 3.0, 3.0], [1.0, 4.0, -4.0]])
    best, worst = losses.best_and_worst(pool, scores)
    assert torch.equal(best, torch.stack([pool[1, 0], pool[0, 1], pool[2, 2]]))
    assert torch.equal(worst, torch.stack([pool[2, 0], pool[1, 1], pool[3, 2]]))
