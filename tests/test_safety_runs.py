"""A whole small run of a hub id, watched: no network, no secrets in what it leaves or says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_data

SECRETS = {
    name: f"canary-{name.lower()}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}
PASSWORD = "canary-password"
URL = f"https://somebody:{PASSWORD}@models.example/someone/model"
OUTPUTS = ("runs", "exported", "lora", "whole.safetensors", "sample.png", "metrics.json")

LORA = ("train", "recipe.yaml", "lora.rank=4", "data.teacher_samples=8",
        "train.train_batch_size=2", "train.preference_batch_size=2",
        "train.gradient_accumulation_steps=1", "train.max_train_steps=1",
        "train.gan_calibration_steps=[0, 1]", "train.checkpointing_steps=1",
        "discriminator.backbone=acme/sam", "discriminator.width=8", "discriminator.crop=null",
        "validation.num_prompts=8", "validation.teacher_steps=1")  # fmt: skip
GOOD = (
    ("config", "init", "acme/tiny"),
    ("config", "show", "recipe.yaml"),
    ("doctor", "recipe.yaml", "discriminator.backbone=acme/sam", "discriminator.crop=null"),
    LORA,
    ("sample", "runs/tiny/student", "a cat"),
    ("report", "runs/tiny"),
    ("export", "runs/tiny", "--output", "exported"),
    ("export", "runs/tiny", "--output", "lora", "--format", "lora"),
    ("evaluate", "runs/tiny/student", "--reward", "none", "--num-prompts", "8"),
    ("env",),
)
MISSING = {
    "sample": ("sample", "acme/missing", "a cat"),
    "doctor": ("doctor", "recipe.yaml", "model.pretrained_model_name_or_path=acme/missing"),
    "init": ("config", "init", "acme/missing", "--output", "other.yaml"),
    "train": (*LORA, "model.pretrained_model_name_or_path=acme/missing", "output_dir=x"),
    "vae": (*LORA, "model.pretrained_vae_model_name_or_path=acme/missing", "output_dir=x"),
    "lora": (*LORA, "model.teacher_lora=acme/missing", "output_dir=x"),
    "backbone": (*LORA, "discriminator.backbone=acme/missing", "output_dir=x"),
    "reward": (*LORA, "model.reward_model_name_or_path=acme/missing", "output_dir=x"),
    "base": ("import-reward", "none", "--base", "acme/missing", "--output", "y"),
    "evaluate": ("evaluate", "acme/missing", "--num-prompts", "8"),
    "lora beside": (*LORA, "model.teacher_lora=acme/half", "output_dir=x"),
    "half a pipeline": ("sample", "acme/half", "a cat"),
}
SHAPES = {  # of URLs; the last is none
    "at": f"https://somebody:x@{PASSWORD}@models.example/x",
    "slash": f"https://somebody:x/{PASSWORD}@models.example/x",
    "alone": f"somebody:{PASSWORD}@models.example",
    "query": f"https://models.example/x?token={PASSWORD}",
    "token": "hf_canaryPassword",
}
TELLING = {
    **{f"shape {name}": ("sample", url, "a cat") for name, url in SHAPES.items()},
    "file in the way": ("config", "init", "acme/tiny", "--output", f"recipe.yaml/{URL}"),
    "output in the way": (*LORA, f"output_dir=recipe.yaml/{URL}"),
    "sheet in the way": ("sample", "acme/tiny", "a cat", "--output", f"recipe.yaml/{URL}/x.png"),
    "command": (URL,),
    "option": ("sample", f"--{URL}"),
    "choice": ("evaluate", "acme/tiny", "--split", URL),
    "model": (*LORA, f"model.pretrained_model_name_or_path={URL}", "output_dir=x"),
    "vae": (*LORA, f"model.pretrained_vae_model_name_or_path={URL}", "output_dir=x"),
    "lora": (*LORA, f"model.teacher_lora={URL}", "output_dir=x"),
    "reward": (*LORA, f"model.reward_model_name_or_path={URL}", "output_dir=x"),
    "backbone": (*LORA, f"discriminator.backbone={URL}", "output_dir=x"),
    "data": (*LORA, f"data.train_data_dir={URL}", "output_dir=x"),
    "prompts": (*LORA, f"data.prompts={URL}", "output_dir=x"),
    "student": (*LORA, f"model.student_model_name_or_path={URL}", "output_dir=x"),
    "key": ("train", "recipe.yaml", f"model.{URL}=1"),
    "value": ("train", "recipe.yaml", f"train.seed={URL}"),
    "recipe": ("train", URL),
    "sample": ("sample", URL, "a cat"),
    "init": ("config", "init", URL, "--output", "other.yaml"),
    "export": ("export", URL, "--output", "y"),
    "evaluate": ("evaluate", URL),
    "report": ("report", URL),
    "base": ("import-reward", "none", "--base", URL, "--output", "y"),
}


def in_cache(home: Path, name: str) -> Path:
    """Where the hub's cache keeps the newest snapshot of a repository."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder, named like somebody's home, and what each command said and tried."""
    here = tmp_path_factory.mktemp("home-of-canary-person")
    home = here / "hf"
    tiny.score_folder(in_cache(home, "acme/tiny"))
    tiny_data.sam(in_cache(home, "acme/sam"))
    tiny.score_folder(half := in_cache(home, "acme/half"))
    shutil.rmtree(half / "unet")
    prompts = [f"{caption} {i}" for i in range(2) for caption in tiny_data.CAPTIONS]
    (here / "prompts.txt").write_text("\n".join(prompts))
    commands = [*GOOD, *MISSING.values(), *TELLING.values()]
    (here / "commands.json").write_text(json.dumps(commands))
    alone = ["unshare", "-rn"]  # where that may be had, there is no network at all
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode:
        alone = []
    environment = os.environ | SECRETS | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    script = str(Path(__file__).with_name("watched.py"))
    subprocess.run(
        [*alone, sys.executable, script, str(here), str(here / "commands.json")],
        env=environment,
        check=True,
        timeout=600,
    )
    done = json.loads((here / "watched.json").read_text())
    names = [" ".join(w[:3]) for w in GOOD] + [f"missing {n}" for n in MISSING]
    names += [f"telling {n}" for n in TELLING]
    return here, dict(zip(names, done, strict=True))


Watched = tuple[Path, dict[str, dict[str, Any]]]


def test_offline_everything_that_is_there_works_without_a_try_at_the_network(
    watched: Watched,
) -> None:
    for name, done in watched[1].items():
        assert done["tried"] == [], name
        if not name.startswith(("missing", "telling")):
            assert done["code"] == 0, (name, done["code"], done["err"])


@pytest.mark.parametrize("name", MISSING)
def test_offline_what_is_missing_is_told_at_once(watched: Watched, name: str) -> None:
    done = watched[1][f"missing {name}"]
    assert done["code"] == 2, done
    assert "acme/" in done["err"]
    assert "Traceback" not in done["err"]
    assert done["seconds"] < 10


def test_no_secret_of_the_environment_is_written_or_said(watched: Watched) -> None:
    here, commands = watched
    files = [p for name in OUTPUTS for p in [here / name, *(here / name).rglob("*")] if p.is_file()]
    assert len(files) > 20
    for secret in SECRETS.values():
        for path in files:
            assert secret.encode() not in path.read_bytes(), path
        for name, done in commands.items():
            assert secret not in done["out"] + done["err"], name


@pytest.mark.parametrize("name", TELLING)
def test_a_password_in_a_url_is_not_repeated(watched: Watched, name: str) -> None:
    here, commands = watched
    done = commands[f"telling {name}"]
    assert done["code"] == 2, done
    assert PASSWORD not in done["out"] + done["err"]
    assert "canaryPassword" not in done["out"] + done["err"]
    assert "Traceback" not in done["err"]
    assert "somebody" not in done["out"] + done["err"]
    assert not any(PASSWORD.encode() in p.read_bytes() for p in here.glob("x/**/*") if p.is_file())


def test_cards_and_reports_do_not_tell_whose_home_the_run_was_in(watched: Watched) -> None:
    """Nor do the weights, and what belongs to a student; the recipe is as it was given."""
    here, _ = watched
    for folder in ("runs/tiny/student", "runs/tiny/report.html", "exported", "lora"):
        for path in [here / folder, *(here / folder).rglob("*")]:
            assert path.is_dir() or b"canary-person" not in path.read_bytes(), path
