"""Training a latent reward model on real pictures: what it learns, and that it may be stopped."""

import json
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_reward
import torch
from diffusers import AutoencoderKL
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from flashdmd import checkpoint
from flashdmd.errors import Interrupted, UserError
from flashdmd.models import latent_reward
from flashdmd.models.latent_reward import load
from flashdmd.preferences import Batch, open_preferences
from flashdmd.reward import pair_loss
from flashdmd.reward_fit import (
    Fit,
    RewardRecipe,
    data_of,
    fit_reward,
    latents_of,
    optimizer_of,
    prepared,
    train,
    update,
)
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

VP, FLOW = Process(VariancePreserving(), "v"), Process(RectifiedFlow(), "flow")
CAPTIONS = ["a red heart", "a blue whale", "a green apple", "a cat", "two dogs", "the moon"]
PAIRS, TIES = 150, 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_reward.folder_of(kind, root / kind) for kind in ("sd", "sd3")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of greys of which the brighter is preferred, or of one picture twice."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = []
    for i in range(PAIRS + TIES):
        levels = rng.permutation([rng.uniform(0, 0.4), rng.uniform(0.6, 1)])
        names = [f"{i}-{side}.png" for side in (0, 1)]
        for name, level in zip(names, levels, strict=True):
            tiny_reward.picture(level, rng).save(folder / name)
        label = 0.5 if i >= PAIRS else float(levels[0] > levels[1])
        names = [names[0], names[0]] if i >= PAIRS else names
        caption = f"{CAPTIONS[i % len(CAPTIONS)]} {i // 3}"
        row = {"image_0": names[0], "image_1": names[1], "caption": caption, "label_0": label}
        rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder / "pairs.jsonl"


def recipe_of(base: Path, data: Path, output: Path, **numbers: Any) -> RewardRecipe:
    defaults = {
        "pretrained_model_name_or_path": str(base),
        "train_data": str(data),
        "output_dir": str(output),
        "max_train_steps": 4,
        "train_batch_size": 6,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "held_out_share": 0.05,
        "report_timesteps": (1,),
        "checkpointing_steps": 2,
        "workers": 1,
    }
    return RewardRecipe.model_validate(defaults | numbers)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_it_learns_to_prefer_the_brighter_of_pictures_it_has_not_seen(
    kind: str,
    folders: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latent_reward, "T5_TOKENS", 16)  # of 256: a third of the time
    recipe = recipe_of(
        folders[kind],
        data,
        tmp_path / "fit",
        max_train_steps=30,
        train_batch_size=10,
        learning_rate=1.5e-3,
        held_out_share=0.3,
        timesteps=(1, 101, 201),
        report_timesteps=(1, 951),
    )
    report = fit_reward(recipe)
    assert report["accuracy"][1] > 0.9
    assert report["held_out_pairs"] > 30
    counts = report["pairs"]
    assert counts["rows"] == PAIRS + TIES
    assert counts["held out"] + counts["kept"] == PAIRS + TIES
    kept = json.loads((tmp_path / "fit/reward/accuracy.json").read_text())
    assert kept["accuracy"] == {str(t): share for t, share in report["accuracy"].items()}

    # of what was written as well
    vae = AutoencoderKL.from_pretrained(folders[kind] / "vae")
    reward = load(tmp_path / "fit/reward", VP if kind == "sd" else FLOW, vae)
    pairs, held_out, _ = data_of(recipe)
    with ThreadPoolExecutor(1) as readers:
        again = Fit(recipe, reward, vae, pairs, 64).accuracy(held_out, readers)
    assert again == pytest.approx(report["accuracy"], abs=1.5 / report["held_out_pairs"])


def test_a_fit_that_was_stopped_goes_on_as_if_it_had_not_been(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    once = recipe_of(folders["sd"], data, tmp_path / "once", checkpoints_total_limit=None)
    fit_reward(once)
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    shutil.rmtree(tmp_path / "twice/checkpoint-4")
    shutil.rmtree(tmp_path / "twice/reward")
    fit_reward(once.model_copy(update={"output_dir": str(tmp_path / "twice")}))
    for name in ("checkpoint-4/reward", "checkpoint-4/reward.optimizer", "reward/model"):
        one = load_file(tmp_path / f"once/{name}.safetensors")
        other = load_file(tmp_path / f"twice/{name}.safetensors")
        assert all(torch.equal(v, one[k]) for k, v in other.items())
        assert one.keys() == other.keys()
    before = load_file(tmp_path / "once/checkpoint-2/reward.safetensors")
    moved = load_file(tmp_path / "once/checkpoint-4/reward.safetensors")
    assert all((v != before[k]).any() for k, v in moved.items() if "visual" in k or "words" in k)
    logged = [json.loads(x) for x in (tmp_path / "twice/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 3, 4]
    assert [line["loss"] for line in logged[2:4]] == [line["loss"] for line in logged[4:]]


def test_a_signal_stops_it_with_its_state_saved(
    folders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    gradients = Fit.gradients

    def stop_in_the_second(self: Fit, n: int, batch: Batch) -> dict[str, float]:
        seen.append(n)
        if n == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(self, n, batch)

    monkeypatch.setattr(Fit, "gradients", stop_in_the_second)
    recipe = recipe_of(folders["sd"], data, tmp_path / "fit", checkpointing_steps=0)
    with pytest.raises(Interrupted, match="stopped after 2 updates"):
        fit_reward(recipe)
    fit_reward(recipe)
    assert seen == [0, 1, 2, 3]
    assert [p.name for p in checkpoint.all_of(tmp_path / "fit")] == ["checkpoint-4"]


def test_another_recipe_does_not_go_on(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folders["sd"], data, tmp_path / "fit", max_train_steps=1)
    fit_reward(recipe)
    longer = recipe.model_copy(update={"max_train_steps": 2})
    assert fit_reward(longer)["updates"] == 2
    with pytest.raises(UserError, match=r"learning_rate is 0\.5, but the fit in .* with 0\.001"):
        fit_reward(longer.model_copy(update={"learning_rate": 0.5}))


@pytest.fixture
def fit(folders: dict[str, Path], data: Path, tmp_path: Path) -> Fit:
    recipe = recipe_of(folders["sd"], data, tmp_path / "fit")
    pairs, _, _ = data_of(recipe)
    return prepared(recipe, pairs, torch.device("cpu"))


def gradients_of(
    fit: Fit, batch: Batch, **numbers: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    changed = Fit(fit.recipe.model_copy(update=numbers), fit.reward, fit.vae, fit.pairs, fit.size)
    learned = fit.reward.learned()
    learned.zero_grad()
    facts = changed.gradients(0, batch)
    return facts, {k: p.grad.clone() for k, p in learned.named_parameters() if p.grad is not None}


def batch_of(fit: Fit, n: int = 6) -> Batch:
    with ThreadPoolExecutor(1) as readers:
        return fit.pairs.batch(0, n, fit.size, 0, readers)


def test_ties_of_one_picture_and_noise_teach_nothing(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At equal scores: the same latent twice under the same noise."""
    drawn = batch_of(fit)
    tie = replace(drawn, ties=torch.ones(6))
    monkeypatch.setattr(
        "flashdmd.reward_fit.latents_of", lambda vae, images: torch.ones(len(images), 4, 8, 8)
    )
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    facts, gradients = gradients_of(fit, tie)
    assert facts["loss"] == pytest.approx(0, abs=1e-6)
    assert max(g.abs().max().item() for g in gradients.values()) < 1e-6
    pair = replace(drawn, ties=torch.zeros(6))
    assert gradients_of(fit, pair)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    monkeypatch.undo()
    assert gradients_of(fit, pair)[0]["accuracy"] > 0
    assert gradients_of(fit, tie)[0]["accuracy"] == 0  # they have no order to be right about


def test_a_batch_in_parts_has_the_gradients_of_the_whole(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the parts' shares of the weights; noise apart, which is drawn part by part."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(
        "flashdmd.reward_fit.latents_of",
        lambda vae, images: vae.encode(images.float() / 127.5 - 1).latent_dist.mode(),
    )
    drawn = batch_of(fit)
    weights = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    batch = Batch(
        drawn.win, drawn.lose, torch.tensor([0.0, 1, 0, 0, 0, 0]), weights, drawn.captions
    )
    sizes: list[int] = []
    fit.reward.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole, expected = gradients_of(fit, batch)
    parts, gradients = gradients_of(fit, batch, micro_batch_size=4)
    assert sizes == [12, 8, 4]
    assert parts == pytest.approx(whole, rel=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)


def test_an_update_is_adamws_on_clipped_gradients_at_its_steps_rate(fit: Fit) -> None:
    """By hand; the norm is of the size of Adam's epsilon, or the first step would not show it."""
    recipe = fit.recipe.model_copy(
        update={"lr_warmup_steps": 4, "max_grad_norm": 1e-8, "learning_rate": 0.01}
    )
    fit, batch = replace(fit, recipe=recipe), batch_of(fit)
    learned = fit.reward.learned()
    _, gradients = gradients_of(fit, batch)
    learned.zero_grad()
    before = {k: p.detach().clone() for k, p in learned.named_parameters()}
    parameters = list(learned.parameters())
    facts = update(fit, 0, batch, optimizer_of(recipe, parameters), parameters)
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert facts["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert facts["rate"] == 0.01 / 4
    for name, g in gradients.items():
        g = g * 1e-8 / norm
        expected = before[name] * (1 - 0.0025 * 0.3) - 0.0025 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(learned.get_parameter(name), expected, atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in parameters)


def test_networks_in_half_precision_give_nearly_the_same_gradients(fit: Fit) -> None:
    batch = batch_of(fit)
    whole, expected = gradients_of(fit, batch)
    half, gradients = gradients_of(fit, batch, mixed_precision="bf16")
    assert half["loss"] == pytest.approx(whole["loss"], rel=0.05)
    assert half["loss"] != whole["loss"]
    one, other = (torch.cat([g.flatten() for g in x.values()]) for x in (gradients, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.98
    assert one.dtype == torch.float32


def test_both_pictures_of_a_pair_are_noised_on_their_own_at_one_of_the_times(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    network = fit.reward.network
    forward = network.forward

    def remember(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        asked.append((x_t, t))
        return forward(x_t, t, cond)

    monkeypatch.setattr(network, "forward", remember)
    monkeypatch.setattr(
        "flashdmd.reward_fit.latents_of", lambda vae, images: torch.zeros(len(images), 4, 8, 8)
    )
    for n in range(12):
        fit.gradients(n, batch_of(fit))
    t = torch.cat([t for _, t in asked])
    win, lose = (torch.cat([x.chunk(2)[side] for x, _ in asked]) for side in (0, 1))
    at = torch.cat([t.chunk(2)[0] for _, t in asked])
    assert all(torch.equal(*t.chunk(2)) for _, t in asked)
    assert set(t.tolist()) <= set(range(1, 952, 50))
    assert len(set(t.tolist())) > 15  # of 20, in 72 draws
    sigma = VariancePreserving()(at)[1]
    torch.testing.assert_close(win.flatten(1).std(1) / sigma, torch.ones(72), atol=0.25, rtol=0)
    assert abs(np.corrcoef(win.flatten(), lose.flatten())[0, 1]) < 0.05


def test_weights_of_examples_scale_their_losses() -> None:
    win, lose = torch.tensor([0.3, -1.0, 0.0]), torch.tensor([0.1, 0.4, 2.0])
    ties, weights = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.2, 0.5, 0.3])
    one = math.log(1 + math.exp(-0.2)), math.log(1 + math.exp(1.4))
    tie = 0.5 * math.log(1 + math.exp(2)) + 0.5 * math.log(1 + math.exp(-2)) - math.log(2)
    expected = 0.2 * one[0] + 0.5 * one[1] + 0.3 * tie
    assert pair_loss(win, lose, ties, weights).item() == pytest.approx(expected)
    equal = torch.full((3,), 1 / 3)
    torch.testing.assert_close(pair_loss(win, lose, ties, equal), pair_loss(win, lose, ties))


def test_latents_are_the_encoders_shifted_and_scaled() -> None:
    vae = tiny.vae()
    vae.register_to_config(shift_factor=2.0)
    images = torch.randint(256, (400, 3, 16, 16), dtype=torch.uint8)
    images[:] = images[:1]
    dist = vae.encode(images[:1].float() / 127.5 - 1).latent_dist
    drawn = latents_of(vae, images)
    mean, std = 0.7 * (dist.mean - 2), 0.7 * dist.std
    far = (drawn.mean(0, keepdim=True) - mean) / std * math.sqrt(400)
    assert far.abs().max() < 5
    torch.testing.assert_close(
        drawn.std(0, keepdim=True) / std, torch.ones_like(std), atol=0.2, rtol=0
    )


def test_the_rate_rises_then_falls_on_a_line() -> None:
    recipe = RewardRecipe(
        pretrained_model_name_or_path="x", train_data="y", lr_warmup_steps=4, lr_decay_steps=24,
        max_train_steps=20,
    )  # fmt: skip
    assert [recipe.share(n) for n in (0, 1, 3, 4, 14, 24)] == [0.25, 0.5, 1, 1, 0.5, 0]
    xl = RewardRecipe(pretrained_model_name_or_path="x", train_data="y")
    assert xl.share(7999) == pytest.approx(0.8889, abs=1e-3)
    assert len(xl.timesteps) == 20
    assert xl.timesteps[-1] == 951
    with pytest.raises(ValidationError, match="lr_decay_steps=100 must exceed"):
        RewardRecipe(pretrained_model_name_or_path="x", train_data="y", lr_decay_steps=100)
    with pytest.raises(ValidationError, match="Extra inputs"):
        RewardRecipe.model_validate({**xl.model_dump(), "learning_rat": 1})


def test_held_out_pairs_of_another_file_are_not_trained_on(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folders["sd"], data, tmp_path / "fit", held_out_data=str(data))
    pairs, held_out, counts = data_of(recipe)
    assert len(pairs) == len(held_out) == PAIRS + TIES == counts["held out"]
    split, rest, _ = data_of(recipe_of(folders["sd"], data, tmp_path / "fit"))
    assert len(split) + len(rest) == PAIRS + TIES
    assert len(open_preferences(data)[0]) == PAIRS + TIES


def test_a_fit_that_is_not_finite_is_an_error(fit: Fit, tmp_path: Path) -> None:
    with torch.no_grad():
        fit.reward.network.logit_scale.fill_(float("nan"))

    with (
        pytest.raises(UserError, match="update 1 of the reward is not finite"),
        ThreadPoolExecutor(1) as readers,
    ):
        train(fit, tmp_path, readers)
    assert not checkpoint.all_of(tmp_path)
