"""What may be put on the discriminator: changed pictures, and an approximate R1 on real ones."""

import pytest
import torch
from networks import D, flash
from torch import Tensor, nn

from flashdmd import losses
from flashdmd.algorithm import FlashDMD, Rollout
from flashdmd.augment import diff_augment


def linear(**how) -> FlashDMD:
    return flash(discriminator=nn.Linear(D, 1), decode=nn.Identity(), **how)


def drawn(algorithm: FlashDMD, n: int = 8) -> Rollout:
    return algorithm.rollout(torch.randn(n, D), {}, 749, 249)


def double(images: Tensor) -> Tensor:
    return 2 * images


def test_r1_of_a_linear_discriminator_has_a_closed_form():
    """E |w . sigma eps|^2 = sigma^2 |w|^2, of spread sqrt(2 / n) of itself over n pictures."""
    n = 200_000
    algorithm = linear(r1_weight=3.0, r1_sigma=0.2)
    weight = algorithm.discriminator.weight
    loss = algorithm.discriminator_loss(drawn(algorithm, n), torch.randn(n, D))
    expected = 3 * 0.2**2 * weight.square().sum()
    spread = (2 / n) ** 0.5
    assert loss.terms["r1"].item() == pytest.approx(expected.item(), rel=5 * spread)
    (gradient,) = torch.autograd.grad(loss.terms["r1"], weight)
    torch.testing.assert_close(gradient, 3 * 0.2**2 * 2 * weight, rtol=0.05, atol=1e-3)


def test_r1_is_the_mean_square_over_pictures_and_heads():
    clean, noisy = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 2.0], [2.0, -1.0]])
    assert losses.approximate_r1(clean, noisy).item() == pytest.approx((1 + 0 + 4 + 0) / 4)


def test_r1_of_a_constant_discriminator_is_zero():
    algorithm = linear(r1_weight=1.0)
    nn.init.zeros_(algorithm.discriminator.weight)
    loss = algorithm.discriminator_loss(drawn(algorithm), torch.randn(8, D))
    assert loss.terms["r1"].item() == 0


def test_r1_reaches_the_discriminator_through_both_of_its_answers():
    clean, noisy = (torch.randn(4, 2, requires_grad=True) for _ in range(2))
    losses.approximate_r1(clean, noisy).backward()
    torch.testing.assert_close(clean.grad, 2 * (clean - noisy).detach() / 8)
    torch.testing.assert_close(noisy.grad, -clean.grad)


def test_without_a_weight_nothing_is_drawn_or_added():
    algorithm = linear()
    samples, real = drawn(algorithm), torch.randn(8, D)
    state = torch.get_rng_state()
    loss = algorithm.discriminator_loss(samples, real)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(loss.terms) == {"hinge"}
    on_real, on_fake = algorithm.discriminator(real), algorithm.discriminator(samples.image)
    assert torch.equal(loss.terms["hinge"], losses.hinge_discriminator(on_real, on_fake))


def test_the_hinge_and_what_is_watched_do_not_change_with_r1():
    plain, regularised = linear(), linear(r1_weight=1.0)
    regularised.discriminator = plain.discriminator
    samples, real = drawn(plain), torch.randn(8, D)
    a, b = (x.discriminator_loss(samples, real) for x in (plain, regularised))
    assert torch.equal(a.terms["hinge"], b.terms["hinge"])
    assert a.watch == b.watch


def test_the_discriminator_sees_real_and_fake_pictures_changed():
    plain, changed = linear(), linear(augment=double)
    changed.discriminator = plain.discriminator
    samples, real = drawn(plain), torch.randn(8, D)
    seen = Rollout(samples.t, samples.t_hat, samples.x0, 2 * samples.image)
    expected = plain.discriminator_loss(seen, 2 * real)
    loss = changed.discriminator_loss(samples, real)
    assert torch.equal(loss.terms["hinge"], expected.terms["hinge"])


def test_r1s_noise_comes_after_the_change():
    """Doubled noise would be four times the penalty."""
    plain, changed = linear(r1_weight=1.0), linear(r1_weight=1.0, augment=double)
    changed.discriminator = plain.discriminator
    samples, real = drawn(plain), torch.randn(8, D)
    terms = []
    for algorithm in (plain, changed):
        torch.manual_seed(3)
        terms.append(algorithm.discriminator_loss(samples, real).terms["r1"])
    torch.testing.assert_close(terms[0], terms[1])


def test_the_generator_learns_through_the_change():
    gradients = {}
    discriminator = nn.Linear(D, 1)
    for name, how in {"plain": {}, "doubled": {"augment": double}}.items():
        torch.manual_seed(1)
        algorithm = linear(**how)
        algorithm.discriminator = discriminator
        algorithm.generator_loss(drawn(algorithm), {}).terms["adversarial"].backward()
        gradients[name] = algorithm.generator.bias["249"].grad
    assert gradients["plain"].any()
    torch.testing.assert_close(gradients["doubled"], 2 * gradients["plain"])


def test_pictures_get_their_gradient_through_diff_augment():
    """None where a picture is moved out or cut out."""
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    changed = diff_augment(images, ("translation", "cutout"))
    losses.hinge_generator(discriminator(changed)).backward()
    touched = (images.grad != 0).any(1).float().mean((1, 2))
    assert (touched > 0.5).all()  # cut out: a quarter at most; moved out: less than a quarter
    assert (touched < 1).all()
