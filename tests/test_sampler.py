"""The few-step walk against diffusers' schedulers and against exact moments."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from gaussian import Gaussian

from flashdmd.sampler import Sampler, guided, repeat, times
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

STEPS = (999, 749, 499, 249)
FLOW_STEPS = (1000, 750, 500, 250)
SHIFTED = (1000, 900, 750, 500)  # what shift 3 makes of FLOW_STEPS


def network(x_t, t, cond=None):
    """Any function of both arguments that differs from example to example."""
    return 0.3 * x_t + (t / 500).sin().reshape(-1, 1, 1, 1) * (x_t + 0.1).tanh()


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_a_walk_is_diffusers_lcm(kind, theirs):
    scheduler = LCMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=theirs,
    )
    scheduler.set_timesteps(4, original_inference_steps=4)
    assert scheduler.timesteps.tolist() == list(STEPS)
    process = Process(VariancePreserving(), kind)
    noise = torch.randn(2, 4, 8, 8)
    x, rng = noise, seeded()
    for t in scheduler.timesteps:
        out = network(x, t.repeat(2))
        x = scheduler.step(out, t, x, generator=rng, return_dict=False)[0]
    ours = Sampler(process, STEPS).sample(
        lambda x, t, cond: process.to_x0(network(x, t), x, t), noise, {}, rng=seeded()
    )
    # diffusers' alpha_bar is a float32 product of 1000, and eps at t = 999 is divided by 0.07
    torch.testing.assert_close(ours, x, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("shift", "steps"), [(1.0, FLOW_STEPS), (3.0, SHIFTED)])
def test_a_walk_is_diffusers_stochastic_flow(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.timesteps.tolist() == pytest.approx(list(steps))
    process = Process(RectifiedFlow(), "flow")
    noise = torch.randn(2, 4, 8, 8)
    torch.manual_seed(1)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.repeat(2)), t, x, return_dict=False)[0]
    torch.manual_seed(1)
    ours = Sampler(process, steps).sample(
        lambda x, t, cond: process.to_x0(network(x, t), x, t), noise, {}
    )
    torch.testing.assert_close(ours, x, atol=1e-6, rtol=1e-6)


EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
EULER.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
DDIM = DDIMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
    prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True,
)  # fmt: skip
DDIM.set_timesteps(4)


@pytest.mark.parametrize(
    ("scheduler", "process", "steps", "close"),
    [
        (EULER, Process(RectifiedFlow(), "flow"), SHIFTED, 1e-6),
        (DDIM, Process(VariancePreserving(), "v"), STEPS, 1e-4),
    ],
    ids=["euler", "ddim"],
)
def test_a_walk_without_fresh_noise_is_diffusers_euler_or_ddim(scheduler, process, steps, close):
    assert scheduler.timesteps.tolist() == pytest.approx(list(steps))
    x = noise = torch.randn(2, 4, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.repeat(2)), t, x, return_dict=False)[0]
    ours = Sampler(process, steps, eta=0.0).sample(
        lambda x, t, cond: process.to_x0(network(x, t), x, t), noise, {}
    )
    torch.testing.assert_close(ours, x, atol=close, rtol=close)


@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
def test_kept_noise_changes_no_moment_of_the_next_state(schedule):
    """Of an x_0 that is known exactly, N(alpha' x_0, sigma'^2 I) at every eta; at 1 with the same
    draws as without a state."""
    process = Process(schedule, "eps")
    x0 = torch.full((200_000, 1), 3.0)
    x_t = process.add_noise(x0, torch.randn_like(x0), times(749, x0))
    alpha, sigma = (v.item() for v in schedule(torch.tensor([499])))
    for eta in (0.0, 0.3, 0.9, 1.0):
        sampler = Sampler(process, (749, 499), eta=eta)
        drawn = sampler.renoise(x0, 499, seeded(), (x_t, 749))
        assert drawn.mean().item() == pytest.approx(3 * alpha, abs=4 * sigma / 447)
        assert drawn.std().item() == pytest.approx(sigma, rel=4 / 632)
        _, std = sampler.transition(x0[:1], 499, (x_t[:1], 749))
        assert std.item() == pytest.approx(sigma * math.sin(eta * math.pi / 2), abs=1e-6)
    assert torch.equal(drawn, Sampler(process, (749, 499)).renoise(x0, 499, seeded()))


def test_kept_noise_needs_the_state_that_it_was_in():
    process = Process(VariancePreserving(), "eps")
    with pytest.raises(ValueError, match=r"eta=0\.5 keeps noise"):
        Sampler(process, STEPS, eta=0.5).renoise(torch.zeros(1, 1), 249)
    with pytest.raises(ValueError, match=r"eta=1\.5 must lie in 0\.\.1"):
        Sampler(process, STEPS, eta=1.5)


def moments(gaussian, steps):
    """Mean and standard deviation of a walk with the exact denoiser: everything stays Gaussian."""
    mean, var = 0.0, 1.0
    for i, t in enumerate(steps):
        alpha, sigma = (v.double().item() for v in gaussian.process.schedule(torch.tensor([t])))
        if i:
            mean, var = alpha * mean, alpha**2 * var + sigma**2
        gain = alpha * gaussian.std**2 / (alpha**2 * gaussian.std**2 + sigma**2)
        mean, var = gaussian.mean + gain * (mean - alpha * gaussian.mean), gain**2 * var
    return mean, var**0.5


@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
@pytest.mark.parametrize("steps", [(999,), (999, 499), STEPS, (749, 249)])
def test_moments_of_a_walk(schedule, steps):
    gaussian = Gaussian(Process(schedule, "eps"), mean=2.0, std=0.5)
    end = Sampler(gaussian.process, steps).sample(gaussian.denoiser, torch.randn(100_000, 1), {})
    mean, std = moments(gaussian, steps)
    # standard errors are std / 316 and std / 447
    assert end.mean().item() == pytest.approx(mean, abs=4 * std / 316)
    assert end.std().item() == pytest.approx(std, rel=4 / 447)


def test_a_transition_is_what_renoise_draws_from():
    sampler = Sampler(Process(VariancePreserving(), "eps"), STEPS)
    x0 = torch.tensor([[-1.0], [0.0], [3.0]]).expand(3, 50_000)
    mean, std = sampler.transition(x0, 249)
    alpha, sigma = (v.item() for v in VariancePreserving()(torch.tensor([249])))
    torch.testing.assert_close(mean, alpha * x0)
    torch.testing.assert_close(std, torch.full((3,), sigma))
    drawn = sampler.renoise(x0, 249)
    torch.testing.assert_close(drawn.mean(1), mean[:, 0], atol=4 * sigma / 223, rtol=0)
    torch.testing.assert_close(drawn.std(1), std, atol=0, rtol=4 / 316)


@pytest.mark.parametrize("t", STEPS)
def test_a_walk_can_be_stopped_and_finished(t):
    process = Process(VariancePreserving(), "eps")
    sampler = Sampler(process, STEPS)

    def denoiser(x, t, cond):
        return process.to_x0(network(x, t), x, t)

    noise = torch.randn(2, 4, 8, 8)
    whole = sampler.walk(denoiser, noise, {}, rng=seeded())
    rng = seeded()
    before = sampler.walk(denoiser, noise, {}, stop=t, rng=rng)
    x0 = denoiser(before.end, times(t, noise), {})
    after = sampler.finish(denoiser, x0, t, {}, rng=rng)
    assert torch.equal(after.end, whole.end)
    parts = {**before.x0, t: x0, **after.x0}
    assert list(parts) == list(whole.x0) == list(STEPS)
    for s in STEPS:
        assert torch.equal(parts[s], whole.x0[s])
        state = before.end if s == t else (before.x_t | after.x_t)[s]
        assert torch.equal(state, whole.x_t[s])


def test_a_walk_that_stops_at_once_is_still_pure_noise():
    noise = torch.randn(2, 4, 8, 8)
    sampler = Sampler(Process(VariancePreserving(), "eps"), STEPS)
    walk = sampler.walk(network, noise, {}, stop=999)
    assert walk.end is noise
    assert walk.x0 == walk.x_t == {}


def test_each_step_starts_from_the_renoised_answer_of_the_one_before():
    """With a denoiser that always answers 3, the state at t is N(3 alpha, sigma^2)."""
    sampler = Sampler(Process(VariancePreserving(), "eps"), STEPS)
    seen = []

    def always_three(x_t, t, cond):
        seen.append((int(t[0]), x_t.mean().item(), x_t.std().item()))
        assert t.shape == (len(x_t),)
        return torch.full_like(x_t, 3.0)

    sampler.walk(always_three, torch.randn(20_000, 1), {})
    for (t, mean, std), expected in zip(seen, STEPS, strict=True):
        alpha, sigma = (v.item() for v in VariancePreserving()(torch.tensor([t])))
        assert t == expected
        assert mean == pytest.approx(0 if t == 999 else 3 * alpha, abs=4 / 141)
        assert std == pytest.approx(1 if t == 999 else sigma, rel=4 / 200)


def test_guidance_is_two_separate_passes():
    process = Process(VariancePreserving(), "eps")

    def out(x_t, t, cond):
        return network(x_t, t) * cond["gain"].reshape(-1, 1, 1, 1) + cond["text"].mean(
            (1, 2)
        ).sin().reshape(-1, 1, 1, 1)

    def denoiser(x_t, t, cond):
        return process.to_x0(out(x_t, t, cond), x_t, t)

    def unconditional(n):
        return {"text": torch.full((n, 5, 2), 0.3), "gain": torch.full((n,), 0.5)}

    x_t, t = torch.randn(3, 2, 4, 4), torch.tensor([900.0, 500.0, 100.0])
    cond = {"gain": torch.rand(3), "text": torch.randn(3, 5, 2)}
    for scale in (0.0, 1.0, 8.0):
        out_c, out_u = out(x_t, t, cond), out(x_t, t, unconditional(3))
        expected = process.to_x0(out_u + scale * (out_c - out_u), x_t, t)  # guided where eps is
        ours = guided(denoiser, unconditional, scale)(x_t, t, cond)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert guided(denoiser, unconditional, 1.0) is denoiser


def test_repeated_conditions_lie_as_repeated_latents_do():
    cond = {"text": torch.arange(6.0).reshape(3, 2), "pooled": torch.arange(3.0)}
    copies = repeat(cond, 4)
    for name, value in cond.items():
        assert torch.equal(copies[name].unflatten(0, (4, 3)), value.expand(4, *value.shape))


@pytest.mark.parametrize("steps", [(), (249, 999), (999, 999, 249)])
def test_steps_must_decrease(steps):
    with pytest.raises(ValueError, match="strictly decreasing"):
        Sampler(Process(VariancePreserving(), "eps"), steps)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(VariancePreserving(), (1000, 500)), (RectifiedFlow(), (1001,)), (RectifiedFlow(), (500, 0))],
)
def test_steps_must_be_times_of_the_schedule(schedule, steps):
    with pytest.raises(ValueError, match=rf"must lie in 1\.\.{schedule.last}, the times of"):
        Sampler(Process(schedule, "eps"), steps)
