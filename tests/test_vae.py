"""The embedded autoencoder: its normalisation, its adversary, and that the command's loop runs."""

import pytest
import torch
from diffusers import AutoencoderKL
from tests import tiny

from flashdmd.emoji import vae
from flashdmd.losses import hinge_discriminator, hinge_generator


@pytest.fixture(scope="module")
def adversary() -> vae.Adversary:
    torch.manual_seed(0)
    return vae.Adversary()


def test_normalised_latents_have_unit_variance_and_decode_to_the_same(monkeypatch) -> None:
    torch.manual_seed(0)
    model = tiny.vae()
    monkeypatch.setattr(vae, "LATENT_CHANNELS", model.config.latent_channels)
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    before = model.decode(model.encode(images).latent_dist.mode()).sample
    std = model.encode(images).latent_dist.std
    vae.normalise(model, images)
    posterior = model.encode(images).latent_dist
    z = posterior.mode()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(z.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(z.shape[1]))
    torch.testing.assert_close(model.decode(z).sample, before, atol=1e-4, rtol=0)
    ratio = posterior.std / std
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio))


def test_each_side_of_the_adversary_gets_its_own_gradient(adversary: vae.Adversary) -> None:
    real, fake = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    fake.requires_grad_()
    seen = adversary.see(fake)
    hinge_generator(adversary.frozen(seen)).backward(retain_graph=True)
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversary.parameters())

    fake.grad = None
    detached = [m.detach() for m in seen]
    hinge_discriminator(adversary(adversary.see(real)), adversary(detached)).backward()
    assert fake.grad is None
    heads = [p for p in adversary.parameters() if p.requires_grad]
    assert heads
    assert all(p.grad is not None for p in heads)
    assert {id(p) for p in heads} == {id(p) for p in adversary.heads.parameters()}


def test_pictures_are_unlike_others_and_not_themselves(adversary: vae.Adversary) -> None:
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert vae.unlike(adversary.see(a), adversary.see(a)) == 0
    assert vae.unlike(adversary.see(a), adversary.see(b)) > 0.1


def test_training_goes_on_and_leaves_a_stock_autoencoder(tmp_path) -> None:
    vae.train(tmp_path, 1, batch=2)
    vae.train(tmp_path, 3, batch=2)
    model = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode().shape == (1, 8, 8, 8)
    assert (model.config.scaling_factor, model.config.shift_factor) == (1, 0)
