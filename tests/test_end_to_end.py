"""Whole runs of real pipelines at tiny size: both stages, stopped, resumed, written, drawn."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from faults import Lost, lost_iterations
from PIL import Image
from safetensors.torch import load_file

from flashdmd import checkpoint, cli, compare, config, drawing, resuming, run
from flashdmd.config import Recipe
from flashdmd.drawing import Arm
from flashdmd.emoji import reward as emoji_reward
from flashdmd.errors import Interrupted, Stopped, UserError
from flashdmd.files import stoppable
from flashdmd.loading import load_teacher
from flashdmd.report.run import parsed
from flashdmd.session import Session, open_session
from flashdmd.trainer import Trainer


@pytest.fixture(scope="module", params=["score", "flow"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(f"e2e-{family}")
    score = tiny.score_folder(folder / "score")
    teacher = score if family == "score" else tiny.flow_folder(folder / "flow")
    emoji_reward.train(folder / "fit", score, 3, batch=4, n=8)
    return {"teacher": teacher, "reward": folder / "fit/reward", "here": folder}


def recipe(folders: dict[str, Path], output: Path, family: str, *more: str) -> Recipe:
    shipped = Path(__file__).parents[1] / f"recipes/emoji-{family}.yaml"
    changes = [
        f"model.pretrained_model_name_or_path={folders['teacher']}",
        f"model.reward_model_name_or_path={folders['reward']}",
        f"output_dir={output}",
        "train.train_batch_size=2",
        "train.preference_batch_size=2",
        "train.max_train_steps=2",
        "train.joint_train_steps=1",
        "train.checkpointing_steps=1",
        "train.gan_calibration_steps=[0, 1]",
        "train.mixed_precision=no",
        "validation.num_prompts=8",
        "validation.teacher_steps=5",
    ]
    if "train.arm=dmd2" not in more:
        changes.append("discriminator.width=8")
    return config.load(shipped, [*changes, *more])


@pytest.fixture(scope="module")
def finished(folders: dict[str, Path], family: str) -> Path:
    return run.train(recipe(folders, folders["here"] / "run", family), progress=quiet)


def quiet(stage: str, done: int, of: int, record: dict[str, float]) -> None:
    pass


NETWORKS = {"unet", "transformer"}
SCORE_STEPS, FLOW_STEPS = (999, 749, 499, 249), (1000, 750, 500, 250)
LISTS = ("matching", "adversarial", "preference")
OTHER_REWARD = "model.reward_model_name_or_path=emoji-reward"  # of other latents than the tiny ones


def weights(output: Path, name: str = "student") -> dict[str, torch.Tensor]:
    (path,) = [p for p in (output / name).glob("*/*.safetensors") if p.parent.name in NETWORKS]
    return load_file(path)


def test_both_stages_change_the_student(finished: Path, folders: dict[str, Path]) -> None:
    start = weights(folders["teacher"].parent, folders["teacher"].name)
    first, second = weights(finished, "student-stage1"), weights(finished)
    assert any(not torch.equal(start[k], first[k]) for k in start)
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert all(torch.isfinite(v).all() for v in second.values())


def test_the_log_counts_what_was_done(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    distill = [r for r in records if r["stage"] == "distill"]
    joint = [r for r in records if r["stage"] == "joint"]
    assert [r["generator_updates"] for r in distill] == [1, 1, 2, 2]
    assert sum("matching" in r for r in distill) == 2
    assert sum("preference" in r for r in joint) == 5
    assert sum("matching" in r for r in joint) == 1
    assert distill[-1]["images"] == 4 * 2
    assert joint[-1]["images"] == 6 * 2
    assert joint[-1]["generator_updates"] == 3
    assert joint[0]["gan_loss_weight"] == distill[-2]["gan_loss_weight"] != 0.1


def test_the_student_is_a_stock_pipeline(finished: Path, folders: dict[str, Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(finished / "student")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=4, guidance_scale=0, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert len(pipeline.scheduler.timesteps) == 4
    card = (finished / "student/README.md").read_text()
    assert "num_inference_steps=4" in card
    assert f"base_model: {folders['teacher'].name}\n" in card
    assert "2 generator updates. Then refined (stage 2, joint) for 1 generator updates." in card
    configs = list((finished / "student").glob("*/*config.json"))
    assert len(configs) > 3
    assert not any("_name_or_path" in path.read_text() for path in configs)


def test_what_may_change_goes_on_and_starting_over_forgets(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """Rates and what is measured may change on the way, and nothing of an old run outlives it."""
    short = ("train.joint_train_steps=0", "train.max_train_steps=1")
    run.train(recipe(folders, tmp_path / "run", family, *short), progress=quiet)
    changed = ("train.learning_rate=1e-7", "validation.teacher_steps=6", "train.max_grad_norm=1")
    longer = (*changed, "train.joint_train_steps=0", "train.max_train_steps=2")
    run.train(recipe(folders, tmp_path / "run", family, *longer), progress=quiet)
    assert "for 2 generator updates" in (tmp_path / "run/student/README.md").read_text()
    with pytest.raises(UserError, match=r"method\.beta: was 500\.0, is 400\.0"):
        run.train(recipe(folders, tmp_path / "run", family, *longer, "method.beta=400"))
    (tmp_path / "run/metrics.json").write_text("{}")
    again = recipe(folders, tmp_path / "run", family, *short, "method.beta=400")
    run.train(again, resume=False, progress=quiet)
    assert "for 1 generator updates" in (tmp_path / "run/student/README.md").read_text()
    assert not (tmp_path / "run/metrics.json").exists()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_a_student_is_no_teacher(finished: Path, folders: dict[str, Path], family: str) -> None:
    model = f"model.pretrained_model_name_or_path={finished / 'student'}"
    with pytest.raises(UserError, match="is a few-step student; name its teacher"):
        run.train(recipe(folders, folders["here"] / "none", family, model))
    assert not (folders["here"] / "none").exists()


def test_the_same_seed_draws_the_same_sheet(finished: Path, tmp_path: Path) -> None:
    """Also of a student, which draws fresh noise between its steps."""
    sheets = []
    for name in ("a.png", "b.png"):
        run.sample(str(finished / "student"), ["a cat", "a dog"], 4, 7, None, tmp_path / name)
        sheets.append(np.asarray(Image.open(tmp_path / name)))
    assert np.array_equal(*sheets)
    run.sample(str(finished / "student"), ["a cat", "a dog"], 4, 8, None, tmp_path / "c.png")
    assert not np.array_equal(sheets[0], np.asarray(Image.open(tmp_path / "c.png")))


def test_a_run_stopped_anywhere_ends_as_the_run_that_was_not(
    finished: Path, folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """Stopped after every record: in stage 1, between the stages, in stage 2."""
    import os
    import signal

    def stop(stage: str, done: int, of: int, record: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    again = recipe(folders, tmp_path / "run", family)
    stops: list[str] = []
    while True:
        try:
            run.train(again, progress=stop)
            break
        except Interrupted as e:
            stops.append(str(e))
    assert len(stops) >= 9
    assert all(f"saved in {tmp_path / 'run'}" in said for said in stops)
    ours, theirs = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_line_torn_by_a_kill_takes_no_other_with_it(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    one, two = (["train.joint_train_steps=0", f"train.max_train_steps={n}"] for n in (1, 2))
    run.train(recipe(folders, tmp_path / "run", family, *one), progress=quiet)
    log = tmp_path / "run/metrics.jsonl"
    log.write_text(log.read_text() + '{"iteration": 3, "stage": "dist')
    run.train(recipe(folders, tmp_path / "run", family, *two), progress=quiet)
    records, torn = parsed(log.read_text())
    assert [r["iteration"] for r in records] == [1, 2, 3, 4]
    assert not torn


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # what was read is still mapped


@pytest.mark.fault("disk: full when a student is written", "a tmpfs, filled to 64 KiB")
@pytest.mark.parametrize("name", ["student-stage1", "student"])
def test_a_disk_that_is_full_when_a_student_is_written_loses_nothing(
    finished: Path,
    folders: dict[str, Path],
    family: str,
    name: str,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: Lost,
) -> None:
    write, ballast = run.write_student, disk / "ballast"

    def without_room(session: Session, trainer: Trainer, student: str) -> Path:
        if student == name and not ballast.exists():
            free = shutil.disk_usage(disk).free
            ballast.write_bytes(bytes(free - 2**16))  # a few configs fit, and no weights
        return write(session, trainer, student)

    monkeypatch.setattr(run, "write_student", without_room)
    again = recipe(folders, disk / "run", family)
    (disk / "recipe.yaml").write_text(config.dump(again))
    monkeypatch.setattr("sys.argv", ["flashdmd", "train", str(disk / "recipe.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "No space left on device" in said
    assert "with room, the same command goes on" in said
    assert "Traceback" not in said
    left = {path.name for path in (disk / "run").iterdir() if "student" in path.name}
    assert left == {"student-stage1"} - {name}
    lost(lost_iterations(disk / "run"), "iterations")
    assert lost_iterations(disk / "run") == 0
    ballast.write_bytes(b"")
    run.train(again, progress=quiet)
    for student in ("student-stage1", "student"):
        ours, theirs = weights(disk / "run", student), weights(finished, student)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    made = [(r / "metrics.jsonl").read_text().count("\n") for r in (disk / "run", finished)]
    assert made[0] == made[1]  # nothing was done twice


@pytest.mark.fault("disk: full when a checkpoint is written", "a tmpfs, filled to 64 KiB")
def test_a_checkpoint_takes_the_room_of_an_older_one_on_a_full_disk(
    finished: Path, folders: dict[str, Path], family: str, disk: Path, lost: Lost
) -> None:
    ballast = disk / "ballast"

    def fill(stage: str, done: int, of: int, record: dict[str, float]) -> None:
        """Before the last checkpoint of stage 1 is written."""
        if len(checkpoint.all_of(disk / "run")) == 2 and not ballast.exists():
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 2**16))

    more = ("train.max_train_steps=3", "train.joint_train_steps=0")
    with pytest.raises(OSError, match="No space left"):  # for the student, which comes after it
        run.train(recipe(folders, disk / "run", family, *more), progress=fill)
    assert [p.name for p in checkpoint.all_of(disk / "run")] == ["checkpoint-4", "checkpoint-6"]
    lost(lost_iterations(disk / "run"), "iterations")
    assert lost_iterations(disk / "run") == 0


def test_another_recipe_in_the_same_folder_is_refused(
    finished: Path, folders: dict[str, Path], family: str
) -> None:
    with pytest.raises(UserError, match=r"method\.beta: was 500\.0, is 7\.0"):
        run.train(recipe(folders, finished, family, "method.beta=7"), progress=quiet)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.max_train_steps=3", "max_train_steps=3, but .* stage 2, after 2 generator"),
        ("train.joint_train_steps=0", "joint_train_steps=0, but .* in stage 2"),
        ("train.learning_rate=1e-3", "is finished, so train.learning_rate would change nothing"),
    ],
)
def test_what_is_over_cannot_be_changed(
    finished: Path, folders: dict[str, Path], family: str, change: str, said: str
) -> None:
    before = (finished / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=said):
        run.train(recipe(folders, finished, family, change), progress=quiet)
    assert (finished / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "updates", "before", "said"),
    [
        ("distill", {"generator": 3}, {}, "max_train_steps=2, but .* has made 3 updates"),
        ("joint", {"generator": 2}, {"generator": 2}, "joint_train_steps=1, .* has made 2"),
        ("rl", {"preference": 2}, {"generator": 2}, "joint_train_steps=1, .* has made 2"),
    ],
)
def test_fewer_updates_than_were_made_are_refused(
    folders: dict[str, Path],
    family: str,
    stage: str,
    updates: dict[str, int],
    before: dict[str, int],
    said: str,
) -> None:
    state = {"stage": stage, "updates": updates, "before": before}
    with pytest.raises(UserError, match=said):
        resuming.check_progress(recipe(folders, folders["here"], family), state, set())


def test_steps_of_the_other_kind_of_teacher_are_refused_with_its_own(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    given, own = {"score": (FLOW_STEPS, SCORE_STEPS), "flow": (SCORE_STEPS, FLOW_STEPS)}[family]
    steps = f"method.student_timesteps={list(given)}"
    lists = [f"method.{name}_timesteps=[{given[0]}]" for name in LISTS]
    said = rf"{family} teacher, whose four steps are {re.escape(str(own))}"
    with pytest.raises(UserError, match=said):
        run.train(recipe(folders, tmp_path / "run", family, steps, *lists), progress=quiet)
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_does_not_wait() -> None:
    import os
    import signal

    with stoppable() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_sampler_without_noise_draws_the_same_however_many_at_once(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each starting noise is its prompt's own. One that draws noise at every step, as the shipped
    teachers and students do, draws it for all that stand together, and this shows nothing of it.
    """
    arm = Arm(load_teacher(str(folders["teacher"])), 2, 3.0)
    together = arm.draw(["a cat", "a dog", "a tree"], 5)
    monkeypatch.setattr(drawing, "DRAWN_AT_ONCE", 2)
    apart = arm.draw(["a cat", "a dog", "a tree"], 5)
    assert np.abs(together.astype(int) - apart).max() <= 1


def test_a_finished_run_is_left_as_it_is(
    finished: Path, folders: dict[str, Path], family: str
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.glob("checkpoint-*/*")}
    timing = (finished / "timing.json").read_text()
    run.train(recipe(folders, finished, family), progress=quiet)
    assert {p: p.stat().st_mtime_ns for p in finished.glob("checkpoint-*/*")} == before
    assert (finished / "timing.json").read_text() == timing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["method.student_timesteps=[900, 700, 500, 250]"], "cannot be written as a stock"),
        (["method.student_timesteps=[1001, 750, 500, 250]"], "student_timesteps"),
        ([OTHER_REWARD], "8 channels .* teacher's have 4"),
        ([OTHER_REWARD, "train.joint_train_steps=0"], "8 channels .* teacher's have 4"),
    ],
)
def test_what_would_fail_at_the_end_is_said_at_the_start(
    folders: dict[str, Path], family: str, tmp_path: Path, changes: list[str], said: str
) -> None:
    steps = ["matching", "adversarial", "preference"]
    if "student_timesteps" in changes[0]:
        more = [f"method.{k}_timesteps=[{v}]" for k, v in zip(steps, (500, 250, 500), strict=True)]
    else:
        more = []
    with pytest.raises(UserError, match=said):
        run.train(recipe(folders, tmp_path / "run", family, *more, *changes), progress=quiet)
    assert not (tmp_path / "run").exists()


def test_an_iteration_is_given_what_its_updates_need(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    session = open_session(recipe(folders, tmp_path, family, "train.preference_batch_size=3"))
    batches = session.trainer("joint").batches
    preference = batches(0, ("preference",))
    assert len(preference.noise) == 3
    assert {len(v) for v in (preference.cond | preference.reward_cond).values()} == {3}
    assert preference.real is preference.real_latents is None
    assert preference.reward_cond
    distilling = batches(0, ("generator", "score", "discriminator"))
    assert len(distilling.noise) == 2
    assert distilling.real is not None
    assert distilling.real.shape == (2, 3, 64, 64)
    assert not distilling.reward_cond
    earlier = session.trainer("distill").batches(0, ("score", "discriminator"))
    assert not torch.equal(earlier.real, distilling.real)


def test_dmd2_runs_on_the_same_teacher(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    more = ["train.arm=dmd2", "train.joint_train_steps=0", "train.max_train_steps=1"]
    output = run.train(recipe(folders, tmp_path / "run", family, *more), progress=quiet)
    records = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 5
    assert sum("matching" in r for r in records) == 1
    assert all({"diffusion", "logistic"} <= r.keys() for r in records)


def test_a_run_of_rl_alone_is_called_so(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    from flashdmd import report

    more = ["train.stage2=rl", "train.joint_train_steps=1", "train.max_train_steps=1"]
    output = run.train(recipe(folders, tmp_path / "run", family, *more), progress=quiet)
    run.measure(recipe(folders, tmp_path / "run", family, *more))
    rows = json.loads((output / "metrics.json").read_text())["rows"]
    assert [r["arm"] for r in rows][2:] == ["student-stage1", "student-rl"]
    page = report.write(output).read_text()
    assert "Student after RL alone" in page
    assert "has not run" not in page
    assert "no figures from before and after" not in page


def test_the_table_and_the_report_are_written(
    finished: Path, folders: dict[str, Path], family: str
) -> None:
    from flashdmd import report

    run.measure(recipe(folders, finished, family))
    result = json.loads((finished / "metrics.json").read_text())
    arms = ["teacher-5", "teacher-4", "student-stage1", "student-joint"]
    assert [r["arm"] for r in result["rows"]] == arms
    assert [r["nfe"] for r in result["rows"]] == [10, 8, 4, 4]
    assert all(np.isfinite(r["kid"]) and np.isfinite(r["reward"]) for r in result["rows"])
    page = report.write(finished).read_text()
    assert "student-joint" in page or "joint" in page
    picture = np.asarray(Image.open(finished / "samples/teacher-4/00.png"))
    assert picture.shape == (64, 64, 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["score"], indirect=True)  # of either the arms are the same
def test_every_arm_stands_in_one_table(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    changes = ["train.max_train_steps=5", "validation.teacher_steps=2"]
    base = recipe(folders, tmp_path, family, *changes)
    written = compare.compare(base, [0, 1], ["flash-dmd", "rl", "dmd2"], tmp_path)
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    of = {(r["arm"], r.get("seed")): r for r in rows}
    assert {name for name, _ in of} == {
        "real pictures", "teacher, 2 steps", "teacher, 4 steps",
        compare.STAGE_1, compare.JOINT, compare.RL, compare.DMD2,
    }  # fmt: skip
    assert of[compare.DMD2, 0]["images"] == of[compare.STAGE_1, 0]["images"] == 20
    assert of[compare.DMD2, 0]["generator_updates"] == 2
    assert of[compare.JOINT, 1]["generator_updates"] == 6
    counted = ("images", "generator_updates", "preference_updates")
    assert [of[compare.RL, 0][k] for k in counted] == [20, 5, 5]
    assert [of[compare.JOINT, 0][k] for k in counted] == [24, 6, 5]
    for arm in (compare.STAGE_1, "teacher, 4 steps"):  # noise is drawn by the seed, for all
        assert of[arm, 0]["kid"] != of[arm, 1]["kid"]
    start, end = tmp_path / "seed-0/flash-dmd/student-stage1", tmp_path / "seed-0/rl/student"
    before, after = (weights(p.parent, p.name) for p in (start, end))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    first = weights(tmp_path / "seed-0/rl", "student-stage1")
    assert all(torch.equal(before[k], first[k]) for k in before)
    updates = (tmp_path / "seed-0/rl/metrics.jsonl").read_text().splitlines()
    assert len(updates) == 5
    assert written.read_text().count("\n") == 2 + 7


def test_sampling_from_the_command_line(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    command = [
        sys.executable,
        "-m",
        "flashdmd",
        "sample",
        str(finished / "student"),
        "a cat",
        "a dog",
    ]
    done = subprocess.run([*command, "--output", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size[0] > 128
    wrong = subprocess.run([*command, "--steps", "7"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--steps 4" in wrong.stderr
    assert "Traceback" not in wrong.stderr
