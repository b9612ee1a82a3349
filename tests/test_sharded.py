"""Sharded runs: the updates of one process, half of its memory, checkpoints for any number."""

import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_data_buckets
import tiny
import tiny_run
import torch
from faults import Figure, Lost, contents, lost_files, lost_iterations
from processes import free_port, together
from test_faults import Run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Dinov2Config, Dinov2Model

from flashdmd import beforehand, checkpoint, distributed
from flashdmd.algorithm import Stage
from flashdmd.config import Recipe
from flashdmd.emoji import reward as emoji_reward
from flashdmd.errors import UserError
from flashdmd.export import read_student, write_student
from flashdmd.memory import held
from flashdmd.models.teacher import load_pipeline
from flashdmd.session import Session, open_session
from flashdmd.trainer import Trainer

State = dict[str, dict[str, Tensor]]  # by network and optimizer
STEPS = {"score": (999, 749, 499, 249), "flow": (1000, 750, 500, 250)}


@pytest.fixture(scope="module", params=["score"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, and beside it an untrained reward of its latents and a backbone."""
    root = tmp_path_factory.mktemp(request.param)
    make = tiny.score_folder if request.param == "score" else tiny.flow_folder
    made: Path = make(root / "teacher")
    score = made if request.param == "score" else tiny.score_folder(root / "words")
    network = emoji_reward.build(load_pipeline(score).denoiser.network)
    emoji_reward.write(network, root / "reward", str(score))
    small = Dinov2Config(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2)
    small.image_size = 56
    Dinov2Model(small).save_pretrained(root / "backbone")
    return made


def session(
    folder: Path, sharded: bool = True, data: dict[str, Any] | None = None, **train: Any
) -> Session:
    """With the rates of full fine-tuning, and a backbone without a corner: a unit of ReLU6 that
    rounding takes across one changes a student's gradient by 1e-4 to 1e-3.
    """
    small = {"train_batch_size": 4, "preference_batch_size": 4, "mixed_precision": "no"}
    kind = folder.parent.name.rstrip("0123456789")
    content = {
        "model": {
            "pretrained_model_name_or_path": str(folder),
            "reward_model_name_or_path": str(folder.with_name("reward")),
        },
        "method": {"beta": 5.0, "teacher_guidance_scale": 2.0, "student_timesteps": STEPS[kind]},
        "discriminator": {"backbone": str(folder.with_name("backbone"))},
        "data": data or {},
        "train": small | {"sharded": sharded, "ema_decay": 0.5} | train,
    }
    return open_session(Recipe.model_validate(content))


def whole(run: Session, trainer: Trainer) -> State:
    """Every weight and moment, on the first process."""
    state: State = {}
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


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def far(ours: State, theirs: State, before: State) -> dict[str, tuple[float, float]]:
    """By network and optimizer: the largest difference, and the norm of all of them as a share of
    that of the update; of a first moment, which is a mean of gradients, as a share of its own.
    """
    assert ours.keys() == theirs.keys()
    found = {}
    for name, tensors in theirs.items():
        assert tensors.keys() == ours[name].keys(), name
        moment = name.endswith(".optimizer")
        names = [k for k, t in tensors.items() if t.is_floating_point()]
        names = [k for k in names if not moment or k.endswith(".exp_avg")]
        off = [ours[name][k] - tensors[k] for k in names]
        moved = norm(tensors[k] if moment else tensors[k] - before[name][k] for k in names)
        largest = max((float(t.abs().max()) for t in off), default=0.0)
        found[name] = largest, norm(off) / moved if moved else largest
    return found


@pytest.mark.parametrize(
    ("folder", "sharded"),
    [
        pytest.param("score", False, marks=pytest.mark.slow),
        ("score", True),
        pytest.param("flow", True, marks=pytest.mark.slow),
    ],
    indirect=["folder"],
)
def test_two_processes_make_each_update_of_one(
    sharded: bool, folder: Path, tmp_path: Path, figure: Figure
) -> None:
    """From the same state, at each place of the cycle of both stages."""
    stages: tuple[tuple[Stage, int], ...] = (("distill", 3), ("joint", 4))

    def ends(ranks: int) -> Any:
        run, found = session(folder, sharded and ranks > 1), {}
        for stage, iterations in stages:
            trainer = run.trainer(stage)
            for n in range(iterations):
                point = tmp_path / f"{stage}-{n}"
                trainer.save(point) if ranks == 1 else trainer.restore(point)
                before = whole(run, trainer)
                trainer.iterate()
                found[stage, n] = (before, whole(run, trainer))
            run.take_over()
        return found, sorted({type(p.data).__name__ for p in run.generator.parameters()})

    alone, _ = ends(1)
    (two, kinds), _ = together(lambda: ends(2))
    assert kinds == (["DTensor"] if sharded else ["Tensor"])
    assert set(two) == set(alone)
    worst = {"moments": 0.0, "weights": 0.0, "first steps": 0.0}
    for place, (before, after) in alone.items():
        same, ours = two[place]
        for name, tensors in before.items():
            assert all(torch.equal(same[name][k], t) for k, t in tensors.items()), name
        for name, (largest, share) in far(ours, after, before).items():
            at = (place, name, largest, share)
            if name.endswith(".optimizer"):
                assert share < 2e-5, at
                worst["moments"] = max(worst["moments"], share)
                continue
            assert share < 1.5e-3, at  # Adam divides what is rounding by what is rounding
            # Its first step of a weight is the rate in full, whichever sign rounding gives.
            first = place[1] == 0 and name == "discriminator"
            assert largest < (1e-4 if first else 1e-6), at
            kind = "first steps" if first else "weights"
            worst[kind] = max(worst[kind], largest)
    said = "two processes against one, one update of each network"
    figure(f"{said}: first moments, of their norm", worst["moments"], "")
    figure(f"{said}: largest difference of a weight", worst["weights"], "")
    figure(f"{said}: the same at Adam's first step of rate 1e-4", worst["first steps"], "")


@pytest.mark.slow
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
            assert got.keys() == expected.keys()
            for part, tensors in expected.items():
                assert tensors.keys() == got[part].keys(), part
                assert all(torch.equal(got[part][k], t) for k, t in tensors.items()), part
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


def test_processes_with_other_pictures_are_told(folder: Path, tmp_path: Path) -> None:
    """Else each would draw batches of its own."""

    def work() -> str:
        here = tmp_path / str(distributed.rank())
        test_data_buckets.folder(here / "data", wide=3, square=3 + distributed.rank())
        os.chdir(here)
        with pytest.raises(UserError, match="differ in pictures, captions or prompts"):
            session(folder, data={"train_data_dir": "data"})
        return "told"

    assert together(work) == ["told"] * 2


def test_a_student_of_several_files_is_read_back(folder: Path, tmp_path: Path) -> None:
    """Beyond 10 GB, as SDXL's in float32, diffusers writes them by itself."""
    teacher = load_pipeline(folder)
    network, unet = teacher.denoiser.network, tmp_path / "student/unet"
    network.save_pretrained(unet, max_shard_size="50KB")
    assert len(list(unet.glob("*.safetensors"))) > 2
    for ranks in (1, 2):

        def work() -> Any:
            run = session(folder)
            with torch.no_grad():
                for p in run.generator.parameters():
                    p.zero_()
            run.generator.requires_grad_(False)
            read_student(run.generator, tmp_path / "student")
            return distributed.whole(run.generator.network.state_dict())

        read = work() if ranks == 1 else together(work)[0]
        assert all(torch.equal(read[k], v) for k, v in network.state_dict().items())
    started = {"student_model_name_or_path": str(tmp_path / "student")}
    model = {"pretrained_model_name_or_path": str(folder), "reward_model_name_or_path": None}
    beforehand.check(
        Recipe.model_validate({"model": model | started, "train": {"joint_train_steps": 0}})
    )
    index = next(unet.glob("*.index.json"))
    for text, says in (
        ("[]", "cannot be loaded: a list"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "beside"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=says):
            read_student(teacher.denoiser.twin("student"), tmp_path / "student")


@pytest.mark.slow
@pytest.mark.fault(
    "disk: full when shares of a checkpoint are written",
    "a tmpfs with 64 KiB left, between two starts of a sharded run of two processes",
)
def test_a_full_disk_is_told_by_each_process_of_a_sharded_run(tmp_path: Path, lost: Lost) -> None:
    disk, output, teacher = tmp_path / "disk", tmp_path / "disk/run", tmp_path / "teacher"
    disk.mkdir()
    tiny.score_folder(teacher)
    numbers = {"train_batch_size": 2, "sharded": True, "checkpoints_total_limit": 2}

    def two(steps: int) -> list[Run]:
        """Both, for so many updates in all."""
        port, train = str(free_port()), numbers | {"max_train_steps": steps}
        path = tiny_run.recipe(teacher, output, train, method={"gan_gradient_ratio": None})

        def begin(rank: str) -> Run:
            given = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            before = partial(os.environ.update, given, LOCAL_RANK=rank, MASTER_PORT=port)
            return Run(path, tmp_path / rank, before)

        return [begin("0"), begin("1")]

    def saves(running: list[Run], name: str) -> None:
        running[0].wait_for((output / name).exists)
        for run in running:
            run.process.kill()
            run.end()
        assert checkpoint.latest(output) == output / name

    if os.geteuid() or os.system(f"mount -t tmpfs -o size=64m tmpfs {disk} 2>/dev/null"):
        pytest.skip("cannot mount a file system here")
    try:
        saves(two(1), "checkpoint-2")
        before = contents(output / "checkpoint-2")
        told = os.statvfs(disk)
        (disk / "filled").write_bytes(bytes(told.f_bavail * told.f_frsize - 2**16))
        for code, said in [run.end() for run in two(2)]:
            assert code == 2, said
            assert f"No space left on device: {output}" in said
            assert "with room, the same command goes on" in said
            assert "Traceback" not in said
        lost(lost_iterations(output), "iterations")
        lost(lost_files(before, output / "checkpoint-2"), "files")
        assert contents(output / "checkpoint-2") == before
        (disk / "filled").unlink()
        saves(two(2), "checkpoint-4")
    finally:
        os.system(f"umount --lazy {disk}")


def test_what_one_process_meets_when_it_writes_its_shares_all_raise(tmp_path: Path) -> None:
    """A file lies where the second one writes."""

    def work() -> str:
        folder = tmp_path / ("file" if distributed.rank() else "folder")
        mesh = init_device_mesh("cpu", (2,))
        shares = {"a": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}
        with pytest.raises(OSError, match=str(tmp_path / "file")) as caught:
            distributed.save_shards(shares, folder)
        return str(caught.value)

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    one, other = together(work)
    assert one == other
