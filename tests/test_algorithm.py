"""Stage 1: what is computed where, on what, and who receives gradient from it."""

import pytest
import torch
from networks import STEPS, D, Estimator, Student, flash, has_gradient
from torch import nn

from flashdmd.algorithm import SPLIT, split
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

HIGH = (999, 749, 499)


def noise(n=8):
    return torch.randn(n, D)


# The rollout


@pytest.mark.parametrize("t", HIGH)
def test_a_rollout_is_one_walk_and_one_more_forward(t):
    student = Student()
    flash(generator=student).rollout(noise(), {}, t, 249)
    assert [call.step for call in student.calls] == [999, 749, 499, 249, 249]
    assert [i for i, call in enumerate(student.calls) if call.differentiable] == [
        STEPS.index(t),
        4,
    ]


@pytest.mark.parametrize("t", HIGH)
def test_a_rollout_holds_the_students_answer_at_every_step(t):
    student = Student()
    samples = flash(generator=student).rollout(noise(), {}, t, 249)
    assert list(samples.x0) == list(STEPS)
    for call in student.calls[:4]:
        answer = student(call.x_t, call.t, {})
        assert torch.equal(samples.x0[call.step], answer)
        assert samples.x0[call.step].requires_grad == (call.step == t)
    assert samples.image.requires_grad


def test_under_no_grad_a_rollout_leads_back_nowhere():
    algorithm = flash()
    with torch.no_grad():
        samples = algorithm.rollout(noise(), {}, 749, 249)
    assert not any(call.differentiable for call in algorithm.generator.calls)
    assert not any(x.requires_grad for x in (*samples.x0.values(), samples.image))


def test_at_the_first_step_the_student_is_given_pure_noise():
    student, z = Student(), noise()
    samples = flash(generator=student).rollout(z, {}, 999, 249)
    assert torch.equal(student.calls[0].x_t, z)
    torch.testing.assert_close(samples.x0[999], 0.5 * z + 0.1)


def test_later_steps_are_reached_by_the_students_own_walk():
    """A student that always answers 2 arrives at t with N(2 alpha, sigma^2)."""
    student = Student(gain=0.0, bias=2.0)
    flash(generator=student).rollout(noise(20_000), {}, 499, 249)
    for call in student.calls[1:4]:
        alpha, sigma = (v.item() for v in VariancePreserving()(call.t[:1]))
        assert call.x_t.mean().item() == pytest.approx(2 * alpha, abs=4 / 282)
        assert call.x_t.std().item() == pytest.approx(sigma, rel=4 / 400)


def test_the_discriminator_sees_a_renoised_finished_sample_or_the_samplers_own_state():
    """The finished sample is the answer at 249; the sampler's state there comes from 499's."""
    bias = {999: 4.0, 749: 3.0, 499: 2.0, 249: 1.0}
    alpha, sigma = (v.item() for v in VariancePreserving()(torch.tensor([249])))
    for mode, origin in (("finished", 1.0), ("sampler_state", 2.0)):
        student = Student(gain=0.0, bias=bias)
        algorithm = flash(generator=student, numbers={"adversarial_input": mode})
        algorithm.rollout(noise(20_000), {}, 749, 249)
        *_, visited, judged = student.calls
        assert judged.x_t.mean().item() == pytest.approx(origin * alpha, abs=4 * sigma / 282)
        assert judged.x_t.std().item() == pytest.approx(sigma, rel=4 / 400)
        assert torch.equal(judged.x_t, visited.x_t) == (mode == "sampler_state")


def test_the_image_is_the_decoded_answer_at_the_low_noise_step():
    student = Student()
    algorithm = flash(generator=student)
    samples = algorithm.rollout(noise(), {}, 749, 249)
    torch.testing.assert_close(samples.image, algorithm.decode(0.5 * student.calls[-1].x_t + 0.1))


@pytest.mark.parametrize("n", SPLIT)
def test_a_student_of_any_number_of_steps_walks_all_of_them_once(n):
    lists = split(tuple(999 - 1000 * i // n for i in range(n)))
    for t in lists["matching_timesteps"]:
        for t_hat in lists["adversarial_timesteps"]:
            student = Student(steps=lists["student_timesteps"])
            algorithm = flash(generator=student, numbers=lists)
            samples = algorithm.rollout(noise(), {}, t, t_hat)
            walked = [call.step for call in student.calls]
            assert walked == [*lists["student_timesteps"], t_hat]
            algorithm.generator_loss(samples, {}).terms["adversarial"].backward()
            assert student.taught() == {t_hat}


def test_conditions_reach_every_forward():
    algorithm, cond = flash(), {"text": torch.randn(8, 3)}
    samples = algorithm.rollout(noise(), cond, 749, 249)
    algorithm.generator_loss(samples, cond)
    algorithm.score_loss(samples, cond)
    for network in (algorithm.generator, algorithm.teacher, algorithm.score):
        assert network.calls
        assert all(call.cond is cond for call in network.calls)


@pytest.mark.parametrize(("t_hat", "mode"), [(249, "finished"), (999, "sampler_state")])
def test_both_terms_at_one_step_still_have_separate_forwards(t_hat, mode):
    """A student of one step has nowhere else to put them."""
    student = Student()
    numbers = {"adversarial_timesteps": (999, 249), "adversarial_input": mode}
    algorithm = flash(generator=student, numbers=numbers)
    samples = algorithm.rollout(noise(), {}, 999, t_hat)
    assert [call.differentiable for call in student.calls] == [True, False, False, False, True]
    algorithm.generator_loss(samples, {}).terms["adversarial"].backward()
    assert student.taught() == {t_hat}


# Who receives gradient from what


@pytest.mark.parametrize("t", HIGH)
def test_matching_teaches_the_student_at_t_and_nothing_else(t):
    algorithm = flash()
    samples = algorithm.rollout(noise(), {}, t, 249)
    algorithm.generator_loss(samples, {}).terms["matching"].backward()
    assert algorithm.generator.taught() == {t}
    for other in ("teacher", "score", "discriminator", "decode"):
        assert not has_gradient(getattr(algorithm, other)), other


@pytest.mark.parametrize("t", HIGH)
@pytest.mark.parametrize("mode", ["finished", "sampler_state"])
def test_the_adversarial_term_teaches_one_forward_at_the_low_noise_step(t, mode):
    algorithm = flash(numbers={"adversarial_input": mode, "gan_loss_weight": 0.3})
    student = algorithm.generator
    samples = algorithm.rollout(noise(), {}, t, 249)
    algorithm.generator_loss(samples, {}).terms["adversarial"].backward()
    assert student.taught() == {249}
    for other in ("teacher", "score"):
        assert not has_gradient(getattr(algorithm, other)), other
    # -lambda mean of logits that are linear in x_0, by that one forward and no longer way
    slope = -0.3 * (algorithm.discriminator.weight @ algorithm.decode.weight).mean(0)
    torch.testing.assert_close(student.bias["249"].grad, slope)
    x_hat = student.calls[-1].x_t.mean(0)
    torch.testing.assert_close(student.gain["249"].grad, slope * x_hat, rtol=1e-4, atol=1e-6)


def test_the_two_terms_share_no_graph():
    algorithm = flash()
    samples = algorithm.rollout(noise(), {}, 749, 249)
    terms = algorithm.generator_loss(samples, {}).terms
    for term in terms.values():  # freed by the first, missed by none
        term.backward()
    assert algorithm.generator.taught() == {749, 249}


def test_score_and_discriminator_teach_themselves_only():
    algorithm = flash()
    samples = algorithm.rollout(noise(), {}, 749, 249)  # with the graphs of a generator's turn
    sum(algorithm.score_loss(samples, {}).terms.values()).backward()
    assert has_gradient(algorithm.score)
    assert not has_gradient(algorithm.discriminator)
    algorithm.score.zero_grad()
    sum(algorithm.discriminator_loss(samples, torch.randn(8, D)).terms.values()).backward()
    assert has_gradient(algorithm.discriminator)
    for other in ("teacher", "generator", "score", "decode"):
        assert not has_gradient(getattr(algorithm, other)), other


def test_what_is_only_watched_holds_no_graph():
    algorithm = flash()
    samples = algorithm.rollout(noise(), {}, 749, 249)
    for loss in (
        algorithm.generator_loss(samples, {}),
        algorithm.score_loss(samples, {}),
        algorithm.discriminator_loss(samples, torch.randn(8, D)),
    ):
        assert all(term.requires_grad for term in loss.terms.values())
        assert not any(value.requires_grad for value in loss.watch.values())


# What the losses are


def test_matching_compares_teacher_and_score_at_one_renoised_sample():
    algorithm = flash()
    samples = algorithm.rollout(noise(), {}, 749, 249)
    x0 = samples.x0[749]
    x0.retain_grad()
    loss = algorithm.generator_loss(samples, {})
    loss.terms["matching"].backward()
    (real,), (fake,) = algorithm.teacher.calls, algorithm.score.calls
    assert real.x_t is fake.x_t
    assert torch.equal(real.t, fake.t)
    x0_real, x0_fake = 0.2 * real.x_t + 1.0, 0.3 * real.x_t
    unit = (x0 - x0_real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(x0.grad, (x0_fake - x0_real) / unit / x0.numel())
    assert loss.watch["latent/mean"].item() == pytest.approx(samples.x0[249].mean().item())
    assert loss.watch["latent/std"].item() == pytest.approx(samples.x0[249].std().item())


def test_matching_is_silent_where_the_score_estimator_is_the_teacher():
    teacher = Estimator()
    algorithm = flash(teacher=teacher, score=teacher)
    samples = algorithm.rollout(noise(), {}, 749, 249)
    algorithm.generator_loss(samples, {}).terms["matching"].backward()
    assert algorithm.generator.taught() == set()


def test_the_discriminator_is_given_reals_as_real_and_the_students_images_as_fake():
    algorithm = flash(discriminator=nn.Linear(D, 1, bias=False), decode=nn.Identity())
    nn.init.constant_(algorithm.discriminator.weight, 1.0)
    samples = algorithm.rollout(noise(), {}, 749, 249)
    real = torch.full((8, D), 0.1)  # a logit of 0.4
    loss = algorithm.discriminator_loss(samples, real)
    fake = samples.image.sum(1)
    expected = 0.6 + (1 + fake).clamp_min(0).mean().item()
    assert loss.terms["hinge"].item() == pytest.approx(expected, rel=1e-5)
    assert loss.watch["discriminator/real"].item() == pytest.approx(0.4)
    assert loss.watch["discriminator/fake"].item() == pytest.approx(fake.mean().item())


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
@pytest.mark.parametrize("form", ["native", "eps", "x0"])
@pytest.mark.parametrize("schedule", [VariancePreserving(), RectifiedFlow()])
def test_the_score_estimators_error_is_in_the_form_asked_for(schedule, kind, form):
    score = Estimator(gain=0.5, bias=0.2)
    algorithm = flash(
        Process(schedule, kind),
        {"score_loss": form},
        score=score,
        generator=Student(gain=0.0, bias=1.5),
    )
    with torch.no_grad():
        samples = algorithm.rollout(noise(64), {}, 749, 249)
        loss = algorithm.score_loss(samples, {}).terms["diffusion"]
    (call,) = score.calls
    x0, x_t, x0_hat = torch.full((64, D), 1.5), call.x_t, 0.5 * call.x_t + 0.2
    alpha, sigma = (v[:, None] for v in schedule(call.t))
    eps, eps_hat = (x_t - alpha * x0) / sigma, (x_t - alpha * x0_hat) / sigma
    error = {
        "x0": x0_hat - x0,
        "eps": eps_hat - eps,
        "v": (alpha * eps_hat - sigma * x0_hat) - (alpha * eps - sigma * x0),
        "flow": (eps_hat - x0_hat) - (eps - x0),
    }[kind if form == "native" else form]
    torch.testing.assert_close(loss, (error**2).mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(eps.mean().item(), 0.0, atol=4 / 16, rtol=0)
    torch.testing.assert_close(eps.std().item(), 1.0, atol=4 / 22, rtol=0)


def test_the_score_estimator_learns_from_every_step_of_the_student():
    """The answer at each step is a code; an estimator that says 0 loses the code squared."""
    code = {999: 4.0, 749: 3.0, 499: 2.0, 249: 1.0}
    algorithm = flash(
        generator=Student(gain=0.0, bias=code),
        score=Estimator(0.0, 0.0),
        numbers={"score_loss": "x0"},
    )
    for t in HIGH:  # whichever step the generator learns at
        with torch.no_grad():
            seen = [
                algorithm.score_loss(algorithm.rollout(noise(1), {}, t, 249), {})
                .terms["diffusion"]
                .sqrt()
                .item()
                for _ in range(300)
            ]
        counts = [sum(abs(s - c) < 1e-4 for s in seen) for c in code.values()]
        assert sum(counts) == 300
        # each is binomial(300, 1/4): 75 with a standard deviation of 7.5
        assert all(abs(n - 75) < 30 for n in counts), counts


def test_within_a_batch_each_example_has_a_step_of_its_own():
    code = {999: 4.0, 749: 3.0, 499: 2.0, 249: 1.0}
    algorithm = flash(
        generator=Student(gain=0.0, bias=code),
        score=Estimator(0.0, 0.0),
        numbers={"score_loss": "x0"},
    )
    with torch.no_grad():
        samples = algorithm.rollout(noise(4096), {}, 749, 249)
        loss = algorithm.score_loss(samples, {}).terms["diffusion"].item()
    # squares 16, 9, 4, 1: mean 7.5, standard deviation 5.7
    assert loss == pytest.approx(7.5, abs=4 * 5.7 / 64)


# At which noise levels


def score_times(numbers):
    algorithm = flash(numbers=numbers)
    with torch.no_grad():
        algorithm.score_loss(algorithm.rollout(noise(20_000), {}, 749, 249), {})
    return algorithm.score.calls[-1].t


def test_the_score_estimator_is_trained_at_all_times():
    t = score_times({"score_times": "uniform"})
    assert (t.min().item(), t.max().item()) == (1, 999)
    assert t.mean().item() == pytest.approx(500, abs=4 * 289 / 141)
    assert torch.equal(t, t.round())


def test_or_at_the_times_sd3_is_trained_at():
    t = score_times({"score_times": "logit_normal"})
    assert torch.equal(t, t.round())
    assert t.min() >= 1
    assert t.max() <= 999
    logits = (t / 1000).logit()
    assert logits.mean().item() == pytest.approx(0, abs=4 / 141)
    assert logits.std().item() == pytest.approx(1, rel=4 / 200)


def compared_at(t, **numbers):
    """The times at which scores are compared, over a large batch."""
    algorithm = flash(Process(RectifiedFlow(), "flow"), numbers)
    samples = algorithm.rollout(noise(40_000), {}, t, 249)
    algorithm.generator_loss(samples, {})
    return algorithm.teacher.calls[-1], samples.x0[t].detach()


def test_scores_are_compared_all_over_the_range_whatever_the_students_step():
    for t in HIGH:
        call, x0 = compared_at(t)
        assert (call.t.min().item(), call.t.max().item()) == (20, 980)  # both ends included
        assert call.t.mean().item() == pytest.approx(500, abs=4 * 278 / 200)
        sigma = call.t[:, None] / 1000
        eps = (call.x_t - (1 - sigma) * x0) / sigma
        assert eps.mean().item() == pytest.approx(0, abs=4 / 400)
        assert eps.std().item() == pytest.approx(1, abs=4 / 565)


@pytest.mark.parametrize("t", HIGH)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_or_only_above_the_students_step(t, shift):
    call, _ = compared_at(t, renoise="above_t", renoise_shift=shift)
    top = round(1000 * shift * 0.98 / (1 + (shift - 1) * 0.98))
    bottom = min(t, top)  # nothing above 980 is left to draw
    assert call.t.max().item() == top
    assert bottom <= call.t.min().item() <= bottom + 2  # whole u under a shift: steps of up to 2


def test_above_t_never_leaves_the_range():
    call, _ = compared_at(499, renoise="above_t", renoise_range=(600, 700))
    assert (call.t.min().item(), call.t.max().item()) == (600, 700)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_moves_the_compared_times_as_it_moves_a_flows(shift):
    """sigma / (1 - sigma) is `shift` times that of a uniform draw; quantiles move with it."""
    call, _ = compared_at(749, renoise_shift=shift)
    share = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    u = 0.02 + 0.96 * share
    odds = shift * u / (1 - u)
    # 40,000 draws: shares are known to 0.0025, places to twice that
    expected = odds / (1 + odds)
    torch.testing.assert_close((call.t / 1000).quantile(share), expected, atol=0.02, rtol=0)


def test_an_extreme_shift_stays_within_the_schedule():
    algorithm = flash(numbers={"renoise_shift": 100.0})  # 980 becomes 999.8
    algorithm.generator_loss(algorithm.rollout(noise(4096), {}, 749, 249), {})
    assert algorithm.teacher.calls[-1].t.max().item() == 999


# The coupling


@pytest.mark.parametrize(("coupling", "expected"), [(1.0, 4.0), (0.75, 3.25), (0.0, 1.0)])
def test_coupling_pulls_the_score_estimator_to_the_generator(coupling, expected):
    generator, score = Estimator(1.0, 1.0), Estimator(4.0, 4.0)
    flash(generator=generator, score=score, numbers={"score_coupling": coupling}).couple()
    for psi, theta in zip(score.parameters(), generator.parameters(), strict=True):
        assert psi.item() == expected
        assert theta.item() == 1.0
        assert psi.grad is None
        assert psi.requires_grad


def test_coupling_needs_the_same_parameters():
    with pytest.raises(ValueError, match="longer"):
        flash(generator=nn.Linear(2, 2), score=nn.Linear(2, 2, bias=False)).couple()


def test_steps_of_an_iteration_are_drawn_evenly_and_repeatably():
    algorithm = flash(numbers={"adversarial_timesteps": (499, 249)})
    drawn = [algorithm.draw_steps(torch.Generator().manual_seed(n)) for n in range(900)]
    assert drawn == [algorithm.draw_steps(torch.Generator().manual_seed(n)) for n in range(900)]
    for k, values in enumerate([HIGH, (499, 249)]):
        counts = [sum(d[k] == v for d in drawn) for v in values]
        assert sum(counts) == 900
        assert all(abs(n - 900 / len(values)) < 4 * 15 for n in counts), counts


def test_sampler_and_method_must_agree_on_the_steps():
    algorithm = flash()
    sampler = type(algorithm.sampler)(algorithm.sampler.process, (999, 499))
    with pytest.raises(ValueError, match=r"walks \(999, 499\), the method trains \(999, 749"):
        type(algorithm)(algorithm.method, sampler, *[nn.Identity()] * 5)
