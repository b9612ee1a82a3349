"""The command line from end to end on real kinds of models at tiny size: a recipe for a folder,
trained on prompts alone, measured, drawn with, exported, asked about.
"""

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import tiny_export
import torch
from PIL import Image
from safetensors.torch import load_file
from test_report import Page

from flashdmd import cli, config, export, report
from flashdmd.data import open_data
from flashdmd.drawing import Arm
from flashdmd.loading import load_teacher
from flashdmd.models.lora_keys import FILE_NAME as LORA
from flashdmd.models.lora_keys import merge
from flashdmd.sources import described

SIDE = 2 * tiny_export.SIDE  # pixels; half of what the networks were made for
PROMPTS = [f"{caption} {i}" for i in range(3) for caption in tiny_data.CAPTIONS]
BACKBONE = {"sdxl": "efficientnet-lite0", "flux": "sam"}
SIZES = (
    "lora.rank=4",
    f"data.resolution={SIDE}",
    "data.teacher_samples=8",
    "train.train_batch_size=2",
    "train.preference_batch_size=2",
    "train.gradient_accumulation_steps=2",
    "train.max_train_steps=1",
    "train.gan_calibration_steps=[0, 1]",
    "validation.num_prompts=8",
    "validation.teacher_steps=2",
)


def flashdmd(folder: Path, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that is given in `folder`."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr("sys.argv", ["flashdmd", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return int(caught.value.code or 0), out.getvalue(), err.getvalue()


def done(folder: Path, *words: str) -> str:
    """What a command that succeeds says."""
    code, out, err = flashdmd(folder, *words)
    assert code == 0, err
    return out


@pytest.fixture(scope="module", params=BACKBONE)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a model was given, and these commands."""
    folder = tmp_path_factory.mktemp(kind)
    tiny_export.pipeline(kind).save_pretrained(folder / "model")
    tiny_data.sam(folder / "sam")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    assert "Wrote recipe.yaml" in done(folder, "config", "init", "model")
    assert "Report: runs/model/report.html" in train(folder, kind)
    return folder


def given(kind: str, *more: str) -> tuple[str, ...]:
    return (f"discriminator.backbone={BACKBONE[kind]}", *SIZES, *more)


def train(folder: Path, kind: str) -> str:
    return done(folder, "train", "recipe.yaml", *given(kind))


def test_a_recipe_for_a_folder_is_of_its_family(trained: Path, kind: str) -> None:
    recipe = config.load(trained / "recipe.yaml", [])
    flow = kind == "flux"
    assert recipe.method.student_timesteps == (
        (1000, 750, 500, 250) if flow else (999, 749, 499, 249)
    )
    assert recipe.method.teacher_guidance_scale == (3.5 if flow else 8)
    assert recipe.data.train_data_dir == "teacher"
    assert recipe.lora.rank == 64
    code, _, err = flashdmd(trained, "config", "init", "model")
    assert code == 2
    assert "recipe.yaml is there already" in err


def test_it_is_trained_on_the_teachers_own_samples_and_measured_by_them(trained: Path) -> None:
    output = trained / "runs/model"
    (pool,) = (output / "cache").glob("teacher-*")
    samples = [np.asarray(Image.open(p)) for p in sorted(pool.glob("*.png"))]
    assert [s.shape for s in samples] == [(SIDE, SIDE, 3)] * 8
    metrics = json.loads((output / "metrics.json").read_text())
    rows = {row["arm"]: row for row in metrics["rows"]}
    assert list(rows) == ["teacher-2", "teacher-4", "student-stage1"]
    assert all(np.isfinite([row["kid"], row["diversity"]]).all() for row in rows.values())
    assert all(row["retrieval"] is row["reward"] is None for row in rows.values())
    assert metrics["fingerprint"]["metric"].endswith("to samples of the teacher")
    adapter = load_file(output / "student" / LORA)
    assert any(v.abs().max() > 0 for k, v in adapter.items() if "lora_B" in k)
    drawn = sorted((output / "samples/student-stage1").glob("*.png"))
    assert len(drawn) == 8
    assert np.asarray(Image.open(drawn[0])).shape == (SIDE, SIDE, 3)


def test_the_report_says_that_the_real_pictures_are_the_teachers(trained: Path) -> None:
    told = json.loads((trained / "runs/model/data.json").read_text())
    page = Page(trained / "runs/model/report.html").text
    assert "There are no real pictures: the discriminator's are 8 samples of the teacher" in page
    assert "cannot become better than these" in told["caveat"]
    assert told["caveat"] in page
    assert told["counts"]["used"] == told["counts"]["total"] == 8
    assert "8 of 8 pictures are used" in page
    assert "data.json is not there" not in page


@pytest.mark.parametrize("kind", ["sdxl"], indirect=True)  # measuring again takes the time
def test_the_same_command_on_a_finished_run_trains_nothing(trained: Path, kind: str) -> None:
    output = trained / "runs/model"

    def state() -> dict[str, Any]:
        kept = [*output.glob("checkpoint-*/*"), *output.glob("cache/*/*")]
        rows = json.loads((output / "metrics.json").read_text())["rows"]
        return {
            "files": {p: p.stat().st_mtime_ns for p in kept},
            "figures": [{k: v for k, v in r.items() if "seconds" not in k} for r in rows],
            "log": (output / "metrics.jsonl").read_text(),
            "data": (output / "data.json").read_text(),
        }

    before, student = state(), load_file(output / "student" / LORA)
    assert len(before["files"]) > 8 + 8  # samples of the teacher, and a checkpoint
    assert "Report: runs/model/report.html" in train(trained, kind)
    assert state() == before
    again = load_file(output / "student" / LORA)
    assert all(torch.equal(again[name], student[name]) for name in student)
    words = given(kind, "train.learning_rate=1e-3")
    code, _, err = flashdmd(trained, "train", "recipe.yaml", *words)
    assert code == 2
    assert "is finished, so train.learning_rate would change nothing" in err


def test_a_student_is_drawn_with_as_its_card_says(trained: Path, kind: str) -> None:
    done(trained, "sample", "runs/model/student", "a cat", "a dog", "--output", "sheet.png")
    sheet = np.asarray(Image.open(trained / "sheet.png").convert("RGB"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        student = load_teacher("runs/model/student")
    card = (trained / "runs/model/student/README.md").read_text()
    guidance = re.search(r"guidance_scale=([\d.]+)", card)
    assert guidance
    assert float(guidance[1]) == (3.5 if kind == "flux" else 0)
    first, second = Arm(student, 4, float(guidance[1])).draw(["a cat", "a dog"], 0)
    assert (sheet[:SIDE, :SIDE] == first.transpose(1, 2, 0)).all()
    assert (sheet[:SIDE, -SIDE:] == second.transpose(1, 2, 0)).all()
    assert (first != second).any()


def test_it_is_exported_in_every_format(trained: Path, kind: str) -> None:
    for form in ("diffusers", "lora", "comfyui", "single-file"):
        name = f"out/{form}" + ("" if form in ("diffusers", "lora") else ".safetensors")
        said = done(trained, "export", "runs/model", "--format", form, "--output", name)
        assert f"Wrote {name}" in said
    base, student = (networks_of(trained / name) for name in ("model", "out/diffusers"))
    adapter = load_file(trained / "out/lora" / LORA)
    merged = merge(base, {k.partition(".")[2]: v for k, v in adapter.items()})
    assert max((student[name] - base[name]).abs().max() for name in base) > 2e-7
    for name, weight in student.items():
        torch.testing.assert_close(weight, merged[name], atol=2e-8, rtol=0)
    comfy = load_file(trained / "out/comfyui.safetensors")
    assert sum(map(torch.numel, comfy.values())) >= sum(map(torch.numel, adapter.values()))
    single = load_file(trained / "out/single-file.safetensors")
    moved = [v.numel() for k, v in single.items() if k.startswith("model.diffusion_model.")]
    assert sum(moved) == sum(map(torch.numel, student.values()))
    notes = export.notes_of(trained / "out/diffusers")
    assert notes
    assert (notes.rank, notes.resolution) == (0, SIDE)
    assert load_teacher(str(trained / "out/diffusers")).image_size == SIDE


def networks_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a pipeline's denoising network."""
    files = folder.glob("*/*.safetensors")
    (path,) = (p for p in files if p.parent.name in ("unet", "transformer"))
    return load_file(path)


@pytest.mark.parametrize("kind", ["flux"], indirect=True)  # it is slow to think of changes
def test_the_doctor_knows_what_it_will_take(trained: Path, kind: str) -> None:
    said = done(trained, "doctor", "recipe.yaml", *given(kind))
    assert said.startswith("model, LoRA")
    assert re.search(r"\d MB", said) or re.search(r"\d\.\d+ GB", said)


def test_the_judge_of_emoji_is_not_asked_about_other_pictures(trained: Path) -> None:
    for model in ("runs/model/student", "out/diffusers", "emoji-score"):
        words = ["evaluate", model, "--num-prompts", "8", "--reward", "none", "--output", "e.json"]
        if model == "emoji-score":
            words.insert(1, "runs/model/student")
        code, _, err = flashdmd(trained, *words)
        assert code == 2
        assert f"draws pictures of {SIDE} pixels, and the judge" in err
        assert "see metrics.json and report.html" in err
        assert not (trained / "e.json").exists()


def test_what_was_left_out_of_the_pictures_is_told(tmp_path: Path) -> None:
    tiny_data.pictures(tmp_path / "pictures", (40, 40), 110)
    tiny_data.pictures(tmp_path / "pictures", (20, 20), 3)
    (tmp_path / "pictures/40x40-7.png").write_bytes(b"no picture")
    told = described(open_data(tmp_path / "pictures", 32), "")
    counts = {"total": 113, "used": 112, "broken": 1, "upscaled": 3, "without_caption": 0}
    assert told["counts"].items() >= counts.items()
    (tmp_path / "data.json").write_text(json.dumps(told))
    page = Page(report.write(tmp_path)).text
    assert "112 of 113 pictures are used; 1 broken; 3 smaller than they are wanted" in page
    assert "Left out: 1 broken (40x40-7.png: not a picture)." in page
    assert "not real" not in page


@pytest.mark.parametrize("model", ["nothing", "missing", "other"])
def test_what_is_no_model_gets_no_recipe(model: str, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    code, _, err = flashdmd(tmp_path, "config", "init", model)
    assert code == 2
    wanted = {
        "nothing": "'nothing' has no model_index.json; give a diffusers pipeline folder",
        "missing": "'missing' is not a folder; give a diffusers pipeline folder",
        "other": "other is a AudioLDMPipeline; supported are StableDiffusionPipeline",
    }
    assert wanted[model] in err
    assert "Traceback" not in err
    assert not (tmp_path / "recipe.yaml").exists()
