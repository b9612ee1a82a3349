"""A checkpoint is whole or it is not gone on from; nothing that is damaged is lost or believed."""

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import kills
import pytest
import torch
from faults import Lost, contents, lost_files
from torch import nn

from flashdmd import checkpoint, config, files, resuming, run
from flashdmd.checkpoint import MANIFEST, damage, latest, prune
from flashdmd.config import Recipe
from flashdmd.errors import UserError
from flashdmd.files import alone_in, mend_all, remove_folder, replace_folder
from flashdmd.session import cut_log


def write(folder: Path, value: float = 0.0, **about: object) -> Path:
    network = nn.Linear(3, 2)
    nn.init.constant_(network.weight, value)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(folder, {"net": network}, {"net": optimizer}, {"step": 1}, dict(about))
    return folder


def flip(path: Path) -> None:
    """One bit in the middle, as many bytes as before."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda p: flip(p / "net.safetensors"), r"net\.safetensors is not what was written"),
    "moments": (lambda p: flip(p / "net.optimizer.safetensors"), r"net\.optimizer\.safetensors is"),
    "state": (lambda p: flip(p / "state.json"), r"state\.json is not what was written"),
    "torn": (lambda p: os.truncate(p / "net.safetensors", 9), "has 9 bytes, [0-9]+ were written"),
    "gone": (lambda p: (p / "net.safetensors").unlink(), r"net\.safetensors is missing"),
    "none": (lambda p: (p / MANIFEST).unlink(), r"it has no manifest\.json"),
    "half": (lambda p: os.truncate(p / MANIFEST, 30), r"manifest\.json cannot be read"),
    "a list": (lambda p: (p / MANIFEST).write_text("[1]"), r"manifest\.json cannot be read"),
    "later": (lambda p: edit(p / MANIFEST, lambda m: m.update(format=2)), "of format 2, known"),
    "empty": (lambda p: edit(p / MANIFEST, lambda m: m["files"].clear()), "does not tell of state"),
}


OF_FILES, OF_MANIFEST = list(DAMAGES)[:5], list(DAMAGES)[5:]
FILE = pytest.mark.fault(
    "checkpoint: a file is damaged", "a bit of weights, of moments, of state.json; cut off; gone"
)
FORGED = pytest.mark.fault(
    "checkpoint: a damaged or forged manifest", "gone; half; a list; of format 2; of no files"
)


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=FILE) for how in OF_FILES]
    + [pytest.param(how, marks=FORGED) for how in OF_MANIFEST],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: Lost
) -> None:
    hurt, said = DAMAGES[how]
    good, bad = write(tmp_path / "checkpoint-9"), write(tmp_path / "checkpoint-10")
    assert latest(tmp_path) == bad
    assert not caplog.records
    hurt(bad)
    left = contents(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == good
    assert len(caplog.records) == 1
    assert f"{bad} is damaged and passed over: " in caplog.text
    assert caplog.records[0].getMessage().split("over: ")[1] == damage(bad)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(damage(bad))
    lost(lost_files(left, tmp_path), "other files")
    assert contents(tmp_path) == left


def test_where_all_are_damaged_nobody_starts_over(tmp_path: Path) -> None:
    flip(write(tmp_path / "checkpoint-1") / "state.json")
    (write(tmp_path / "checkpoint-2") / MANIFEST).unlink()
    said = (
        r"every checkpoint in .* is damaged:\n  checkpoint-2: it has no manifest\.json\n"
        r"  checkpoint-1: state\.json is not .*\n.* move these away to start over"
    )
    with pytest.raises(UserError, match=said):
        latest(tmp_path)
    assert latest(tmp_path / "elsewhere") is None


def test_what_is_damaged_is_not_counted_and_not_removed(tmp_path: Path) -> None:
    all_ = [write(tmp_path / f"checkpoint-{n}") for n in range(1, 7)]
    for n, hurt in ((1, "a bit"), (3, "none"), (6, "a bit")):
        DAMAGES[hurt][0](all_[n - 1])
    prune(tmp_path, 2)
    assert [p.name.removeprefix("checkpoint-") for p in checkpoint.all_of(tmp_path)] == list(
        "13456"
    )
    prune(tmp_path, 1)
    assert [p.name.removeprefix("checkpoint-") for p in checkpoint.all_of(tmp_path)] == list("1356")
    prune(tmp_path, None)
    assert len(checkpoint.all_of(tmp_path)) == 4


def test_a_damaged_checkpoint_makes_room_for_its_successor_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    for value in (1.0, 2.0, 3.0):
        flip(write(folder, value) / "net.safetensors")
        broken = (folder / "net.safetensors").read_bytes()
        write(folder, 9.0)
        assert damage(folder) is None
        last = max(tmp_path.glob("checkpoint-4.damaged*"), key=lambda p: p.stat().st_mtime_ns)
        assert (last / "net.safetensors").read_bytes() == broken
    names = ["checkpoint-4", *(f"checkpoint-4.damaged{n}" for n in ("", "-2", "-3"))]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert checkpoint.all_of(tmp_path) == [folder]
    write(folder, 5.0)  # of one that is whole nothing is left
    assert len(list(tmp_path.iterdir())) == 4


def test_a_network_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Also of one that would broadcast."""
    checkpoint.save(tmp_path / "checkpoint-1", {"net": nn.Linear(1, 1)}, {}, {})
    with pytest.raises(UserError, match="net is of another network"):
        checkpoint.load(tmp_path / "checkpoint-1", {"net": nn.Linear(3, 2)}, {})


def test_what_a_kill_set_aside_is_put_back_and_its_rest_is_cleared(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.retired-77")
    (tmp_path / ".checkpoint-3.writing-77").mkdir()
    (tmp_path / "student").mkdir()
    for name in (".student.retired-5-7e", ".checkpoint-8.writing-6", ".checkpoint-1.removing-6"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    (tmp_path / ".data.writing-7-0a9f.json").write_text("")
    (tmp_path / ".lock").write_text("")
    mend_all(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "student", ".lock"}
    assert latest(tmp_path) == tmp_path / "checkpoint-3"
    assert not list((tmp_path / "student").iterdir())


def killed(work: Callable[[], object], when: Callable[[], bool]) -> bool:
    """Whether a process that does `work` was killed at the moment of `when`."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    while not when():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1")
    for i in range(3000):
        (folder / f"{i}").write_text("")
    hidden = tmp_path / ".checkpoint-1.removing-*"
    assert killed(lambda: remove_folder(folder), lambda: bool(list(tmp_path.glob(hidden.name))))
    assert not checkpoint.all_of(tmp_path)
    mend_all(tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_and_names_are_on_the_disk_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and the folder before it takes its name; after that, the name."""
    seen: list[tuple[str, bool]] = []
    folder = tmp_path / "checkpoint-1"
    real = os.fsync

    def watched(opened: int) -> None:
        seen.append((Path(os.readlink(f"/proc/self/fd/{opened}")).name, folder.exists()))
        real(opened)

    monkeypatch.setattr(files.os, "fsync", watched)
    write(folder)
    before = {name for name, there in seen if not there}
    assert before >= {p.name for p in folder.iterdir()}
    assert any(name.startswith(".checkpoint-1.writing-") for name in before)
    assert [name for name, there in seen if there] == [tmp_path.name]


def test_a_folder_that_nothing_was_written_to_does_not_stay(tmp_path: Path) -> None:
    with pytest.raises(UserError), alone_in(tmp_path / "around/new"):
        raise UserError("before anything")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    with alone_in(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()
    with alone_in(tmp_path / "used"):
        (tmp_path / "used/file").write_text("")
    assert (tmp_path / "used/file").is_file()


LINES = [("distill", 1), ("distill", 2), ("distill", 3), ("joint", 1), ("joint", 2)]


@pytest.mark.parametrize(
    ("stage", "iteration", "left"),
    [("distill", 0, 0), ("distill", 2, 2), ("distill", 3, 3), ("joint", 1, 4), ("joint", 2, 5)],
)
def test_the_log_ends_where_the_checkpoint_stands(
    stage: str, iteration: int, left: int, tmp_path: Path
) -> None:
    lines = [json.dumps({"stage": s, "iteration": n}) + "\n" for s, n in LINES]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(lines) + '{"stage": "joint", "iter')
    cut_log(log, stage, iteration)
    assert log.read_text() == "".join(lines[:left])


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    cut_log(tmp_path / "metrics.jsonl", "distill", 0)
    assert not list(tmp_path.iterdir())


def test_hashing_again_costs_nothing_and_misses_nothing(tmp_path: Path) -> None:
    """A file that was hashed is known by its inode, size and time, also under another name."""
    folder = write(tmp_path / "checkpoint-1")
    missed = checkpoint.sha256.cache_info().misses
    shutil.move(folder, tmp_path / "checkpoint-2")
    assert damage(tmp_path / "checkpoint-2") is None
    assert checkpoint.sha256.cache_info().misses == missed
    time.sleep(0.01)
    flip(tmp_path / "checkpoint-2/net.safetensors")
    assert damage(tmp_path / "checkpoint-2") is not None


def test_a_process_killed_while_it_writes_leaves_the_older_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1")

    def work() -> None:
        with replace_folder(folder) as beside:
            (beside / "a").write_text("")
            time.sleep(60)

    assert killed(work, lambda: bool(list(tmp_path.glob(".checkpoint-1.writing-*/a"))))
    mend_all(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert latest(tmp_path) == folder


def recipe_in(folder: Path, *changes: str) -> Recipe:
    return config.read("emoji-score", list(changes), folder)


def test_what_a_run_goes_on_with_is_said_key_by_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files.write_text(tmp_path / "recipe.yaml", config.dump(recipe_in(tmp_path)))
    assert not resuming.check_same(recipe_in(tmp_path))
    assert not caplog.records
    fine = [
        "train.learning_rate=1e-5", "train.gradient_accumulation_steps=2", "train.device=cpu",
        "train.gradient_checkpointing=true", "train.max_train_steps=200",
    ]  # fmt: skip
    assert resuming.check_same(recipe_in(tmp_path, *fine)) == {x.partition("=")[0] for x in fine}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(fine)
    assert "train.learning_rate: was 0.0001, is 1e-05: the run goes on with it" in said
    caplog.clear()
    other = ["train.train_batch_size=16", "method.beta=400", "train.learning_rate=1e-5"]
    with pytest.raises(UserError) as caught:
        resuming.check_same(recipe_in(tmp_path, *other))
    assert str(caught.value).splitlines()[1:6] == [
        "  method.beta: was 500.0, is 400.0",
        "  train.train_batch_size: was 32, is 16",
        "with these it would go on:",
        "  train.learning_rate: was 0.0001, is 1e-05",
        "give another output_dir, or start over in this one: --no-resume of `flashdmd train`",
    ]
    assert not caplog.records


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("finished")
    short = ["train.max_train_steps=1", "train.gan_calibration_steps=[0,1]"]
    short += ["train.checkpointing_steps=0"]  # only where a stage ends
    parts = kills.ingredients(folder / "parts")
    recipe = kills.recipe_of("both stages", parts, folder / "run", *short)
    run.train(recipe, progress=quiet)
    return recipe


def quiet(*_: object) -> None:
    pass


def test_stage_2_is_not_gone_on_with_without_its_reference_or_with_another(
    finished: Recipe,
) -> None:
    output = Path(finished.output_dir)
    first, last = output / "student-stage1", output / "student"
    first.rename(output / "aside")
    with pytest.raises(UserError, match=f"held to the student of stage 1, and {first} is not"):
        run.train(finished, progress=quiet)
    shutil.copytree(last, first)
    with pytest.raises(UserError, match=f"{first} is another one than it was"):
        run.train(finished, progress=quiet)
    shutil.rmtree(first)
    (output / "aside").rename(first)
    before = (last / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    run.train(finished, progress=quiet)
    assert (last / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_checkpoint_says_what_it_is_of(finished: Recipe) -> None:
    newest = latest(Path(finished.output_dir))
    assert newest is not None
    about = checkpoint.state_of(newest)["about"]
    assert Recipe.model_validate(about["recipe"]) == finished
    assert about["versions"] == json.loads((newest.parent / "versions.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    suffixes = {path.suffix for path in newest.iterdir()}
    assert suffixes == {".safetensors", ".json"}


def test_a_damaged_checkpoint_is_gone_past_and_the_run_ends_the_same(
    finished: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    output = Path(finished.output_dir)
    newest = latest(output)
    assert newest is not None
    before = {p.name: p.read_bytes() for p in newest.iterdir()}
    flip(newest / "score.safetensors")
    run.train(finished, progress=quiet)
    assert f"{newest} is damaged and passed over: score.safetensors is" in caplog.text
    assert {p.name: p.read_bytes() for p in newest.iterdir()} == before
    damaged = output / f"{newest.name}.damaged"
    assert (damaged / "score.safetensors").read_bytes() != before["score.safetensors"]
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2 + 2 * 4


def test_the_newest_checkpoint_is_read_by_who_is_alone(finished: Recipe) -> None:
    """Else it may be one that another process is about to prune."""
    output = Path(finished.output_dir)
    there = [(p, p / "state.json") for p in checkpoint.all_of(output)]
    for _, state in there:
        state.rename(state.with_name("aside"))
    try:
        with alone_in(output), pytest.raises(UserError, match="another process"):
            run.train(finished, progress=quiet)
        with pytest.raises(UserError, match="every checkpoint in"):
            run.train(finished, progress=quiet)
    finally:
        for folder, state in there:
            (folder / "aside").rename(state)


def test_where_the_recipe_is_gone_the_checkpoints_is_compared(tmp_path: Path) -> None:
    about = {"recipe": json.loads(recipe_in(tmp_path).model_dump_json())}
    counts = {"stage": "distill", "iteration": 1, "updates": {}, "before": {}}
    checkpoint.save(tmp_path / "checkpoint-1", {}, {}, counts, about)
    point = tmp_path / "checkpoint-1"
    assert resuming.check_same(recipe_in(tmp_path, "train.device=cpu"), point) == {"train.device"}
    with pytest.raises(UserError, match=r"train.seed: was 0, is 1"):
        resuming.check_same(recipe_in(tmp_path, "train.seed=1"), point)


def test_a_checkpoint_on_another_disk_is_pruned_as_a_link(tmp_path: Path) -> None:
    """What it points to is somebody's; what only looks like a checkpoint is nobody's of ours."""
    run, kept = tmp_path / "run", write(tmp_path / "elsewhere")
    run.mkdir()
    (run / "checkpoint-\u00b2").mkdir()
    (run / "checkpoint-1").symlink_to(kept)
    (run / ".checkpoint-0.removing-1-abc").symlink_to(kept)
    newest = write(run / "checkpoint-2")
    mend_all(run)
    checkpoint.prune(run, 1)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-2", "checkpoint-\u00b2"]
    assert checkpoint.damage(newest) is None
    assert checkpoint.damage(kept) is None


def test_what_decides_the_data_may_not_change(tmp_path: Path) -> None:
    """The steps of the teacher that draws the pictures, where it draws them."""
    for name, refused in (("emoji", False), ("teacher", True)):
        here = (f"data.train_data_dir={name}", "data.prompts=prompts.txt")
        files.write_text(tmp_path / "recipe.yaml", config.dump(recipe_in(tmp_path, *here)))
        now = recipe_in(tmp_path, *here, "validation.teacher_steps=7")
        if refused:
            with pytest.raises(UserError, match="teacher_steps: was 50, is 7"):
                resuming.check_same(now)
        else:
            resuming.check_same(now)


def test_what_a_kill_left_to_prune_is_pruned_at_the_start(finished: Recipe) -> None:
    """Also where nothing is saved any more, as after the last checkpoint."""
    output = Path(finished.output_dir)
    before = checkpoint.all_of(output)
    assert len(before) == finished.train.checkpoints_total_limit == 2
    shutil.copytree(before[0], output / "checkpoint-1")
    run.train(finished, progress=quiet)
    assert checkpoint.all_of(output) == before
