"""The student is measured on the way, and its best checkpoint outlives newer ones."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pytest
from faults import contents

from flashdmd import best, checkpoint, run
from flashdmd.config import Recipe
from flashdmd.drawing import Standing
from flashdmd.errors import Interrupted, UserError
from flashdmd.loading import load_teacher
from flashdmd.publish import export_run
from flashdmd.sampler import Sampler
from flashdmd.session import Session, open_session

MEASURED = (
    "validation.best_metric=diversity", "validation.num_prompts=8",
    "train.checkpoints_total_limit=1", "train.max_train_steps=3", "train.joint_train_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.ingredients(tmp_path_factory.mktemp("best"))


def recipe(parts: Path, output: Path, *more: str) -> Recipe:
    return kills.recipe_of("both stages", parts, output, *MEASURED, *more)


@pytest.fixture(scope="module")
def finished(parts: Path) -> Path:
    """Whose third measurement is best: what it draws there is what it drew before, but better."""
    return run.train(recipe(parts, parts / "run"), progress=lambda *_: None)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


def test_every_checkpoint_is_measured_and_the_best_is_kept(finished: Path, parts: Path) -> None:
    measured = rows(finished)
    where = [(r["stage"], r["iteration"], r["student"]) for r in measured]
    assert where == [
        *(("distill", 2 * n, "student-stage1") for n in (1, 2, 3)),
        ("joint", 4, "student-joint"),
    ]
    steps = [r["iteration"] + (10**6 if r["stage"] == "joint" else 0) for r in measured]
    top = max(range(4), key=lambda i: measured[i]["diversity"])
    names = {f"checkpoint-{steps[i]}" for i in (top, 3)}
    assert {p.name for p in checkpoint.all_of(finished)} == names
    about = checkpoint.state_of(finished / f"checkpoint-{steps[3]}")["about"]
    assert about["metrics"]["kid"] == measured[3]["kid"]
    assert len({r["kid"] for r in measured}) == 4
    worth = best.worth_of(recipe(parts, finished, "validation.best_metric=kid"))
    assert worth is not None
    assert worth(finished / f"checkpoint-{steps[3]}") == -measured[3]["kid"]  # less is better
    otherwise = best.worth_of(recipe(parts, finished, "validation.num_prompts=9"))
    assert otherwise is not None
    assert otherwise(finished / f"checkpoint-{steps[3]}") is None


def test_a_stop_is_soon_and_what_it_left_unmeasured_is_measured(
    finished: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at a checkpoint that is to be measured, once while the last one of stage 1 is pruned:
    neither goes on to the next stage, and the run ends as the one that was never stopped.
    """
    asked = recipe(parts, parts / "stopped")
    output, prune, seen = Path(asked.output_dir), checkpoint.prune, list[tuple[str, int]]()

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def at_2(stage: str, done: int, *_: object) -> None:
        seen.append((stage, done))
        if seen.count(("distill", 2)) == asked.method.ttur:  # the cycle ends: it is due
            stop()

    def pruned(*given: Any) -> None:
        prune(*given)
        if len(rows(output)) == 3:
            stop()

    with pytest.raises(Interrupted, match="stopped after 2 generator updates"):
        run.train(asked, progress=at_2)
    assert len(rows(output)) == 1
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "prune", pruned)
        with pytest.raises(Interrupted, match="stopped after 3 generator"):
            run.train(asked, progress=lambda *_: None)
    assert not (output / "student-stage1").exists()
    run.train(asked, progress=lambda *_: None)
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows(folder)]
        for folder in (finished, output)
    ]
    assert timeless[0] == timeless[1]
    assert contents(output / "student") == contents(finished / "student")
    names = [{p.name for p in checkpoint.all_of(folder)} for folder in (finished, output)]
    assert names[0] == names[1]


def test_what_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    asked = recipe(tmp_path, tmp_path)
    about = {"recipe": asked.model_dump(mode="json"), "metrics": {"diversity": float("nan")}}
    counts = {"stage": "distill", "iteration": 1, "updates": {}, "before": {}}
    checkpoint.save(tmp_path / "checkpoint-1", {}, {}, counts, about)
    worth = best.worth_of(asked)
    assert worth is not None
    assert worth(tmp_path / "checkpoint-1") is None


def test_the_best_is_not_the_newest(tmp_path: Path) -> None:
    values = [0.3, 0.9, 0.1, None, 0.5]
    for n, _ in enumerate(values):
        checkpoint.save(tmp_path / f"checkpoint-{n}", {}, {}, {})

    def worth(folder: Path) -> float | None:
        return values[int(folder.name[-1])]

    checkpoint.prune(tmp_path, 2, worth)
    assert [p.name[-1] for p in checkpoint.all_of(tmp_path)] == ["1", "3", "4"]
    values[1] = None
    checkpoint.prune(tmp_path, 1, worth)
    assert [p.name[-1] for p in checkpoint.all_of(tmp_path)] == ["4"]


def test_a_killed_run_measures_the_same(
    finished: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between measuring and saving: measured again, with one line for it."""
    save, saved = checkpoint.save, []

    class Killed(BaseException):
        pass

    def dies(folder: Path, *rest: object) -> None:
        saved.append(folder)
        if len(saved) in (2, 5):
            raise Killed
        save(folder, *rest)

    finished.rename(parts / "whole")
    monkeypatch.setattr(checkpoint, "save", dies)
    for _ in range(3):
        try:
            run.train(recipe(parts, parts / "run"), progress=lambda *_: None)
        except Killed:
            assert len(rows(parts / "run")) in (2, 4)
    assert len(saved) == 6
    odd = kills.differences(parts / "whole", parts / "run")
    (parts / "whole").rename(parts / "other")
    assert not odd


def test_a_student_in_its_run_draws_as_its_folder(finished: Path, parts: Path) -> None:
    session: Session = open_session(recipe(parts, finished))
    (newest,) = [p for p in checkpoint.all_of(finished) if p.name == "checkpoint-1000004"]
    checkpoint.load_weights(newest, "student", session.student)
    steps = session.recipe.method.student_timesteps
    here = Standing(session.teacher, session.student, Sampler(session.teacher.process, steps))
    prompts = ["a red apple", "a ship at sea", "two small hearts"]
    written = run.student_arm(finished / "student", session.recipe)
    ours, theirs = here.draw(prompts, 5), written.draw(prompts, 5)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert here.nfe == written.nfe == 2
    assert ours.std() > 1


def test_the_student_of_a_checkpoint_is_exported(finished: Path, tmp_path: Path) -> None:
    newest = finished / "checkpoint-1000004"
    export_run(newest, "diffusers", tmp_path / "at")
    export_run(finished, "diffusers", tmp_path / "last")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "at" / name).read_bytes() == (tmp_path / "last" / name).read_bytes()
    notes = [(tmp_path / which / "flashdmd.json").read_text() for which in ("at", "last")]
    assert notes[0] == notes[1]
    assert load_teacher(str(tmp_path / "at")).folder
    whole = (newest / "student.safetensors").read_bytes()
    (newest / "student.safetensors").write_bytes(whole[:-1])
    try:
        with pytest.raises(UserError, match=r"is damaged: student\.safetensors has"):
            export_run(newest, "diffusers", tmp_path / "broken")
    finally:
        (newest / "student.safetensors").write_bytes(whole)
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["validation.best_metric=retrieval"], "retrieval: it is the judge's of the embedded"),
        (["validation.best_metric=held_out_reward"], "can have kid, reward, diversity"),
        (
            [
                "validation.best_metric=reward",
                "model.reward_model_name_or_path=null",
                "train.joint_train_steps=0",
            ],
            "there is no model.reward_model_name_or_path; this run can have kid, diversity",
        ),
    ],
)
def test_a_metric_that_no_bench_gives_is_refused_at_once(
    parts: Path, tmp_path: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run.train(recipe(parts, tmp_path / "run", *changes))
    assert not (tmp_path / "run").exists()


def test_the_embedded_bench_gives_all(tmp_path: Path) -> None:
    for name in best.SIGNS:
        change = f"validation.best_metric={name}"
        best.check_metric(kills.recipe_of("embedded default", tmp_path, tmp_path, change))
