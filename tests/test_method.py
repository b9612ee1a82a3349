"""The method's numbers, and the order of updates that they ask for: checked by counting."""

from collections import Counter

import pytest

from flashdmd.algorithm import SPLIT, Method, cycle, split


def test_the_defaults_are_the_papers():
    method = Method()
    assert method.student_timesteps == (999, 749, 499, 249)
    assert method.matching_timesteps == (999, 749, 499)
    assert method.adversarial_timesteps == (249,)
    assert method.preference_timesteps == (999, 749)
    assert method.candidates == 4
    assert method.preferences_per_distillation == 5
    assert method.ttur in (1, 2)
    assert method.renoise_range == (20, 980)


def updates(method, stage, iterations):
    """What the loop would do: one list of updates per iteration."""
    order = cycle(method, stage)
    return [order[n % len(order)] for n in range(iterations)]


def count(iterations):
    return Counter(update for iteration in iterations for update in iteration)


@pytest.mark.parametrize("ttur", [1, 2, 5])
def test_score_and_discriminator_learn_in_every_iteration_and_the_generator_in_each_kth(ttur):
    iterations = updates(Method(ttur=ttur), "distill", 100)
    assert count(iterations) == {
        "generator": 100 // ttur,
        "score": 100,
        "discriminator": 100,
    }
    for n, iteration in enumerate(iterations):
        assert ("generator" in iteration) == (n % ttur == 0)
        # the generator first: the others then learn from what it was before (method of DMD2)
        assert iteration[-2:] == ("score", "discriminator")
        assert len(set(iteration)) == len(iteration)


@pytest.mark.parametrize("ttur", [1, 2, 5])
@pytest.mark.parametrize("ratio", [1, 2, 5, 10])
def test_the_joint_stage_alternates_preferences_and_distillation(ttur, ratio):
    method = Method(ttur=ttur, preferences_per_distillation=ratio)
    iterations = updates(method, "joint", 3 * (ttur + ratio))
    assert count(iterations) == {
        "generator": 3,
        "score": 3 * ttur,
        "discriminator": 3 * ttur,
        "preference": 3 * ratio,
    }
    # never summed: a preference update has an iteration of its own
    assert all(
        iteration == ("preference",) for iteration in iterations if "preference" in iteration
    )


def test_a_ratio_of_zero_is_distillation():
    method = Method(preferences_per_distillation=0)
    assert cycle(method, "joint") == cycle(method, "distill")


def test_rl_alone_distils_nothing():
    assert count(updates(Method(), "rl", 7)) == {"preference": 7}


@pytest.mark.parametrize("stage", ["joint", "rl"])
def test_reinforcement_needs_a_step_to_draw_candidates_at(stage):
    method = Method(preference_timesteps=())
    assert cycle(method, "distill")
    with pytest.raises(ValueError, match=r"preference_timesteps, which is empty"):
        cycle(method, stage)


@pytest.mark.parametrize("n", [*SPLIT, 3, 5, 6])
def test_steps_are_split_into_a_method(n):
    method = Method(**split(tuple(999 - 1000 * i // n for i in range(n))))
    assert len(method.student_timesteps) == n
    if n > 1:  # matching above, adversarial below, every step taught by one of them
        assert min(method.matching_timesteps) > max(method.adversarial_timesteps)
        both = method.matching_timesteps + method.adversarial_timesteps
        assert both == method.student_timesteps
    assert set(method.preference_timesteps) <= set(method.matching_timesteps)


def test_the_split_of_four_steps_is_the_default():
    assert Method(**split((999, 749, 499, 249))) == Method()


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"student_timesteps": (249, 999)}, r"\(249, 999\) must be strictly decreasing"),
        ({"student_timesteps": (999, 999, 249)}, "must be strictly decreasing"),
        ({"student_timesteps": ()}, "must be strictly decreasing"),
        ({"student_timesteps": (1001, 249)}, r"\(1001, 249\) must lie in 1\.\.1000"),
        ({"student_timesteps": (999, 0)}, r"must lie in 1\.\.1000"),
        (
            {"matching_timesteps": (999, 500, 10)},
            r"matching_timesteps=\(999, 500, 10\): \[10, 500\] are not among student_timesteps",
        ),
        ({"adversarial_timesteps": (250,)}, r"adversarial_timesteps=.*\[250\] are not among"),
        ({"preference_timesteps": (1000,)}, r"preference_timesteps=.*\[1000\] are not among"),
        ({"matching_timesteps": ()}, "need one step or more"),
        ({"adversarial_timesteps": ()}, "need one step or more"),
        ({"preference_timesteps": (999, 249)}, "holds 249, the last step"),
        ({"renoise_range": (980, 20)}, r"renoise_range=\(980, 20\) must rise within 1\.\.999"),
        ({"renoise_range": (0, 980)}, "must rise"),
        ({"renoise_range": (20, 1000)}, "must rise"),
        ({"ttur": 0}, "ttur=0 must be 1 or more"),
        ({"preferences_per_distillation": -1}, "preferences_per_distillation=-1 0 or more"),
        ({"candidates": 1}, "candidates=1 2 or more"),
        ({"score_coupling": 1.5}, r"score_coupling=1\.5 must lie in 0\.\.1"),
        ({"score_coupling": -0.1}, "score_coupling"),
        ({"ratio_clamp": 0.0}, r"ratio_clamp=0\.0 must lie between 0 and 1"),
        ({"ratio_clamp": 1.0}, r"ratio_clamp=1\.0"),
        ({"beta": 0.0}, r"beta=0\.0"),
        ({"renoise_shift": -3.0}, r"renoise_shift=-3\.0"),
        ({"gan_loss_weight": -0.1}, r"gan_loss_weight=-0\.1 must be 0 or more"),
        ({"gan_gradient_ratio": 0.0}, r"gan_gradient_ratio=0\.0 positive, or None"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(numbers, says):
    with pytest.raises(ValueError, match=says):
        Method(**numbers)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("renoise", r"\('full', 'above_t'\)"),
        ("score_loss", r"\('native', 'eps', 'x0'\)"),
        ("score_times", r"\('uniform', 'logit_normal'\)"),
        ("adversarial_input", r"\('finished', 'sampler_state'\)"),
        ("real_images", r"\('decoded', 'raw'\)"),
    ],
)
def test_a_misspelt_choice_is_refused_and_not_taken_for_the_other(name, choices):
    method = Method()
    object.__setattr__(method, name, "ful")  # past the type checks that only tests run
    with pytest.raises(ValueError, match=f"{name}='ful' must be one of {choices}"):
        method.__post_init__()
