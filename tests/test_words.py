"""The text encoder's lesson: it learns what captions look like, and can be resumed."""

from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from flashdmd.emoji.fit import Fit
from flashdmd.emoji.teacher import training_times
from flashdmd.emoji.words import Painter, learn_words, plain_latents
from flashdmd.emoji.world import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.score_folder(tmp_path_factory.mktemp("words") / "score")


def test_every_place_asks_on_its_own() -> None:
    torch.manual_seed(0)
    painter = Painter(32, 3, 5)
    words = torch.randn(2, 7, 32)
    picture = painter(words)
    assert picture.shape == (2, 5, 3, 3)
    assert picture.flatten(2).std(2).min() > 0
    painter.places.data[4] += 1.0  # the middle
    moved = (painter(words) - picture).abs().amax((0, 1))
    assert moved[1, 1] > 1e-3
    moved[1, 1] = 0
    assert moved.max() < 1e-6


@pytest.mark.parametrize("parts", [(12,), (5, 12)])
def test_the_lesson_is_learned_and_resumed(
    parts: tuple[int, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder changes, and stopping on the way changes nothing: the rate does not fall yet."""
    monkeypatch.setattr(Fit, "share", lambda self, step: 1.0)
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    monkeypatch.setattr("flashdmd.emoji.words.LATENT_CHANNELS", tiny.CHANNELS)
    monkeypatch.setattr(
        "flashdmd.emoji.words.plain_latents",
        lambda world, vae: torch.randn(
            len(world.indices("train")), tiny.CHANNELS, 8, 8, generator=torch.Generator()
        ),
    )
    before = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    for steps in parts:
        learn_words(pipe.text_encoder, pipe.tokenizer, pipe.vae, tmp_path, steps, batch=8)
    after = pipe.text_encoder.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in before)
    once = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).text_encoder
    learn_words(once, pipe.tokenizer, pipe.vae, tmp_path / "once", 12, batch=8)
    assert all(torch.equal(after[k], v) for k, v in once.state_dict().items())


def test_plain_latents_are_of_pictures_as_drawn(folder: Path) -> None:
    world = World()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    some = world.indices("train")[:3]
    world.indices = lambda split: some  # type: ignore[method-assign]
    x0 = plain_latents(world, pipe.vae)
    picture = torch.from_numpy(world.plain(some[1]).copy()).float() / 127.5 - 1
    assert torch.allclose(x0[1:2], pipe.vae.encode(picture[None]).latent_dist.mode(), atol=1e-4)


def test_training_times_crowd_where_shapes_are_settled() -> None:
    torch.manual_seed(0)
    t = training_times(100_000, 0.6, 1.0)
    assert t.min() >= 0
    assert t.max() < 1000
    middle = ((t > 500) & (t < 900)).float().mean()
    #  2/3 P(0 < 0.6 + z < 2.197) + 1/3 of 0.4
    normal = torch.distributions.Normal(0.0, 1.0)
    share = normal.cdf(torch.tensor(1.597)) - normal.cdf(torch.tensor(-0.6))
    assert middle == pytest.approx(float(2 / 3 * share + 0.4 / 3), abs=0.01)
