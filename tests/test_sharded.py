"""Sharded runs: the updates of one process, half of its memory, checkpoints for any number."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import together
from torch import Tensor

from flashdmd import checkpoint, distributed
from flashdmd.algorithm import Stage
from flashdmd.config import Recipe
from flashdmd.emoji import reward as emoji_reward
from flashdmd.export import read_student, write_student
from flashdmd.memory import held
from flashdmd.models.teacher import load_pipeline
from flashdmd.session import Session, open_session
from flashdmd.trainer import Trainer

STEPS = {"score": (999, 749, 499, 249), "flow": (1000, 750, 500, 250)}


@pytest.fixture(scope="module", params=["score"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, and beside it an untrained reward of the same latents."""
    root = tmp_path_factory.mktemp(request.param)
    make = tiny.score_folder if request.param == "score" else tiny.flow_folder
    made: Path = make(root / "teacher")
    score = made if request.param == "score" else tiny.score_folder(root / "words")
    network = emoji_reward.build(load_pipeline(score).denoiser.network)
    emoji_reward.write(network, root / "reward", str(score))
    return made


def session(folder: Path, sharded: bool = True, **train: Any) -> Session:
    small = {"train_batch_size": 4, "preference_batch_size": 4, "mixed_precision": "no"}
    rates = {"learning_rate": 1e-4, "fake_score_learning_rate": 1e-4, "ema_decay": 0.5}
    rates |= {"adam_epsilon": 1e-3}  # so that Adam does not make a step of rounding
    kind = folder.parent.name.rstrip("0123456789")
    content = {
        "model": {
            "pretrained_model_name_or_path": str(folder),
            "reward_model_name_or_path": str(folder.with_name("reward")),
        },
        "method": {"beta": 5.0, "teacher_guidance_scale": 2.0, "student_timesteps": STEPS[kind]},
        "train": small | rates | {"sharded": sharded} | train,
    }
    return open_session(Recipe.model_validate(content))


def whole(run: Session, trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Every weight and moment, on the first process."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, network in trainer.networks().items():
        state[name] = cloned(distributed.whole(checkpoint.trained(network)))
    for name, optimizer in trainer.optimizers().items():
        state[f"{name}.optimizer"] = cloned(distributed.whole(checkpoint.moments(optimizer)))
    return state


def cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def learn(
    run: Session, stage: Stage = "distill", iterations: int = 3, trainer: Trainer | None = None
) -> Trainer:
    trainer = trainer or run.trainer(stage)
    for _ in range(iterations):
        trainer.iterate()
    return trainer


def close(ours: dict[str, Any], theirs: dict[str, Any], atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        assert tensors.keys() == ours[name].keys(), name
        for key, value in tensors.items():
            far = 10 * atol if "optimizer" in name else atol  # moments: of gradients of any length
            torch.testing.assert_close(
                ours[name][key],
                value,
                atol=far,
                rtol=1e-4,
                msg=lambda m, at=(name, key): f"{at}: {m}",
            )


@pytest.mark.parametrize(
    ("folder", "sharded"), [("score", False), ("score", True), ("flow", True)], indirect=["folder"]
)
def test_two_processes_make_each_update_of_one(sharded: bool, folder: Path, tmp_path: Path) -> None:
    """From the same state, of both stages: later a rounding flips a unit of the discriminator."""
    stages: tuple[tuple[Stage, int], ...] = (("distill", 2), ("joint", 3))

    def one() -> Any:
        run = session(folder, sharded=False)
        for stage, iterations in stages:
            trainer = run.trainer(stage)
            for n in range(iterations):
                learn(run, stage, int(n > 0), trainer).save(tmp_path / f"{stage}-{n}")
            yield whole(run, learn(run, stage, 1, trainer))
            run.take_over()

    def two() -> Any:
        run = session(folder, sharded)
        ends = {}
        for stage, iterations in stages:
            trainer = run.trainer(stage)
            for n in range(iterations):
                trainer.restore(tmp_path / f"{stage}-{n}")
                ends[stage, n + 1] = whole(run, learn(run, stage, 1, trainer))
            trainer.restore(tmp_path / f"{stage}-{iterations - 1}")
            learn(run, stage, 1, trainer)
            run.take_over()
        return ends, sorted({type(p.data).__name__ for p in run.generator.parameters()})

    last = dict(zip((stage for stage, _ in stages), one(), strict=True))
    (ends, kinds), _ = together(two)
    assert kinds == (["DTensor"] if sharded else ["Tensor"])
    alone = session(folder, sharded=False)
    for (stage, n), ours in ends.items():
        theirs = last[stage]
        if (tmp_path / f"{stage}-{n}").exists():
            trainer = alone.trainer(stage)
            trainer.restore(tmp_path / f"{stage}-{n}")
            theirs = whole(alone, trainer)
        close(ours, theirs)


def test_a_checkpoint_goes_from_any_number_of_processes_to_any(
    folder: Path, tmp_path: Path
) -> None:
    shares = {"train_batch_size": 6, "preference_batch_size": 6}  # among one, two and three

    def saved(name: str) -> Any:
        run = session(folder, **shares)
        trainer = learn(run)
        trainer.save(tmp_path / name)
        return whole(run, trainer)

    def resumed(name: str) -> Any:
        run = session(folder, **shares)
        trainer = run.trainer("distill")
        trainer.restore(tmp_path / name)
        return whole(run, trainer), trainer.state

    two, one = together(lambda: saved("checkpoint-2"))[0], saved("checkpoint-1")
    assert not (tmp_path / "checkpoint-1/shards").exists()
    assert len(list((tmp_path / "checkpoint-2/shards").glob("*.safetensors"))) == 2
    for name, expected in (("checkpoint-1", one), ("checkpoint-2", two)):
        assert checkpoint.damage(tmp_path / name) is None
        for ranks in (3, 1) if name == "checkpoint-2" else (2,):
            got, state = (
                resumed(name) if ranks == 1 else together(lambda n=name: resumed(n), ranks)[0]
            )
            close(got, expected, 0.0)
            assert state.updates == {"generator": 2, "score": 3, "discriminator": 3}


def test_a_sharded_student_is_written_and_read_whole(folder: Path, tmp_path: Path) -> None:
    def work() -> Any:
        run = session(folder)
        learn(run)
        weights = distributed.whole(run.student.network.state_dict())
        write_student(run.teacher, run.student, run.recipe.method, tmp_path / "student")
        run.generator.requires_grad_(False)
        read_student(run.generator, tmp_path / "student")
        return weights, distributed.whole(run.generator.network.state_dict())

    (weights, again), _ = together(work)
    loaded = load_pipeline(tmp_path / "student").denoiser.network.state_dict()
    for name, value in weights.items():
        assert torch.equal(loaded[name], value)
        assert torch.equal(again[name], value)


def test_each_process_holds_half(folder: Path) -> None:
    def work(sharded: bool) -> int:
        run = session(folder, sharded)
        trainer = learn(run, iterations=1)
        networks = (run.generator, run.score, run.student, run.teacher.denoiser)
        return held(*networks, *(trainer.optimizers()[k] for k in ("generator", "score")))

    alone = work(False)
    for mine in together(lambda: work(True)):
        assert 0.5 * alone <= mine < 0.6 * alone
