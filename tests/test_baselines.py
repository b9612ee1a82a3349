"""DMD2, the method of comparison: its counts, its samples, its two losses on one estimator."""

from collections import Counter

import pytest
import torch
from networks import STEPS, Call, Student, has_gradient
from torch import nn
from torch.nn import functional as F

from flashdmd.algorithm import Method
from flashdmd.baselines import (
    DISCRIMINATOR_WEIGHT,
    DMD2,
    NUMBERS,
    dmd2_cycle,
)
from flashdmd.discriminator import FeatureHead
from flashdmd.sampler import Sampler
from flashdmd.schedule import Process, VariancePreserving

SIZE = 4


class Middle(nn.Module):
    """A convolutional denoiser with features in the middle; remembers what they were made of."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(8, 4, 3, 1, 1)
        self.calls = []

    def bottleneck(self, x_t, t, cond):
        self.calls.append(Call(t, x_t, cond, torch.is_grad_enabled()))
        return self.encode(x_t).tanh()

    def forward(self, x_t, t, cond):
        return self.decode(self.encode(x_t).tanh())


def dmd2(method=None, **networks):
    defaults = {
        "teacher": lambda x_t, t, cond: 0.2 * x_t + 1.0,
        "generator": Student(),
        "score": Middle(),
        "discriminator": FeatureHead(8, SIZE),
    }
    sampler = Sampler(Process(VariancePreserving(), "eps"), STEPS)
    return DMD2(
        method or Method(**NUMBERS, matching_timesteps=STEPS), sampler, **(defaults | networks)
    )


def latents(n=8):
    return torch.randn(n, 4, SIZE, SIZE)


def test_five_updates_of_the_score_estimator_and_head_to_one_of_the_generator():
    order = dmd2_cycle(Method(**NUMBERS), "distill")
    iterations = [order[n % len(order)] for n in range(100)]
    counts = Counter(update for iteration in iterations for update in iteration)
    assert counts == {"generator": 20, "score": 100}
    assert DMD2.trains["score"] == ("score", "discriminator")
    for n, iteration in enumerate(iterations):
        assert iteration == (("generator", "score") if n % 5 == 0 else ("score",))


@pytest.mark.parametrize("stage", ["joint", "rl"])
def test_dmd2_has_no_second_stage(stage):
    with pytest.raises(ValueError, match="no reinforcement learning, only 'distill'"):
        dmd2_cycle(Method(**NUMBERS), stage)


def test_matching_happens_at_every_step_of_the_student_alike():
    algorithm = dmd2()
    drawn = [algorithm.draw_steps(torch.Generator().manual_seed(n)) for n in range(800)]
    assert all(t == t_hat for t, t_hat in drawn)
    counts = Counter(t for t, _ in drawn)
    assert set(counts) == set(STEPS)
    assert all(abs(n - 200) < 4 * 12.3 for n in counts.values()), counts


@pytest.mark.parametrize("t", STEPS)
def test_a_rollout_ends_at_its_step(t):
    algorithm, noise = dmd2(), latents()
    samples = algorithm.rollout(noise, {}, t, t)
    calls = algorithm.generator.calls
    assert [call.step for call in calls] == list(STEPS[: STEPS.index(t) + 1])
    assert [call.differentiable for call in calls] == [False] * (len(calls) - 1) + [True]
    assert torch.equal(calls[0].x_t, noise)
    assert list(samples.x0) == [t]
    torch.testing.assert_close(samples.x0[t], 0.5 * calls[-1].x_t + 0.1)


@pytest.mark.parametrize("t", STEPS)
def test_both_terms_teach_the_generator_at_that_step(t):
    for term in ("matching", "adversarial"):
        algorithm = dmd2()
        samples = algorithm.rollout(latents(), {}, t, t)
        algorithm.generator_loss(samples, {}).terms[term].backward()
        assert algorithm.generator.taught() == {t}
        # matching asks the estimator and the head for nothing but values
        assert has_gradient(algorithm.score) == (term == "adversarial")


def test_the_generators_term_is_the_softplus_of_the_heads_verdict():
    algorithm, cond = dmd2(), {"text": torch.randn(8, 2)}
    samples = algorithm.rollout(latents(), cond, 749, 749)
    adversarial = algorithm.generator_loss(samples, cond).terms["adversarial"]
    (call,) = algorithm.score.calls
    assert call.cond is cond
    logits = algorithm.discriminator(algorithm.score.bottleneck(call.x_t, call.t, cond))
    expected = NUMBERS["gan_loss_weight"] * F.softplus(-logits).mean()
    torch.testing.assert_close(adversarial, expected)


def test_the_score_estimator_has_a_diffusion_and_a_logistic_loss():
    algorithm, cond = dmd2(), {}
    samples = algorithm.rollout(latents(), cond, 749, 749)
    loss = algorithm.score_loss(samples, cond, latents())
    assert set(loss.terms) == {"diffusion", "logistic"}
    on_real, on_fake = (
        algorithm.discriminator(algorithm.score.bottleneck(call.x_t, call.t, cond))
        for call in tuple(algorithm.score.calls)
    )
    expected = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    torch.testing.assert_close(loss.terms["logistic"], DISCRIMINATOR_WEIGHT * expected)
    assert loss.watch["discriminator/real"].item() == pytest.approx(on_real.mean().item())
    assert loss.watch["discriminator/fake"].item() == pytest.approx(on_fake.mean().item())
    assert not any(value.requires_grad for value in loss.watch.values())


def test_each_loss_of_the_score_estimator_teaches_what_it_should():
    for term, teaches_head in (("diffusion", False), ("logistic", True)):
        algorithm = dmd2()
        samples = algorithm.rollout(latents(), {}, 749, 749)
        algorithm.score_loss(samples, {}, latents()).terms[term].backward()
        assert has_gradient(algorithm.score)
        assert has_gradient(algorithm.discriminator) == teaches_head
        assert not has_gradient(algorithm.generator)


def test_the_head_judges_reals_and_the_iterations_own_samples_each_at_a_time_of_its_own():
    """Reals are 5 everywhere, the student's answer is -2: whatever is noise has mean 0, std 1."""
    algorithm = dmd2(generator=Student(gain=0.0, bias=-2.0))
    samples = algorithm.rollout(latents(4000), {}, 749, 749)
    with torch.no_grad():
        algorithm.score_loss(samples, {}, torch.full((4000, 4, SIZE, SIZE), 5.0))
    real, fake = algorithm.score.calls
    for call, x0 in ((real, 5.0), (fake, -2.0)):
        alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in VariancePreserving()(call.t))
        eps = (call.x_t - alpha * x0) / sigma
        assert eps.mean().item() == pytest.approx(0, abs=4 / 505)
        assert eps.std().item() == pytest.approx(1, rel=4 / 715)
        assert call.t.min() >= 1
        assert call.t.max() <= 999
        assert call.t.mean().item() == pytest.approx(500, abs=4 * 289 / 63)
    assert torch.corrcoef(torch.stack([real.t, fake.t]))[0, 1].abs() < 4 / 63


def test_the_same_samples_teach_all_networks():
    """The answer at each step is a code; an estimator that says 0 loses the code squared."""
    algorithm = dmd2(
        Method(score_loss="x0"),
        generator=Student(gain=0.0, bias={999: 4.0, 749: 3.0, 499: 2.0, 249: 1.0}),
    )
    nn.init.zeros_(algorithm.score.decode.weight)
    nn.init.zeros_(algorithm.score.decode.bias)
    for t, code in ((999, 4.0), (749, 3.0), (499, 2.0), (249, 1.0)):
        samples = algorithm.rollout(latents(), {}, t, t)
        loss = algorithm.score_loss(samples, {}, latents())
        assert loss.terms["diffusion"].item() == pytest.approx(code**2)


def test_the_score_estimator_never_sees_the_students_weights():
    algorithm = dmd2()
    before = {name: p.clone() for name, p in algorithm.score.named_parameters()}
    algorithm.couple()
    for name, p in algorithm.score.named_parameters():
        assert torch.equal(p, before[name])
