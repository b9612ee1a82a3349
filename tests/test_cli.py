"""The command line as a person meets it: messages, exit codes, no traceback."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdmd import cli
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import Interrupted, UserError
from flashdmd.files import replace_folder, write_text


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["flashdmd", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train", "emoji-score", "method.ttr=3"], "did you mean method.ttur"),
        (["train", "emoji-score", "method.student_timesteps=[1,2]"], "strictly decreasing"),
        (["config", "show", "emoji-score", "train.seed=x"], "train.seed='x'"),
        (["demo", "--family", "gan"], "there are 'score' and 'flow'"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["sample", "nowhere", "a cat"], "is not a folder"),
        (["evaluate", "nowhere"], "is not a folder"),
        (["emoji", "teacher", "--family", "gan"], "there are 'score' and 'flow'"),
        (["emoji", "teacher", "--start", "nowhere"], "give a folder with model_index.json"),
        (["emoji", "reward", "--start", "nowhere"], "give a folder with model_index.json"),
        (["sample", "emoji-score", "a cat", "--output", "cat"], "ends in .png"),
        (["sample", "emoji-score", "a cat", "--guidance", "1e300"], "less than or equal to 1000"),
        (["evaluate", "emoji-score", "--guidance", "inf"], "less than or equal to 1000"),
        (["evaluate", "emoji-score", "--reward", ""], "an argument is empty"),
        (["train", "emoji-score", "--output-dir="], "an argument is empty"),
        (["export", "", "--output", "x"], "an argument is empty"),
        (["nonsense"], "No such command 'nonsense'. See --help"),
        (["sample", "emoji-score", "a cat", "--output", "."], "ends in .png"),
        (["evaluate", "emoji-score", "--output", "."], "is a folder; name a file"),
        (
            ["compare", "emoji-score", "train.max_train_steps=0", "train.joint_train_steps=15"],
            "starts with stage 1",
        ),
        (
            ["emoji", "teacher", "--tutor", "nowhere"],
            "--tutor nowhere: give the folder",
        ),
        (["train", "emoji-score", "train.seed=9" + 30 * "9"], "train.seed=9"),
        (["train", "emoji-score", "train.max_grad_norm=.inf"], "finite"),
        (["train", "emoji-score", "method.beta=.nan"], "finite"),
        (["train", "emoji-score", "method.teacher_guidance_scale=0"], "must be 1 (no guidance)"),
        (["train", "emoji-score", "validation.teacher_steps=5000"], "teacher_steps=5000"),
        (["train", "emoji-score", "train.max_iter=5"], "generator updates, one in method.ttur"),
    ],
)
def test_what_a_person_can_mend_exits_with_2(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("flashdmd: ")
    assert "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_a_broken_model_and_an_empty_prompt_file_are_named_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    words = ["train", "emoji-score", "model.pretrained_model_name_or_path=model"]
    assert call(monkeypatch, *words) == 2
    assert "has no model_index.json" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("\n")
    assert call(monkeypatch, "train", "emoji-score", "data.prompts=prompts.txt") == 2
    assert "prompts.txt is empty" in capsys.readouterr().err


def test_numbers_that_are_not_finite_exit_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object) -> None:
        raise FloatingPointError("iteration 7 of stage distill: {'matching': nan}")

    monkeypatch.setattr("flashdmd.run.full", explode)
    assert call(monkeypatch, "train", "emoji-score") == 2
    assert "iteration 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "told", ["could not create a primitive", "can't start new thread", "CUDA out of memory."]
)
def test_the_words_of_who_gets_no_memory_are_known(told: str) -> None:
    """oneDNN's and Python's say nothing of memory; both were met under RLIMIT_AS."""
    assert cli.out_of_memory(RuntimeError(told))
    assert not cli.out_of_memory(RuntimeError("something else"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_where_nothing_is_saved_says_so(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashdmd.run.full", lambda *_: os.kill(os.getpid(), number))
    assert call(monkeypatch, "train", "emoji-score") == 130
    assert "stopped; what was saved before is intact" in capsys.readouterr().err


def refused() -> None:
    try:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    except OSError as e:
        raise UserError("the reward in x cannot be read; give another") from e


def unimportable() -> None:
    try:
        raise ImportError("libx.so: failed to map segment from shared object")
    except ImportError:
        raise RuntimeError("Failed to import y")  # noqa: B904 - as met


@pytest.mark.parametrize(("ends", "named"), [(refused, "reward in x"), (unimportable, "import y")])
def test_memory_that_is_gone_is_known_behind_other_errors(
    ends: Callable[[], None],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where a reward or a library is opened with a few hundred MiB left."""
    monkeypatch.setattr("flashdmd.run.full", lambda *_: ends())
    assert call(monkeypatch, "train", "emoji-score") == 2
    said = capsys.readouterr().err
    assert "out of memory (" in said
    assert named in said
    assert "doctor RECIPE" in said
    assert not cli.out_of_memory(UserError("prompts in `out of memory.txt` are empty"))


def test_usage_errors_exit_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "train") == 2
    assert call(monkeypatch, "nonsense") == 2
    assert call(monkeypatch, "--version") == 0


def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path) -> None:
    """A real one, where this process may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        with replace_folder(disk / "checkpoint") as beside:
            save_file({"a": torch.zeros(1000)}, beside / "a.safetensors")
        with pytest.raises(OSError) as caught, replace_folder(disk / "checkpoint") as beside:  # noqa: PT011
            save_file({"a": torch.zeros(10**6)}, beside / "a.safetensors")
        assert caught.value.errno == errno.ENOSPC
        assert [p.name for p in disk.iterdir()] == ["checkpoint"]
        assert (disk / "checkpoint/a.safetensors").stat().st_size > 4000
        write_text(disk / "note", "before")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            write_text(disk / "note", "x" * 2 * 10**6)
        assert caught.value.errno == errno.ENOSPC
        assert (disk / "note").read_text() == "before"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_a_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/demo/student")

    monkeypatch.setattr("flashdmd.run.demo", full)
    assert call(monkeypatch, "demo") == 2
    err = capsys.readouterr().err
    assert "No space left on device: runs/demo/student" in err
    assert "intact" in err


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (Interrupted("stopped after 3 updates; saved in runs/a"), 130, "saved in runs/a; {} goes"),
        (FloatingPointError("iteration 3"), 2, "{} with lower learning rates goes on"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "with room, {} goes on"),
    ],
)
@pytest.mark.parametrize("flag", [[], ["--no-resume"]])
def test_who_goes_on_is_not_told_to_start_over(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: Exception,
    code: int,
    said: str,
    flag: list[str],
) -> None:
    def stopped(*_: object) -> None:
        raise stop

    monkeypatch.setattr("flashdmd.run.full", stopped)
    assert call(monkeypatch, "train", "emoji-score", *flag) == code
    again = "the same command, without --no-resume," if flag else "the same command"
    assert said.format(again) in capsys.readouterr().err


def test_a_path_that_cannot_be_is_a_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    (tmp_path / "run" / "metrics.json").mkdir(parents=True)
    for words in (["sample", "emoji-score", "a", "--output", "file/a.png"], ["report", "run"]):
        assert call(monkeypatch, *words) == 2
        err = capsys.readouterr().err
        assert err.startswith("flashdmd: ")
        assert "goes on" not in err


def test_what_a_killed_process_left_is_mended(tmp_path: Path) -> None:
    """Killed between the two renames, and killed while writing."""
    (tmp_path / ".out.retired-1").mkdir()
    (tmp_path / ".out.retired-1" / "a").write_text("old")
    (tmp_path / ".out.writing-1").mkdir()
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_recipe_is_read_without_the_libraries_that_load_models() -> None:
    """diffusers and transformers take seconds to import."""
    code = (
        "import sys; sys.argv = ['flashdmd', 'config', 'show', 'emoji-score']\n"
        "from flashdmd import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print({'diffusers', 'transformers'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "student_timesteps" in out.stdout
    assert out.stdout.endswith("set()\n")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with replace_folder(target) as beside:
        (beside / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    with pytest.raises(FileNotFoundError), replace_folder(target) as beside:
        (tmp_path / "b").rename(beside / "a").rename(beside / "no/where")
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def cut_short(folder: Path, component: str) -> Path:
    """The shipped teacher in `folder`, with half of one component's weights."""
    shutil.copytree(ASSETS / "score", folder)
    (weights,) = (folder / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


@pytest.mark.parametrize(
    ("spoil", "key", "said"),
    [
        (
            lambda given: None,
            "model.student_model_name_or_path",
            "has no unet/diffusion_pytorch_model.safetensors",
        ),
        (
            lambda given: cut_short(given, "unet"),
            "model.student_model_name_or_path",
            "unet/diffusion_pytorch_model.safetensors cannot be read as this network's weights",
        ),
        (
            lambda given: cut_short(given, "unet"),
            "model.pretrained_model_name_or_path",
            "the pipeline in given cannot be loaded",
        ),
        (
            lambda given: cut_short(given, "text_encoder"),
            "model.pretrained_model_name_or_path",
            "the pipeline in given cannot be loaded",
        ),
        (
            lambda given: None,
            "model.reward_model_name_or_path",
            "the reward model in given cannot be read",
        ),
        (
            lambda given: given.write_bytes(b"a cat in a caf\xe9"),
            "data.prompts",
            "the prompt file given is not UTF-8",
        ),
    ],
)
def test_what_a_run_is_given_and_cannot_read_is_named_before_anything_is_written(
    spoil: Callable[[Path], object],
    key: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(Path("given"))
    before = list(tmp_path.iterdir())
    assert call(monkeypatch, "train", "emoji-score", f"{key}=given") == 2
    err = capsys.readouterr().err
    assert said in err
    assert "flashdmd: " in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == before
