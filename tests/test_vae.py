"""The embedded autoencoder: its normalisation, its adversary, and that the command's loop runs."""

import pytest
import torch
from diffusers import AutoencoderKL
from tests import tiny

from flashdmd.discriminator import Discriminator
from flashdmd.emoji import vae
from flashdmd.models.backbones import EfficientNetLite


@pytest.fixture(scope="module")
def adversary() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(EfficientNetLite(0), image_size=64, width=16)


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


def test_each_side_of_the_adversary_gets_its_own_gradient(adversary: Discriminator) -> None:
    real, fake = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    fake.requires_grad_()
    terms = vae.adversarial(adversary, vae.seen(adversary, real), vae.seen(adversary, fake))
    terms["adversarial"].backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversary.parameters())

    fake.grad = None
    terms["adversary"].backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in adversary.heads.parameters())
    assert all(p.grad is None for p in adversary.backbone.parameters())


def test_pictures_are_unlike_others_and_not_themselves(adversary: Discriminator) -> None:
    a, b = (vae.seen(adversary, x) for x in torch.rand(2, 2, 3, 64, 64) * 2 - 1)
    assert vae.unlike(a, a) == 0
    assert vae.unlike(a, b) > 0.1


def test_training_goes_on_and_leaves_a_stock_autoencoder(tmp_path) -> None:
    vae.train(tmp_path, 1, batch=2)
    vae.train(tmp_path, 3, batch=2)
    model = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode().shape == (1, 8, 8, 8)
    assert (model.config.scaling_factor, model.config.shift_factor) == (1, 0)


def test_an_autoencoder_can_be_trained_on(tmp_path) -> None:
    vae.train(tmp_path / "first", 1, batch=2)
    start = AutoencoderKL.from_pretrained(tmp_path / "first/vae")
    vae.train(tmp_path / "on", 1, batch=2, start=tmp_path / "first/vae", seed=1)
    on = AutoencoderKL.from_pretrained(tmp_path / "on/vae")
    kernel = "decoder.conv_in.weight"  # one that the normalisation leaves alone
    moved = (on.state_dict()[kernel] - start.state_dict()[kernel]).abs().max()
    assert 0 < moved < 0.02


def test_a_decoder_trained_on_alone_leaves_the_latents_as_they_are(tmp_path) -> None:
    vae.train(tmp_path / "first", 1, batch=2)
    start = AutoencoderKL.from_pretrained(tmp_path / "first/vae")
    vae.train(tmp_path / "on", 3, batch=2, start=tmp_path / "first/vae", decoder_only=True)
    on = AutoencoderKL.from_pretrained(tmp_path / "on/vae")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    z = start.encode(images).latent_dist.mode()
    assert torch.equal(on.encode(images).latent_dist.mode(), z)
    assert not torch.equal(on.decode(z).sample, start.decode(z).sample)
