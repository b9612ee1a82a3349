"""Stage 2: candidates of one noisy state, their ranking, and the preference loss."""

import math

import pytest
import torch
from networks import STEPS, D, Estimator, Student, flash, has_gradient
from torch import nn

from flashdmd.sampler import times
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving


class Judge(nn.Module):
    """A reward of the first coordinate, times `sign`; remembers what it was asked."""

    def __init__(self, sign=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(sign))
        self.calls = []

    def forward(self, z_t, t, cond):
        self.calls.append((z_t, t, cond))
        return self.weight * z_t[:, 0]


def joint(student=None, numbers=None, sign=1.0, reference=None, process=None):
    student = student or Student()
    return flash(
        process,
        numbers,
        generator=student,
        reward=Judge(sign),
        reference=reference or Student(),
    )


def test_candidates_are_drawn_at_the_chosen_steps_and_judged_at_their_own_noise_level():
    algorithm = joint()
    drawn = algorithm.draw_candidates(torch.randn(6, D), {}, {})
    assert [t for _, t, *_ in drawn] == [999, 749]
    assert [call.step for call in algorithm.generator.calls] == [999, 749]  # and not one more
    for (z, t, cond), level in zip(algorithm.reward.calls, (749, 499), strict=True):
        assert cond == {}
        assert z.shape == (4 * 6, D)
        assert torch.equal(t, times(level, z))


def test_steps_without_preference_are_walked_as_always():
    algorithm = joint(numbers={"preference_timesteps": (999, 499)})
    drawn = algorithm.draw_candidates(torch.randn(6, D), {}, {})
    assert [t for _, t, *_ in drawn] == [999, 499]
    assert [call.step for call in algorithm.generator.calls] == [999, 749, 499]
    assert [call.differentiable for call in algorithm.generator.calls] == [True, False, True]
    assert [int(t[0]) for _, t, _ in algorithm.reward.calls] == [749, 249]


def test_the_first_candidates_come_from_pure_noise_and_the_next_from_one_of_them():
    algorithm, noise = joint(numbers={"candidates": 4}), torch.randn(400, D)
    (z, _, _, pool, _), (z_next, *_) = algorithm.draw_candidates(noise, {}, {})
    assert torch.equal(z, noise)
    assert pool.shape == (4, 400, D)
    came_from = (pool == z_next).all(2)  # (K, B)
    assert torch.equal(came_from.sum(0), torch.ones(400).long())
    # any of them: binomial(400, 1/4), 100 with a standard deviation of 8.7
    assert all(abs(n - 100) < 35 for n in came_from.sum(1).tolist())


@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
def test_all_candidates_of_an_example_are_draws_of_the_policy_at_its_state(schedule):
    """z' ~ N(alpha' x_0(z_t), sigma'^2 I), independently."""
    algorithm = joint(process=Process(schedule, "eps"), numbers={"candidates": 2000})
    algorithm.generator.requires_grad_(False)
    for z, t, _, pool, _ in algorithm.draw_candidates(torch.randn(5, D), {}, {}):
        level = STEPS[STEPS.index(t) + 1]
        alpha, sigma = (v.item() for v in schedule(torch.tensor([level])))
        mean = alpha * (0.5 * z + 0.1)
        torch.testing.assert_close(pool.mean(0), mean, atol=4.5 * sigma / 2000**0.5, rtol=0)
        spread = torch.full((5, D), sigma)
        torch.testing.assert_close(pool.std(0), spread, atol=0, rtol=4.5 / 4000**0.5)
        noises = (pool - mean) / sigma
        alike = (noises[:, 0] * noises[:, 1]).mean()  # two examples share no noise
        assert alike.abs() < 4 / (2000 * D) ** 0.5


def test_scores_lie_as_the_candidates_do_and_conditions_go_with_them():
    algorithm = joint()
    reward_cond = {"text": torch.arange(6.0)[:, None]}
    for *_, pool, scores in algorithm.draw_candidates(torch.randn(6, D), {}, reward_cond):
        assert torch.equal(scores, pool[:, :, 0])
    for z, _, cond in algorithm.reward.calls:
        rows = z.unflatten(0, (4, 6))
        assert rows.shape == (4, 6, D)
        assert torch.equal(cond["text"].unflatten(0, (4, 6)), reward_cond["text"].expand(4, 6, 1))


def test_the_students_condition_is_not_the_rewards():
    algorithm, cond, reward_cond = joint(), {"a": torch.zeros(6)}, {"b": torch.zeros(6, 1)}
    algorithm.preference_loss(torch.randn(6, D), cond, reward_cond)
    assert all(call.cond is cond for call in algorithm.generator.calls)
    assert all(call.cond is cond for call in algorithm.reference.calls)
    assert all(set(asked) == {"b"} for _, _, asked in algorithm.reward.calls)


def test_the_loss_is_ln_2_at_the_reference():
    loss = joint().preference_loss(torch.randn(6, D), {}, {})
    assert loss.terms["preference"].item() == pytest.approx(math.log(2), rel=1e-5)


def test_only_the_student_learns_and_only_where_candidates_were_drawn():
    algorithm = joint()
    algorithm.preference_loss(torch.randn(6, D), {}, {}).terms["preference"].backward()
    assert algorithm.generator.taught() == {999, 749}
    for other in ("reference", "reward", "score", "discriminator", "teacher"):
        assert not has_gradient(getattr(algorithm, other)), other
    # one forward at each step, which draws the candidates and learns from them
    assert [call.step for call in algorithm.generator.calls] == [999, 749]
    assert all(call.differentiable for call in algorithm.generator.calls)
    assert not any(call.differentiable for call in algorithm.reference.calls)


def brute_force(algorithm, drawn, student, reference):
    """-log sigmoid(beta H),  H = (alpha'/sigma') mean((n_w - n_l) (x_0 - x_0_ref))."""
    terms = []
    for z, t, _, pool, _ in drawn:
        level = STEPS[STEPS.index(t) + 1]
        alpha, sigma = (v.item() for v in algorithm.sampler.process.schedule(torch.tensor([level])))
        x0, ref = (f(z, times(t, z), {}) for f in (student, reference))
        for b in range(len(z)):
            by_reward = sorted(range(len(pool)), key=lambda k, b=b: pool[k, b, 0].item())
            win, lose = pool[by_reward[-1], b], pool[by_reward[0], b]
            noises = (win - lose) / sigma
            h = (alpha / sigma) * (noises * (x0[b] - ref[b])).mean()
            terms.append(math.log(1 + math.exp(-algorithm.method.beta * h)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
def test_the_loss_is_the_log_odds_of_best_over_worst_under_the_policy(schedule):
    student, reference = Student(bias=0.1), Student(bias=0.08)
    numbers = {"beta": 50.0, "ratio_clamp": 0.9}
    algorithm = joint(student, numbers, 1.0, reference, Process(schedule, "eps"))
    noise = torch.randn(6, D)
    with torch.no_grad():
        torch.manual_seed(3)
        drawn = algorithm.draw_candidates(noise, {}, {})
        torch.manual_seed(3)
        loss = algorithm.preference_loss(noise, {}, {})
        expected = brute_force(algorithm, drawn, student, reference)
    assert expected != pytest.approx(math.log(2), rel=1e-3)
    assert loss.terms["preference"].item() == pytest.approx(expected, rel=1e-4)
    scores = torch.stack([s for *_, s in drawn])  # (S, K, B)
    assert loss.watch["reward/best"].item() == pytest.approx(scores.amax(1).mean().item())
    assert loss.watch["reward/worst"].item() == pytest.approx(scores.amin(1).mean().item())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_down_the_loss_raises_the_reward(sign):
    algorithm = joint(sign=sign)
    algorithm.preference_loss(torch.randn(64, D), {}, {}).terms["preference"].backward()
    for t in ("999", "749"):
        grad = algorithm.generator.bias[t].grad
        assert sign * grad[0] < 0
        # coordinates that the reward does not look at move by chance only
        assert grad[0].abs() > 3 * grad[1:].abs().max()


def test_beyond_the_clamp_nothing_more_is_learned():
    """LPO's bound: a student that prefers the winner this clearly gets no further gradient."""
    far = joint(Student(bias=50.0))
    far.preference_loss(torch.randn(6, D), {}, {}).terms["preference"].backward()
    assert far.generator.taught() == set()
    near = joint(Student(bias=0.1001))
    near.preference_loss(torch.randn(6, D), {}, {}).terms["preference"].backward()
    assert near.generator.taught() == {999, 749}


def test_equal_scores_teach_nothing():
    algorithm = joint(sign=0.0)
    algorithm.preference_loss(torch.randn(6, D), {}, {}).terms["preference"].backward()
    assert algorithm.generator.taught() == set()


def test_without_a_reference_there_is_no_preference_loss():
    algorithm = flash(reward=Judge(), reference=None, score=Estimator())
    with pytest.raises(AssertionError):
        algorithm.preference_loss(torch.randn(6, D), {}, {})
