"""The shipped recipes of real models on tiny pipelines of their families: each runs as it stands,
sizes apart, and costs what it says.
"""

import json
import math
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import tiny_export
import tiny_reward
import torch
from PIL import Image
from torch import Tensor, nn

from flashdmd import config, resuming, reward_fit, run
from flashdmd.algorithm import cycle
from flashdmd.config import Recipe
from flashdmd.data import Drawn
from flashdmd.evaluate.own import OwnBench
from flashdmd.loading import load_teacher
from flashdmd.models import latent_reward
from flashdmd.models.denoiser import AdapterDenoiser
from flashdmd.models.teacher import DTYPES
from flashdmd.session import Session, open_session

datasets = pytest.importorskip("datasets")  # an extra: Pick-a-Pic is parquet
RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = {
    "sdxl-ttur1": "sdxl",
    "sdxl-ttur2": "sdxl",
    "sdxl-joint": "sdxl",
    "sd15": "sd1",
    "sd3-medium-lora": "sd3",
    "flux-dev-lora": "flux",
}
IMAGES = {  # the paper's batch and iterations of stage 1
    "sdxl-ttur1": (64, 1000),
    "sdxl-ttur2": (64, 8000),
    "sdxl-joint": (64, 1000),
    "sd3-medium-lora": (32, 4000),
}
SIDE = 4 * tiny_export.SIDE  # pixels
MAY_DIFFER = {  # what a tiny run has otherwise than its recipe; no number of the method
    "model.pretrained_model_name_or_path", "model.reward_model_name_or_path",
    "discriminator.backbone", "discriminator.crop", "data.train_data_dir", "data.resolution",
    "lora.rank", "train.train_batch_size", "train.preference_batch_size",
    "train.gradient_accumulation_steps", "train.gan_calibration_steps", "train.max_train_steps",
    "train.joint_train_steps", "output_dir",
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, a SAM, and one pipeline of each family, in half precision as well."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny_data.pictures(folder / "pictures", (SIDE, SIDE))
    for size in ((60, 36), (80, 48), (36, 60), (50, 80)):  # two shapes, of originals that differ
        tiny_data.pictures(folder / "shapes", size)
    tiny_data.sam(folder / "sam")
    for kind in set(KINDS.values()):
        pipeline = tiny_export.pipeline(kind)
        pipeline.save_pretrained(folder / kind)
        pipeline.to(torch.float16).save_pretrained(folder / kind, variant="fp16")
    return folder


@pytest.fixture(scope="module")
def reward(here: Path) -> Path:
    """What `reward-sdxl.yaml` makes of a few pairs in parquet and their leads in a table."""
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        levels = rng.permutation([0.2, 0.8])
        rows.append(
            {
                "caption": f"{tiny_data.CAPTIONS[i % 4]} {i}",
                "jpg_0": png(tiny_reward.picture(levels[0], rng, SIDE)),
                "jpg_1": png(tiny_reward.picture(levels[1], rng, SIDE)),
                "label_0": float(levels[0] > levels[1]),
            }
        )
    (here / "pairs").mkdir()
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(here / "pairs/train-00000-of-00001.parquet")
    gaps = ["aesthetic_gap,clipscore_gap,vqascore_gap", *["0.5,0.1,0.1"] * 30, *["0.5,0.1,-1"] * 10]
    (here / "gaps.csv").write_text("\n".join(gaps))
    recipe = reward_fit.read(
        RECIPES / "reward-sdxl.yaml",
        [
            f"pretrained_model_name_or_path={here / 'sdxl'}",
            f"train_data={here / 'pairs'}",
            f"score_gaps={here / 'gaps.csv'}",
            f"resolution={SIDE}",
            "train_batch_size=4",
            "micro_batch_size=2",
            "max_train_steps=2",
            f"output_dir={here / 'reward-run'}",
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
        reward_fit.fit_reward(recipe)
    return here / "reward-run/reward"


def png(picture: Image.Image) -> bytes:
    stream = BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def sized(name: str, here: Path, output: Path) -> Recipe:
    """A recipe at tiny size: two iterations of stage 1, one round of stage 2 if it has one."""
    shipped = config.read(name, [])
    changes = [
        f"model.pretrained_model_name_or_path={here / KINDS[name]}",
        f"discriminator.backbone={here / 'sam'}",
        f"data.train_data_dir={here / 'pictures'}",
        f"data.resolution={SIDE}",
        "train.train_batch_size=2",
        "train.preference_batch_size=2",
        f"train.gradient_accumulation_steps={1 if name == 'sdxl-joint' else 2}",  # it takes long
        "train.gan_calibration_steps=[0, 1]",
        f"train.max_train_steps={2 // shipped.method.ttur}",
        f"output_dir={output}",
    ]
    if shipped.train.joint_train_steps:
        reward = here / "reward-run/reward"
        changes += ["train.joint_train_steps=1", f"model.reward_model_name_or_path={reward}"]
    if shipped.lora.rank:
        changes.append("lora.rank=4")
    if shipped.discriminator.crop:
        changes.append(f"discriminator.crop={tiny_export.SIDE // 2}")
    recipe = config.read(name, changes)
    before, now = resuming.flat(shipped), resuming.flat(recipe)
    assert {key for key in before if before[key] != now[key]} <= MAY_DIFFER
    assert config.build(config.parse(config.dump(recipe), ""), "") == recipe
    return recipe


def quiet(stage: str, done: int, of: int, record: dict[str, float]) -> None:
    pass


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def moved(network: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_runs_as_it_stands(name: str, here: Path, reward: Path, tmp_path: Path) -> None:
    recipe = sized(name, here, tmp_path / "run")
    session = open_session(recipe)
    is_as_said(session)
    learners = {
        "generator": session.generator,
        "score": session.score,
        "discriminator": session.discriminator.heads,
        "student": session.student,
    }
    before = {learner: weights(network) for learner, network in learners.items()}
    run.prepare(recipe, resume=False)
    run.both_stages(session, None, quiet)
    for learner, network in learners.items():
        assert moved(network, before[learner]), learner
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    joint = ["joint"] * (recipe.method.ttur + recipe.method.preferences_per_distillation)
    stages = ["distill"] * 2 + (joint if recipe.train.joint_train_steps else [])
    assert [record["stage"] for record in records] == stages
    assert records[1]["images"] == 2 * 2
    assert records[-1]["gan_loss_weight" if not joint else "seconds"] >= 0
    assert all(math.isfinite(v) for r in records for v in r.values() if not isinstance(v, str))
    steps = len(recipe.method.student_timesteps)
    drawn = load_teacher(str(tmp_path / "run/student"))
    drawn.resolution = SIDE
    pictures = drawn.sample(list(tiny_data.CAPTIONS[:2]), drawn.noise(2, 0), steps, 0.0)
    assert pictures.shape == (2, 3, SIDE, SIDE)
    assert pictures.std() > 1


def is_as_said(session: Session) -> None:
    """What the recipe says of precision, memory, adapters and caches is what the networks are."""
    recipe, teacher = session.recipe, session.teacher
    held = DTYPES[recipe.model.frozen_dtype]
    assert teacher.denoiser.dtype == held == torch.bfloat16
    assert {p.dtype for p in teacher.pipeline.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in session.generator.parameters()} == {torch.float32}
    assert session.trainer(recipe.first_stage).precision == torch.bfloat16
    adapted = isinstance(session.generator, AdapterDenoiser)
    assert adapted == bool(recipe.lora.rank)
    assert (session.generator.network is teacher.denoiser.network) == adapted
    assert session.generator.network.is_gradient_checkpointing
    assert teacher.pipeline.vae.is_gradient_checkpointing
    assert session.discriminator.backbone.maps.checkpointing
    encoders = [n for n in teacher.pipeline.components if n.startswith("text_encoder")]
    there = [getattr(teacher.pipeline, n) is not None for n in encoders]
    assert there == [not recipe.data.cache_text_embeddings] * len(encoders)


@pytest.mark.parametrize("name", IMAGES)
def test_a_recipe_costs_what_it_says(name: str) -> None:
    recipe = config.read(name, [])
    period = cycle(recipe.method, "distill")
    assert sum("generator" in updates for updates in period) == 1
    iterations = recipe.train.max_train_steps * len(period)
    assert (recipe.train.train_batch_size, iterations) == IMAGES[name]
    said = re.search(r"(\d+)(?: images)? x ([\d,]+)", (RECIPES / f"{name}.yaml").read_text())
    assert said
    assert tuple(int(n.replace(",", "")) for n in said.groups()) == IMAGES[name]


def test_the_second_stage_is_as_long_as_it_says() -> None:
    """2,000 iterations, of which one in six distils."""
    recipe = config.read("sdxl-joint", [])
    period = cycle(recipe.method, "joint")
    assert [("generator" in u, "preference" in u) for u in period] == [(1, 0), *[(0, 1)] * 5]
    assert 2000 - len(period) < recipe.train.joint_train_steps * len(period) <= 2000


def test_the_reward_recipe_makes_a_reward(here: Path, reward: Path) -> None:
    """In bfloat16 with checkpointing, text encoders too; pairs that CLIP and VQA contradict go."""
    told = json.loads((reward / "accuracy.json").read_text())
    assert told["pairs"]["refused by vqascore_gap"] > 5
    assert told["updates"] == 2
    logged = (reward.parent / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["loss"]) for line in logged)
    assert latent_reward.is_one(reward)
    base = latent_reward.open_base(str(here / "sdxl"))
    start = latent_reward.build(base, str(here / "sdxl")).learned().state_dict()
    trained = latent_reward.load(reward, load_teacher(str(here / "sdxl")).process, base.vae)
    after = trained.learned().state_dict()
    assert start.keys() == after.keys()
    for part in ("network.trunk", "words.encoders.0", "words.encoders.1"):
        names = [name for name in start if name.startswith(part)]
        assert any(not torch.equal(start[n], after[n]) for n in names), part


def opened(here: Path, data: dict[str, Any], **train: Any) -> Session:
    """A tiny SDXL in float32 on pictures of two shapes."""
    model = {"pretrained_model_name_or_path": str(here / "sdxl"), "reward_model_name_or_path": None}
    small = {"train_batch_size": 4, "mixed_precision": "no", "joint_train_steps": 0}
    content = {
        "model": model,
        "data": {"train_data_dir": str(here / "shapes"), "resolution": 2 * SIDE, **data},
        "method": {"ttur": 1, "gan_gradient_ratio": None},
        "train": {"learning_rate": 1e-3, "ema_decay": 0.0, **small, **train},
        "discriminator": {"backbone": str(here / "sam"), "width": 8},
        "validation": {"num_prompts": 8},
        "output_dir": str(here / "shapes-run"),
    }
    return open_session(Recipe.model_validate(content))


def test_a_batch_is_of_one_bucket_and_the_network_is_told_of_every_picture(here: Path) -> None:
    session = opened(here, {"aspect_ratio_buckets": True}, seed=1)
    draw, batches, asked = session.source.draw, [], []

    def remember(*given: Any, **more: Any) -> Drawn:
        batches.append(draw(*given, **more))
        return batches[-1]

    def listen(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        told = named["added_cond_kwargs"]["time_ids"]
        asked.append((module, len(batches) - 1, given[0], told))

    session.source.draw = remember
    denoisers = session.generator, session.score, session.teacher.denoiser
    for denoiser in denoisers:
        denoiser.network.register_forward_pre_hook(listen, with_kwargs=True)
    trainer = session.trainer("distill")
    for _ in range(2):
        assert all(map(math.isfinite, trainer.iterate().values()))
    assert {drawn.shape for drawn in batches} == {(48, 80), (80, 48)}
    for _, n, x_t, time_ids in asked:
        drawn = batches[n]
        height, width = drawn.shape
        assert x_t.shape[1:] == (tiny_export.CHANNELS, height // 4, width // 4)
        assert len({tuple(row) for row in drawn.time_ids.tolist()}) > 1
        assert time_ids.tolist() == drawn.time_ids.tolist() * (len(x_t) // 4)  # teacher: doubled
    expected = {(denoiser.network, n) for denoiser in denoisers for n in (0, 1)}
    assert {(module, n) for module, n, *_ in asked} == expected


def test_arms_draw_squares_and_are_measured_by_squares(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    class Remembering(OwnBench):
        def __init__(self, *given: Any) -> None:
            seen.append(given[-1].shape)
            super().__init__(*given)

    monkeypatch.setattr(run, "OwnBench", Remembering)
    session = opened(here, {"aspect_ratio_buckets": True})
    bench = run.bench_of(session.recipe, session.teacher)
    assert [shape[1:] for shape in seen] == [(3, 2 * SIDE, 2 * SIDE)]
    assert 1 < seen[0][0] <= 8  # a picture that was drawn twice is there once
    assert bench.protocol.reference == "real pictures"
    (here / "three.txt").write_text("a cat\na dog\na tree")
    session = opened(here, {"prompts": str(here / "three.txt")})
    assert len(run.bench_of(session.recipe, session.teacher).prompts) == 8  # some of them again


def test_caches_change_no_loss_and_let_the_encoders_go(here: Path) -> None:
    records = {}
    for kept in (False, True):
        caches = {"cache_latents": kept, "cache_text_embeddings": kept}
        session = opened(here, {"aspect_ratio_buckets": True, **caches}, train_batch_size=2)
        trainer = session.trainer("distill")
        records[kept] = [trainer.iterate() for _ in range(2)]
        pipeline = session.teacher.pipeline
        for name in ("text_encoder", "text_encoder_2"):
            assert (getattr(pipeline, name) is None) == kept
        assert (trainer.batches.latents is not None) == kept
    for plain, cached in zip(*records.values(), strict=True):
        assert plain.keys() == cached.keys()
        for name in plain.keys() - {"seconds"}:
            assert cached[name] == pytest.approx(plain[name], rel=1e-5), name
