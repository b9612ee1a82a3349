"""Data that go while a run is on: it ends with their name, and goes on when they are back."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from faults import Lost, lost_iterations
from safetensors.torch import load_file, save_file
from test_batches import folder
from test_data_tars import examples, tar
from test_faults import Run

from flashdmd import cache, checkpoint, config, run
from flashdmd.cache import Embeddings, Latents
from flashdmd.config import Recipe
from flashdmd.data import open_data
from flashdmd.errors import UserError
from flashdmd.sources import identity

Change = Callable[[Path], object]
AT, LAST = 2, 8  # generator updates: after which the data go, of all


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tiny.score_folder(tmp_path_factory.mktemp("vanished") / "teacher")
    return made


def recipe(teacher: Path, path: Path, **data: Any) -> Recipe:
    content = {
        "model": {
            "pretrained_model_name_or_path": str(teacher),
            "reward_model_name_or_path": None,
        },
        "data": {"train_data_dir": str(path / "data")} | data,
        "method": {"gan_gradient_ratio": None, "ttur": 1},
        "discriminator": {"width": 8},
        "train": {
            "train_batch_size": 2, "max_train_steps": LAST, "joint_train_steps": 0, "device": "cpu",
            "mixed_precision": "no", "checkpointing_steps": 1,
        },
        "output_dir": str(path / "run"),
    }  # fmt: skip
    (path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return config.load(path / "recipe.yaml", [])


def pictures(path: Path) -> Path:
    folder(path)
    return path


def tars(path: Path) -> Path:
    tar(path / "x.tar", examples(8))
    return path


def move(path: Path) -> None:
    path.rename(path.with_name("aside"))


def empty(path: Path) -> None:
    """As where a disk was mounted."""
    move(path)
    path.mkdir()


@pytest.mark.parametrize("go", [move, empty, shutil.rmtree])
def test_a_folder_that_is_gone_or_empty_is_named_at_once(
    go: Change, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder(tmp_path / "data")
    go(tmp_path / "data")
    caplog.clear()
    with pytest.raises(UserError, match=r"data is not there any more, or empty.*put the pictures"):
        source.draw(np.random.default_rng(0), 4)
    assert not caplog.records


def cut(path: Path) -> None:
    shutil.copytree(path, path.with_name("aside"))  # with its times
    os.truncate(path / "x.tar", 3000)


@pytest.mark.parametrize(
    ("make", "go", "workers", "says"),
    [
        pytest.param(
            *(pictures, move, 1, "data is not there any more, or empty"),
            marks=pytest.mark.fault("data: the folder vanishes", "moved away while a run iterates"),
        ),
        pytest.param(
            *(tars, cut, 0, "x.tar was changed since it was listed"),
            marks=pytest.mark.fault("data: a tar is cut off", "truncated while a run iterates"),
        ),
    ],
)
def test_data_that_go_are_named_and_the_run_goes_on_when_they_are_back(
    make: Change, go: Change, workers: int, says: str, teacher: Path, tmp_path: Path, lost: Lost
) -> None:
    place = tmp_path / "data"
    make(place)
    asked = recipe(teacher, tmp_path, dataloader_num_workers=workers)
    made: list[int] = []

    def progress(stage: str, done: int, of: int, record: dict[str, float]) -> None:
        made.append(done)
        if len(made) == AT:
            go(place)

    with pytest.raises(UserError, match=f"{says}.*back.*what was saved is intact, and the same"):
        run.train(asked, progress=progress)
    assert made[-1] < LAST
    state = checkpoint.state_of(checkpoint.latest(tmp_path / "run"))
    assert state["iteration"] == made[-1]
    lost(lost_iterations(tmp_path / "run"), "iterations")
    shutil.rmtree(place, ignore_errors=True)
    (tmp_path / "aside").rename(place)
    run.train(asked, progress=progress)
    assert made[-1] == LAST


class Killed(Exception):  # noqa: N818
    pass


def written(output: Path) -> dict[Path, bytes]:
    """Of a run, but for its caches."""
    files = [path for path in output.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {path: path.read_bytes() for path in files}


def turned(path: Path) -> None:
    """One weight of a network less, in a file that is as large as it was."""
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[-1] += 1
    save_file(weights, path, metadata={"format": "pt"})


def setting(path: Path, **new: float) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


OTHER_TEACHERS: dict[str, Change] = {
    "network": lambda t: turned(t / "unet/diffusion_pytorch_model.safetensors"),
    "vae": lambda t: setting(t / "vae/config.json", scaling_factor=0.5),
    "text_encoder": lambda t: turned(t / "text_encoder/model.safetensors"),
    "noise schedule": lambda t: setting(t / "scheduler/scheduler_config.json", beta_end=0.02),
}


def test_another_teacher_begins_another_run(teacher: Path, tmp_path: Path) -> None:
    """In the same folder, as who trains it on leaves it. Refused before anything is written."""
    pictures(tmp_path / "data")
    place, output = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, place)
    asked = recipe(place, tmp_path)

    def progress(stage: str, done: int, of: int, record: dict[str, float]) -> None:
        if done == AT:
            raise Killed

    with pytest.raises(Killed):
        run.train(asked, progress=progress)
    before = written(output)
    for name, change in OTHER_TEACHERS.items():
        change(place)
        with pytest.raises(UserError, match=rf"^another {name} than .*checkpoint-\d learned with"):
            run.train(asked)
        assert written(output) == before
        shutil.rmtree(place)
        shutil.copytree(teacher, place)
    run.train(asked)


def test_other_data_begin_another_run(teacher: Path, tmp_path: Path) -> None:
    """Refused before anything is written; what was only copied anew is the same."""
    place = pictures(tmp_path / "data")
    asked, output = recipe(teacher, tmp_path), tmp_path / "run"
    made: list[int] = []

    def progress(stage: str, done: int, of: int, record: dict[str, float]) -> None:
        made.append(done)
        if len(made) == AT:
            raise Killed

    with pytest.raises(Killed):
        run.train(asked, progress=progress)
    shutil.copytree(place, tmp_path / "as it was")
    caption = sorted(place.rglob("*.txt"))[0]
    for change in (
        lambda: caption.write_text("another"),
        lambda: sorted(place.rglob("*.png"))[0].unlink(),
    ):
        change()
        before = written(output)
        with pytest.raises(UserError, match=r"not those that .*checkpoint-1 learned on.*put back"):
            run.train(asked, progress=progress)
        assert written(output) == before
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "as it was", place, copy_function=shutil.copyfile)
    place.rename(tmp_path / "elsewhere")
    moved = recipe(
        teacher,
        tmp_path,
        train_data_dir=str(tmp_path / "elsewhere"),
        cache_dir=str(tmp_path / "cache"),
    )
    run.train(moved, progress=progress)
    assert made[-1] == LAST


@pytest.mark.fault("data: a cache vanishes", "its files removed or cut off while a run iterates")
def test_a_cache_that_goes_is_named_and_made_again(
    teacher: Path, tmp_path: Path, lost: Lost
) -> None:
    pictures(tmp_path / "data")
    asked = recipe(teacher, tmp_path, cache_latents=True, cache_text_embeddings=True)
    made: list[int] = []

    def progress(stage: str, done: int, of: int, record: dict[str, float]) -> None:
        made.append(done)
        if len(made) == AT:
            for path in (tmp_path / "run/cache/embeddings").iterdir():
                path.unlink()
            for path in (tmp_path / "run/cache/latents").iterdir():
                os.truncate(path, 900)

    with pytest.raises(UserError, match=r"embeddings-\w+\.safetensors.*cannot be read any more"):
        run.train(asked, progress=progress)
    assert made[-1] == AT
    lost(lost_iterations(tmp_path / "run"), "iterations")
    run.train(asked, progress=progress)
    assert made[-1] == LAST


@pytest.mark.parametrize("size", [None, 0, 5, 70, -1])
def test_a_file_of_a_cache_that_is_gone_or_torn_is_named(size: int | None, tmp_path: Path) -> None:
    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"embeds": torch.ones(len(prompts), 3)}

    kept = Embeddings(tmp_path, "x")
    kept.make(["a", "b"], encode)
    path, _ = kept.places["a"]
    whole = path.read_bytes()
    path.unlink() if size is None else path.write_bytes(whole[:size])
    with pytest.raises(UserError, match=f"{path}.*cannot be read any more"):
        kept(["a"])


@pytest.mark.fault("data: the folder is removed", "rm -r while the command draws ahead of it")
def test_the_command_ends_with_2(teacher: Path, tmp_path: Path, lost: Lost) -> None:
    pictures(tmp_path / "data")
    recipe(teacher, tmp_path, dataloader_num_workers=1)
    ran = Run(tmp_path / "recipe.yaml", tmp_path / "said")
    log = tmp_path / "run/metrics.jsonl"
    while not log.exists() and ran.process.is_alive():
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "data")
    code, said = ran.end()
    assert code == 2, said
    assert f"flashdmd: {tmp_path / 'data'} is not there any more" in said
    assert "Traceback" not in said
    assert checkpoint.latest(tmp_path / "run")
    lost(lost_iterations(tmp_path / "run"), "iterations")


def test_a_disk_that_goes_leaves_no_black_pictures_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PICTURES", 4)
    source, calls = folder(tmp_path / "data"), [0]

    def encode(pictures: np.ndarray) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            move(tmp_path / "data")
        return torch.from_numpy(pictures).float().mean((2, 3), keepdim=True)

    kept = Latents(tmp_path / "latents", "x")
    with pytest.raises(UserError, match="data is not there any more"):
        kept.make(source, encode, batch=2)
    (tmp_path / "aside").rename(tmp_path / "data")
    again = kept.make(source, encode, batch=2)
    assert not again.without
    whole = Latents(tmp_path / "whole", "x")
    whole.make(source, encode, batch=2)
    everything = np.arange(len(source.catalogue))
    assert torch.equal(kept(everything), whole(everything))


def test_what_is_never_drawn_tells_data_from_others(tmp_path: Path) -> None:
    source = folder(tmp_path / "data")
    names = {
        identity(source, ()),
        identity(replace(source, without=frozenset({1})), ()),
        identity(replace(source, without=frozenset({2})), ()),
        identity(source, ("a cat",)),
    }
    assert len(names) == 4
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    assert identity(open_data(tmp_path / "copy", 64, multiple=16), ()) in names
