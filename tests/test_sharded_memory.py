"""What a process of a sharded run holds at its peak, of a network that outweighs all else."""

from pathlib import Path
from typing import Any

import pytest
import tiny_dits
import tiny_export
import torch
from processes import together
from resident import Course
from torch import Tensor

from flashdmd import checkpoint, distributed
from flashdmd.config import Recipe
from flashdmd.loading import teacher_of
from flashdmd.models.denoiser import NetworkDenoiser
from flashdmd.models.families import FAMILIES
from flashdmd.models.teacher import Teacher
from flashdmd.optimizers import make_optimizer
from flashdmd.session import learning

WIDTH = 80  # 27 M parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made: Path = tmp_path_factory.mktemp("large") / "teacher"
    tiny_export.sd1(block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH)).save_pretrained(made)
    return made


def recipe(folder: Path) -> Recipe:
    model = {"pretrained_model_name_or_path": str(folder), "reward_model_name_or_path": None}
    train = {"joint_train_steps": 0, "mixed_precision": "no", "sharded": True}
    return Recipe.model_validate({"model": model, "train": train})


def test_no_process_ever_holds_much_more_than_its_share(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In copies: four networks, two moments and a gradient are 3.5 for each of two processes."""
    monkeypatch.setattr(distributed, "BUCKET", 2**20)  # as small to this network as it is to others

    def work() -> Any:
        course = Course()
        with course.part("deal"):
            made = learning(recipe(folder), teacher := teacher_of(recipe(folder)))
        generator, cond = made.generator, teacher.encode_prompts(["a strawberry"])
        x_t, t = torch.randn(1, *teacher.latent_shape), torch.tensor([499.0])
        optimizer = make_optimizer(generator.parameters(), lr=1e-4)
        for _ in range(2):  # in the second the moments are there
            with course.part("learn"):
                generator(x_t, t, cond).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        with course.part("save"):
            checkpoint.save(tmp_path / "c", {"student": generator}, {"student": optimizer}, {})
        optimizer = make_optimizer(generator.parameters(), lr=1e-4)
        with course.part("load"):
            checkpoint.load(tmp_path / "c", {"student": generator}, {"student": optimizer})
        with course.part("write"):
            generator.merged()
        copy = sum(p.numel() for p in generator.parameters()) * 4 / 2**20
        return {
            name: (part["anonymous_mib"] - course.anonymous) / copy
            for name, part in course.parts.items()
        }

    for copies in together(work):
        assert copies["deal"] < 4 / 2 + 0.5, copies
        assert max(copies["save"], copies["load"]) < 6 / 2 + 0.5, copies  # without gradients
        assert max(copies.values()) < 0.6 * 7, copies


def teacher_in(made: Any) -> Teacher:
    family = FAMILIES[type(made).__name__]()
    process, network = family.process(made), getattr(made, family.network)
    denoiser = NetworkDenoiser(network, family, process)
    return Teacher(Path(), family, made, process, denoiser, resolution=32)


@pytest.mark.slow
def test_a_network_put_together_part_by_part_answers_and_learns_as_the_whole() -> None:
    """Of every family: some take weights of a part that is not the one that runs."""
    made = [tiny_export.pipeline(kind) for kind in tiny_export.KINDS]
    made += [tiny_dits.pipeline(kind) for kind in tiny_dits.MAKE]

    def answer(denoiser: NetworkDenoiser, teacher: Teacher) -> list[Tensor]:
        torch.manual_seed(0)
        x_t, t = torch.randn(2, *teacher.latent_shape), torch.tensor([700.0, 300.0])
        x0 = denoiser.requires_grad_(True)(x_t, t, teacher.encode_prompts(["a", "a bird"]))
        x0.square().mean().backward()
        grads = [p.grad for p in denoiser.parameters() if p.grad is not None]
        return [x0.detach(), *map(distributed.gathered, grads)]

    def work() -> int:
        for teacher in map(teacher_in, made):
            denoiser = teacher.denoiser.outline().dealt(teacher.denoiser)
            ours, theirs = answer(denoiser, teacher), answer(teacher.denoiser, teacher)
            kind = type(teacher.pipeline).__name__
            torch.testing.assert_close(ours, theirs, msg=lambda m, k=kind: f"{k}: {m}")
        return len(made)

    assert together(work) == [len(made)] * 2
