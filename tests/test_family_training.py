"""Family by family: two iterations of stage 1 on a folder of pictures, written and loaded back."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dits
import tiny_export
import torch
from PIL import Image
from torch import Tensor, nn

from flashdmd import export
from flashdmd.algorithm import split
from flashdmd.config import Recipe
from flashdmd.loading import load_teacher
from flashdmd.models import latent_reward
from flashdmd.models.denoiser import Adapter, AdapterDenoiser, NetworkDenoiser, save_memory
from flashdmd.models.teacher import Teacher, family_of, index_of, load_pipeline, sketch
from flashdmd.sampler import times
from flashdmd.session import Session, open_session

KINDS = ("sd1", "sdxl", "sd3", "flux", *tiny_dits.MAKE)
SIDE = 32  # pixels
GUIDANCE = 3.0  # FLUX is told it
PROMPTS = ["fluent emoji of a strawberry", "a bird"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    make = tiny_dits if request.param in tiny_dits.MAKE else tiny_export
    make.pipeline(request.param).save_pretrained(base / "teacher")
    (base / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i, caption in enumerate(("a red apple", "two small hearts", "a ship at sea")):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"pictures/{i}.png")
        (base / f"pictures/{i}.txt").write_text(caption)
    return base / "teacher"


def opened(folder: Path, rank: int, model: dict[str, Any] | None = None, **train: Any) -> Session:
    small = {
        "train_batch_size": 2,
        "mixed_precision": "no",
        "joint_train_steps": 0,
        "ema_decay": 0.0,
    }
    rates = {"learning_rate": 1e-3, "fake_score_learning_rate": 1e-3}
    source = {"pretrained_model_name_or_path": str(folder), "reward_model_name_or_path": None}
    recipe = {
        "model": source | (model or {}),
        "lora": {"rank": rank},
        "data": {"train_data_dir": str(folder.with_name("pictures")), "resolution": SIDE},
        "method": {
            **split(load_pipeline(folder).default_steps),
            "teacher_guidance_scale": GUIDANCE,
            "gan_gradient_ratio": None,
        },
        "train": {"max_train_steps": 2, **small, **rates, **train},
        "discriminator": {"width": 8},
    }
    return open_session(Recipe.model_validate(recipe))


def iterated(run: Session) -> Session:
    """Two iterations on, with losses that are numbers."""
    trainer = run.trainer("distill")
    for _ in range(2):
        for name, value in numbers(trainer.iterate()):
            assert math.isfinite(value), name
    assert trainer.generator_updates
    run.start = trainer.state.for_next_stage()
    return run


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, float | int):
            yield name, float(value)


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def asked(teacher: Teacher) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    teacher.resolution, teacher.guidance = SIDE, GUIDANCE
    noise = teacher.noise(len(PROMPTS), 0)
    return noise, times(500, noise), teacher.encode_prompts(PROMPTS)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_family_is_distilled_written_and_drawn_with(
    folder: Path, rank: int, tmp_path: Path
) -> None:
    run = opened(folder, rank)
    learning = {"student": run.generator, "score": run.score}
    start = {name: weights(network) for name, network in learning.items()}
    iterated(run)
    for name, network in learning.items():
        moved = map(torch.equal, weights(network), start[name])
        assert not all(moved), name
    before = load_pipeline(folder).denoiser.network.state_dict()
    for name, weight in run.teacher.denoiser.network.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name
    with torch.no_grad():  # far enough that a teacher in a student's place would be seen
        for p in run.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    method = run.recipe.method
    written = export.write_student(run.teacher, run.student, method, tmp_path / "student")
    loaded = load_teacher(str(written))
    ours, teachers = run.student(*asked(run.teacher)), run.teacher.denoiser(*asked(run.teacher))
    torch.testing.assert_close(loaded.denoiser(*asked(loaded)), ours, atol=1e-5, rtol=1e-4)
    assert (ours - teachers).abs().max() > 1e-3
    export.read_student(run.score, written)
    for p, q in zip(run.score.parameters(), run.student.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    prompts = list(PROMPTS)
    drawn = loaded.sample(prompts, loaded.noise(2, 0), len(method.student_timesteps), 0.0)
    assert drawn.std() > 1
    assert prompts == PROMPTS  # Z-Image's pipeline writes into what it is given


def test_a_half_precision_base_that_saves_memory_teaches_too(folder: Path) -> None:
    """As `config init` writes it."""
    how: dict[str, Any] = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    run = iterated(opened(folder, 4, {"frozen_dtype": "bf16"}, **how))
    assert {p.dtype for p in run.generator.parameters()} == {torch.float32}
    exact = load_pipeline(folder)
    noise = asked(exact)[0]
    ours, theirs = (t.sample(PROMPTS, noise, 2, GUIDANCE) for t in (run.teacher, exact))
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 0.1 * theirs.std()


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointing_changes_no_gradient(folder: Path, rank: int) -> None:
    gradients = []
    for saving in (False, True):
        teacher, student = learner(folder, rank)
        if saving:
            save_memory(student.network)
        calls: list[nn.Module] = []
        for layer in student.network.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda m, *_, calls=calls: calls.append(m))
        x0 = student(*asked(teacher))
        forward = len(calls)
        teacher.denoiser(*asked(teacher))  # others speak before the gradient is asked for
        calls.clear()
        x0.square().sum().backward()
        assert (len(calls) > forward / 4) == saving
        gradients.append([p.grad for p in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)


def learner(folder: Path, rank: int) -> tuple[Teacher, NetworkDenoiser]:
    torch.manual_seed(1)
    teacher = load_pipeline(folder)
    d = teacher.denoiser
    if rank:
        adapter = Adapter(rank, float(rank), teacher.family.lora_layers)
        teacher.denoiser = AdapterDenoiser(d.network, d.family, d.process, adapter)
    student = teacher.denoiser.twin("student").requires_grad_(True)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return teacher, student


def test_a_sketch_answers_as_the_pipeline_does(folder: Path, tmp_path: Path) -> None:
    """Before a weight is read, and also where a configuration leaves out what its class knows."""
    short = shutil.copytree(folder, tmp_path / "short")
    path = short / "vae/config.json"
    told = json.loads(path.read_text())
    for key in ("scaling_factor", "latent_channels", "shift_factor"):
        told.pop(key, None)
    path.write_text(json.dumps(told))
    whole = load_pipeline(folder).pipeline
    for where in (folder, short):
        entries = index_of(str(where))
        family = family_of(str(where), entries)
        drawn = sketch(str(where), family, entries)
        made = type(whole.vae).from_config(json.loads((where / "vae/config.json").read_text()))
        assert latent_reward.space_of(drawn.vae) == latent_reward.space_of(made)
        (a, b) = (family.process(one) for one in (drawn, whole))
        assert a.kind == b.kind
        t = torch.tensor([1.0, 500.0, 999.0])
        assert all(map(torch.equal, a.schedule(t), b.schedule(t)))
        for ask in (family.multiple, family.factor, family.steps):
            assert ask(drawn) == ask(whole)
        if getattr(whole, family.network).config.get("sample_size"):
            assert family.resolution(drawn) == family.resolution(whole)
