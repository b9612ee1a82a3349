"""The command line on a model of one's own: a recipe is written, doctored, run, exported."""

import json
from pathlib import Path

import pytest
import tiny_data
import tiny_export
import yaml
from diffusers import DiffusionPipeline
from safetensors import safe_open

from flashdmd import cli

PROMPTS = [f"{i} red apples" for i in range(1, 10)]
SMALL = (
    "discriminator.backbone=efficientnet-lite0",
    "discriminator.width=8",
    "data.resolution=32",
    "data.teacher_samples=8",
    "lora.rank=4",
    "method.gan_gradient_ratio=null",
    "train.max_train_steps=1",
    "train.train_batch_size=2",
    "train.preference_batch_size=2",
    "train.gradient_accumulation_steps=2",
    "train.gradient_checkpointing=false",  # EfficientNet has none
    "validation.teacher_steps=2",
    "validation.num_prompts=8",
)


def command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["flashdmd", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return int(caught.value.code or 0)


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its recipe, prompts and the finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_export.pipeline(request.param).save_pretrained(folder / "teacher")
    recipe = folder / "recipe.yaml"
    assert command("config", "init", str(folder / "teacher"), "--output", str(recipe)) == 0
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    more = (f"data.prompts={folder / 'prompts.txt'}", f"output_dir={folder / 'run'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("train", str(recipe), *SMALL, *more) == 0
        before = (folder / "run/metrics.jsonl").read_text()
        assert command("train", str(recipe), *SMALL, *more) == 0  # finished: measured again
        assert (folder / "run/metrics.jsonl").read_text() == before
    return folder


def test_the_recipe_that_is_written_is_whole_and_right_for_its_family(trained: Path) -> None:
    text = (trained / "recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    flow = trained.name.startswith("flux")
    assert recipe["method"]["student_timesteps"][0] == (1000 if flow else 999)
    assert recipe["method"]["teacher_guidance_scale"] == (3.5 if flow else 8.0)
    assert recipe["method"]["score_times"] == ("logit_normal" if flow else "uniform")
    assert recipe["train"]["train_batch_size"] == (32 if flow else 64)
    assert recipe["lora"]["rank"] == 64
    assert "# GENERATOR updates" in text
    assert "null keeps all" in text  # YAML's word
    resolved = yaml.safe_load((trained / "run/recipe.yaml").read_text())
    assert {s: set(v) for s, v in recipe.items() if isinstance(v, dict)} == {
        s: set(v) for s, v in resolved.items() if isinstance(v, dict)
    }


def test_the_report_says_that_there_are_no_real_pictures(trained: Path) -> None:
    page = (trained / "run/report.html").read_text()
    assert "8 samples of the teacher for 8 prompts" in page
    assert "trained on 9 prompts" in page
    rows = json.loads((trained / "run/metrics.json").read_text())["rows"]
    assert [r["arm"] for r in rows] == ["teacher-2", "teacher-4", "student-stage1"]
    calls = (2, 4) if trained.name.startswith("flux") else (4, 8)  # FLUX is told its guidance
    assert tuple(r["nfe"] for r in rows) == (*calls, 4)
    assert all(r["retrieval"] is None and r["diversity"] > 0 for r in rows)


def test_a_student_is_drawn_with_and_exported(trained: Path, tmp_path: Path) -> None:
    student = str(trained / "run/student")
    sheet = tmp_path / "sheet.png"
    assert command("sample", student, PROMPTS[0], "--output", str(sheet)) == 0
    assert sheet.stat().st_size > 500
    run = str(trained / "run")
    assert command("export", run, "--output", str(tmp_path / "whole")) == 0
    DiffusionPipeline.from_pretrained(tmp_path / "whole")
    for form in ("lora", "comfyui", "single-file"):
        path = tmp_path / f"{form}.safetensors"
        assert command("export", run, "--format", form, "--output", str(path)) == 0
        with safe_open(path, "pt") as file:
            assert list(file.keys())
    assert command("export", run, "--format", "gguf", "--output", str(tmp_path / "x")) == 2


def test_the_doctor_reads_the_recipe(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = "discriminator.backbone=efficientnet-lite0"
    recipe = str(trained / "recipe.yaml")
    assert command("doctor", recipe, plain, "data.resolution=32", "discriminator.crop=null") == 0
    said = capsys.readouterr().out
    assert "base and teacher" in said
    assert "GB:" in said


def test_evaluate_judges_by_the_embedded_emoji_alone(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", str(trained / "run/student")) == 2
    assert "judges by the embedded emoji" in capsys.readouterr().err


def test_a_folder_that_is_no_pipeline_gets_no_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_data.pictures(tmp_path / "pictures", (8, 8))
    out = tmp_path / "recipe.yaml"
    assert command("config", "init", str(tmp_path / "pictures"), "--output", str(out)) == 2
    assert "has no model_index.json" in capsys.readouterr().err
    assert not out.exists()
