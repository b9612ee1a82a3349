"""The latent reward model: its formula, its process, its trunk, and that it learns an order."""

import json
import math
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn

from flashdmd.emoji import pairs
from flashdmd.emoji import reward as emoji_reward
from flashdmd.emoji.vae import latents_digest
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import UserError
from flashdmd.models.reward_unet import EncoderHalf
from flashdmd.reward import GUIDANCE, LatentReward, as_trained, pair_loss
from flashdmd.sampler import repeat
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

VP, FLOW = Process(VariancePreserving(), "v"), Process(RectifiedFlow(), "flow")


class Trunk(nn.Module):
    """Maps whose averages are known: channel means of x, then those times the tokens' mean."""

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> list[Tensor]:
        return [x, x * tokens.mean((1, 2))[:, None, None, None]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.score_folder(tmp_path_factory.mktemp("reward") / "pipeline")


def test_the_score_is_the_formula() -> None:
    network = LatentReward(Trunk(), channels=6, middle=3, text=5)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([10.0, 700.0])
    cond = {
        "tokens": torch.randn(2, 7, 5),
        "no_tokens": torch.randn(2, 7, 5),
        "pooled": torch.randn(2, 5),
    }
    means = x.mean((2, 3))
    with_text, without = (cond[k].mean((1, 2))[:, None] * means for k in ("tokens", "no_tokens"))
    seen = torch.cat([means, without + GUIDANCE * (with_text - without)], dim=1)
    v = seen @ network.visual.weight.T
    cosine = (v * cond["pooled"]).sum(1) / v.norm(dim=1) / cond["pooled"].norm(dim=1)
    torch.testing.assert_close(network(x, t, cond), math.exp(2.6592) * cosine)


def test_equal_signal_to_noise_is_an_equal_question() -> None:
    """The VP latent at each time, and the flow latent of the same x0, noise and ratio."""
    x0, eps = torch.randn(2, 5, 3, 2, 2)
    t = torch.tensor([20.0, 249, 499, 749, 999])
    alpha, sigma = VP.schedule(t)
    flow_t = 1000 * sigma / (alpha + sigma)
    ours, time = as_trained(VP, VP.add_noise(x0, eps, t), t)
    theirs, flow_time = as_trained(FLOW, FLOW.add_noise(x0, eps, flow_t), flow_t)
    torch.testing.assert_close(ours, VP.add_noise(x0, eps, t))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert time.tolist() == t.tolist()
    assert flow_time.tolist() == t.tolist()


def test_pure_noise_of_a_flow_is_the_schedules_last_time() -> None:
    z = torch.randn(2, 3)
    scaled, time = as_trained(FLOW, z, torch.tensor([1000.0, 1000.0]))
    torch.testing.assert_close(scaled, z)
    assert time.tolist() == [999, 999]


def test_pair_loss_by_hand() -> None:
    win, lose = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert pair_loss(win, lose).item() == pytest.approx(expected)
    tie = torch.ones(2)
    assert pair_loss(lose, lose, tie).item() == pytest.approx(0, abs=1e-6)
    assert pair_loss(win, lose, tie).item() > 0.1
    torch.testing.assert_close(pair_loss(win, lose, torch.zeros(2)), pair_loss(win, lose))


def test_the_trunk_sees_what_the_whole_unet_sees(teacher: Path) -> None:
    unet = StableDiffusionPipeline.from_pretrained(teacher).unet
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(unet.down_blocks):
        at = block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1]
        at.register_forward_hook(
            lambda _, __, out, i=i: seen.__setitem__(
                str(i), out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            )
        )
    unet.mid_block.register_forward_hook(lambda _, __, out: seen.__setitem__("mid", out))
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0]), torch.randn(2, 24, 32)
    unet(x, t, encoder_hidden_states=words)
    for ours, theirs in zip(EncoderHalf(unet)(x, t, words), seen.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_learns_the_order_of_real_pairs(teacher: Path, tmp_path: Path) -> None:
    """On 48 pairs it has seen, at no noise; the teacher's own weights stay what they were.

    Two renderings of one picture, about half of the pairs, are nearly equal to it.
    """
    before = StableDiffusionPipeline.from_pretrained(teacher).text_encoder.state_dict()
    network = emoji_reward.train(tmp_path, teacher, 250, batch=32, n=48)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    data = emoji_reward.cached(pipeline.vae, tmp_path / "pairs.safetensors", 48, 0)
    words = emoji_reward.Words(pipeline)
    cond, zero = words(data.captions), torch.zeros(48)
    alike = torch.tensor([kind == "alike" for kind in data.kinds])
    with torch.no_grad():
        gain = network(data.win, zero, cond) - network(data.lose, zero, cond)
    assert 12 <= alike.sum() <= 36
    assert (gain[~alike] > 0).float().mean() > 0.8
    assert gain[alike].abs().mean() < 0.5 * gain[~alike].abs().mean()
    after = words.pipeline.text_encoder.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)

    loaded = emoji_reward.load(tmp_path / "reward", VP, pipeline.vae)
    theirs = loaded(data.win, zero, loaded.encode_prompts(data.captions))
    with torch.no_grad():
        torch.testing.assert_close(theirs, network(data.win, zero, cond), atol=0.05, rtol=0.01)

    k_major = loaded(
        data.win[:4].repeat(3, 1, 1, 1), zero[:12], repeat({k: v[:4] for k, v in cond.items()}, 3)
    )
    torch.testing.assert_close(
        k_major.unflatten(0, (3, 4)), theirs[:4].expand(3, 4), atol=1e-4, rtol=1e-4
    )


def test_a_reward_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        emoji_reward.load(tmp_path, VP, tiny.vae())


@pytest.fixture
def written(teacher: Path, tmp_path: Path) -> Path:
    """An untrained reward, in runs/reward, and its teacher in runs/teacher."""
    shutil.copytree(teacher, tmp_path / "runs/teacher")
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    network = emoji_reward.build(pipeline.unet)
    emoji_reward.write(network, tmp_path / "runs/reward", str(tmp_path / "runs/teacher"))
    return tmp_path / "runs/reward"


def test_a_reward_moves_with_its_teacher_and_the_shipped_ones_needs_no_path(
    written: Path, tmp_path: Path
) -> None:
    vae = AutoencoderKL.from_pretrained(written.parent / "teacher/vae")
    written.parent.rename(tmp_path / "moved")
    emoji_reward.load(tmp_path / "moved/reward", VP, vae)
    shipped = StableDiffusionPipeline.from_pretrained(ASSETS / "score")
    network = emoji_reward.build(shipped.unet)
    emoji_reward.write(network, tmp_path / "on-shipped", str(ASSETS / "score"))
    assert str(tmp_path) not in (tmp_path / "on-shipped/config.json").read_text()
    (tmp_path / "on-shipped").rename(tmp_path / "moved/deep")
    emoji_reward.load(tmp_path / "moved/deep", VP, shipped.vae)


def test_a_reward_whose_teacher_is_gone_is_not_looked_for_on_the_network(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def look_up(*host: object, **_: object) -> None:
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.chdir(written.parent)
    config = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps(config | {"teacher": "gone"}))
    with pytest.raises(UserError, match=r"no teacher.* is in reward/gone"):
        emoji_reward.load(Path("reward"), VP, tiny.vae())  # reward/gone could be a name on the hub
    assert not asked


def test_latents_of_another_autoencoder_are_refused_and_of_another_decoder_are_not(
    written: Path,
) -> None:
    vae = AutoencoderKL.from_pretrained(written.parent / "teacher/vae")
    own = latents_digest(vae)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2)
        vae.post_quant_conv.weight.mul_(2)
    emoji_reward.load(written, VP, vae)
    emoji_reward.load(written, VP, vae.half())
    for layer in (vae.quant_conv, vae.encoder.conv_in):
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(
            UserError, match=f"autoencoder {own} of .* are of {latents_digest(vae)};"
        ):
            emoji_reward.load(written, VP, vae)
        with torch.no_grad():
            layer.weight.div_(2)


@pytest.mark.parametrize("teacher_name", ["score", "flow"])
def test_the_shipped_reward_scores_the_latents_of_both_shipped_teachers(teacher_name: str) -> None:
    vae = AutoencoderKL.from_pretrained(ASSETS / teacher_name / "vae")
    emoji_reward.load(ASSETS / "reward", VP, vae)


def test_pairs_are_kept_for_one_number_seed_and_autoencoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kept, other = tiny.vae(), tiny.vae()
    path = tmp_path / "pairs.safetensors"
    for vae, n, seed in ((kept, 4, 0), (kept, 5, 0), (kept, 5, 1), (other, 5, 1)):
        data = emoji_reward.cached(vae, path, n, seed)
        fresh = emoji_reward.cached(vae, tmp_path / f"{n}-{seed}-{id(vae)}.safetensors", n, seed)
        again = emoji_reward.cached(vae, path, n, seed)
        for one in (fresh, again):
            assert torch.equal(data.win, one.win)
            assert torch.equal(data.lose, one.lose)
            assert (data.captions, data.kinds) == (one.captions, one.kinds)


def test_the_accuracy_of_a_linear_score_is_the_closed_form(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<x_t, d> of pictures a and a - d: a normal of mean alpha |d|^2, variance 2 sigma^2 |d|^2."""
    light, dark = (np.full((3, 64, 64), level, np.uint8) for level in (255, 0))

    def draw(world: object, split: str, rng: object, kind: pairs.Kind) -> pairs.Pair:
        won, lost = (dark, light) if kind == "shaded" else (light, dark)
        return pairs.Pair(kind, "an emoji", "emoji", won, lost)

    monkeypatch.setattr(pairs, "draw", draw)
    vae = StableDiffusionPipeline.from_pretrained(teacher).vae
    with torch.no_grad():
        ends = torch.stack([torch.ones(3, 64, 64), -torch.ones(3, 64, 64)])
        a, b = vae.encode(ends).latent_dist.mode()
    figures = emoji_reward.accuracy(
        lambda x_t, t, cond: ((a - b) * x_t).sum((1, 2, 3)), teacher, n=400, levels=(0, 499, 999)
    )
    assert list(figures) == list(pairs.KINDS)
    for kind, row in figures.items():
        for t, share in row.items():
            alpha, sigma = VP.schedule(torch.tensor([float(t)]))
            z = (alpha / sigma * (a - b).norm() / math.sqrt(2)).item()
            exact = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(z)).item()
            exact = 1 - exact if kind == "shaded" else exact
            assert share == pytest.approx(exact, abs=0.08)  # three deviations of 400 draws
