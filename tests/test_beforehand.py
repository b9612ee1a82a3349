"""What does not go together is found before the first model is loaded, with exit code 2."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors
import safetensors.torch
import tiny
import tiny_data
import torch
from torch import nn

from flashdmd import beforehand, cli, config, loading, run, session
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import UserError

NOWHERE = "model.pretrained_model_name_or_path=nowhere/at-all"
ONLY = ("train.joint_train_steps=0", "model.reward_model_name_or_path=null")
DMD2 = ("train.arm=dmd2", "train.joint_train_steps=0")


@pytest.fixture(autouse=True)
def _no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither our loader nor the one below everybody's is called."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    with monkeypatch.context() as patch:
        for module, name in (
            (loading, "load_pipeline"), (safetensors, "safe_open"), (torch, "load"),
            (safetensors.torch, "load_file"), (session, "load_backbone"), (run, "open_session"),
        ):  # fmt: skip
            patch.setattr(module, name, opened)
        patch.setattr(nn.Module, "load_state_dict", opened)
        yield


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `flashdmd train` says as it ends with code 2."""
    monkeypatch.setattr("sys.argv", ["flashdmd", "train", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.matching_timesteps=[998]"], "[998] are not among student_timesteps"),
        (["method.adversarial_timesteps=[1]"], "[1] are not among student_timesteps"),
        (["method.preference_timesteps=[249]"], "holds 249, the last step"),
        (["method.ttur=0"], "ttur=0 must be 1 or more"),
        (["model.vae_precision=fp16"], "the Pixel-GAN learns through the decoder"),
        (["model.vae_precision=bf16"], "the Pixel-GAN learns through the decoder"),
        (["train.train_batch_size=3", "train.gradient_accumulation_steps=2"], "not a multiple of"),
        (["train.max_train_steps=0", *ONLY], "there is nothing to train"),
        (["model.reward_model_name_or_path=null"], "stage 2 needs a latent reward model"),
        (["train.gan_calibration_steps=[0, 101]"], "reaches past the 100 generator updates"),
        (["data.cache_latents=true"], "rendered when drawn"),
        (["data.aspect_ratio_buckets=true"], "rendered when drawn"),
        (["data.caption_column=text"], "rendered when drawn"),
        (["data.cache_text_embeddings=true"], "made as they are drawn"),
        (["data.train_data_dir=teacher"], "data.prompts names none"),
        (["model.teacher_lora_scale=0.5"], "without model.teacher_lora"),
        (["lora.lora_alpha=8"], "lora.rank=0 trains every weight"),
        (["lora.lora_layers=[to_q]"], "lora.rank=0 trains every weight"),
        (["model.quantize_base=int8"], "is for LoRA"),
        (["discriminator.blocks=[0]"], "leave blocks out"),
        (
            ["model.student_model_name_or_path=out/student", "output_dir=out"],
            "inside output_dir",
        ),
        (["data.train_data_dir=pictures", "output_dir=pictures"], "is inside data.train_data_dir"),
        (["data.train_data_dir=.", "output_dir=a/../out"], "is inside data.train_data_dir"),
        (["data.train_data_dir=out/samples", "output_dir=out"], "would be written over"),
        (["model.reward_model_name_or_path=r", "output_dir=r/out"], "inside model.reward_model"),
        (["output_dir=nowhere/at-all"], "is inside model.pretrained_model_name_or_path"),
        ([*DMD2, "discriminator.augment=[cutout]"], "looks at latents"),
        ([*DMD2, "method.real_images=raw"], "looks at latents"),
        ([*DMD2, "method.score_coupling=0.9"], "never sees the student's weights"),
        ([*DMD2, "data.prompts=p.txt"], "judges real latents"),
        (["train.arm=dmd2"], "no second stage"),
        (["method.real_images=raw", "discriminator.crop=4"], "pictures that never were"),
    ],
)
def test_what_the_recipe_alone_tells(
    changes: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """There is no teacher; what is said is what does not go together."""
    monkeypatch.chdir(tmp_path)
    assert message in said(monkeypatch, capsys, "emoji-score", NOWHERE, *changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["revision", "variant", "teacher_lora"])
def test_the_embedded_teachers_have_no_parts_from_elsewhere(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "emoji-score is neither" in said(monkeypatch, capsys, "emoji-score", f"model.{key}=x")


def test_another_arm_leaves_the_discriminator_of_pictures_behind() -> None:
    own = ["discriminator.augment=[cutout]", "method.real_images=raw"]
    recipe = config.read("emoji-score", [*own, "output_dir=x"])
    given = json.loads(recipe.model_dump_json())
    switched = config.build(config.apply(given, list(DMD2)), "it")
    assert switched.discriminator == config.Critic()
    assert switched.method.real_images == "decoded"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another autoencoder than the embedded one: 4 channels and a scale of 0.7, of 8."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_data.sam(folder / "sam")
    return tiny.score_folder(folder / "pipeline")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.train_data_dir=nowhere"], "data.train_data_dir='nowhere' is not a folder"),
        (["data.train_data_dir=a-{0..2}.tar"], "3 of the 3 tars"),
        (["data.prompts=nowhere.txt"], "the prompt file nowhere.txt cannot be read"),
        (
            ["method.student_timesteps=[1000, 750, 500, 250]"],
            "is a score teacher",
        ),
        (["method.student_timesteps=[999, 900, 700, 1]"], "cannot be written as a stock scheduler"),
        (["data.resolution=12", "data.train_data_dir=.", "output_dir=../x"], "a multiple of 16"),
        (["data.resolution=128"], "emoji has pictures of 64 pixels"),
        ([], "scores latents of 8 channels and this teacher's have 4"),
        (["model.reward_model_name_or_path=nowhere"], "reward model in nowhere cannot be read"),
        (["discriminator.backbone=timm:resnet18"], "needs the package timm"),
        (["discriminator.backbone=nowhere"], "'nowhere' is no folder"),
        (
            ["discriminator.backbone=SAM", "discriminator.blocks=[5]"],
            "must be one or more of 0..1",
        ),
        (
            [
                "lora.rank=4",
                "lora.lora_layers=[to_x]",
                "train.joint_train_steps=0",
                "model.reward_model_name_or_path=null",
            ],
            "lora_layers=['to_x']: the network has no such layers",
        ),
        (
            ["model.student_model_name_or_path=nowhere", *ONLY],
            "has no unet/diffusion_pytorch",
        ),
    ],
)
def test_what_small_files_tell(
    changes: list[str],
    message: str,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)  # it is not installed
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    named = f"model.pretrained_model_name_or_path={teacher}"
    changes = [change.replace("SAM", str(teacher.with_name("sam"))) for change in changes]
    assert message in said(monkeypatch, capsys, "emoji-score", named, *changes)
    assert not list(tmp_path.iterdir())


def facts(folder: Path, **changes: Any) -> Path:
    """What `flashdmd reward` leaves, of the embedded latents, without its weights."""
    own = {"channels": 8, "scaling_factor": 1.0, "shift_factor": 0.0}
    told = {
        "kind": "StableDiffusionPipeline", "base": str(ASSETS / "score"), "learns_words": True,
        "network": {}, "pixels": 8, "latents": own,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(told | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": {"channels": 4, "scaling_factor": 1.0, "shift_factor": 0.0}}, "'channels': 4"),
        ({"latents": {"channels": 8, "scaling_factor": 0.5, "shift_factor": 0.0}}, "factor': 0.5"),
        ({"kind": "StableDiffusion3Pipeline"}, "is of a flow and this teacher is not"),
        ({"kind": "FluxPipeline"}, "kind is none that is known"),
        ({"network": 3}, "network is none that is known"),
        ({"more": 3}, "cannot be read"),
    ],
)
def test_a_trained_reward_of_another_latent_space(
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = facts(tmp_path / "reward", **changes)
    named = f"model.reward_model_name_or_path={folder}"
    assert message in said(monkeypatch, capsys, "emoji-score", named)


def student(folder: Path, steps: tuple[int, ...], rank: int = 0) -> Path:
    """The files of a student, its weights empty."""
    (folder / "unet").mkdir(parents=True)
    for name in ("unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"):
        (folder / name).touch()
    notes = {"student_timesteps": steps, "teacher_guidance_scale": 1.5, "lora_rank": rank}
    (folder / "flashdmd.json").write_text(json.dumps(notes))
    return folder


def test_a_student_of_other_steps_or_another_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    two = f"model.student_model_name_or_path={student(tmp_path / 'two', (999, 499))}"
    rl = ("train.max_train_steps=0", "train.stage2=rl")
    assert "walks (999, 499)" in said(monkeypatch, capsys, "emoji-score", two, *rl)
    beforehand.check(config.read("emoji-score", [two]))  # stage 1 teaches it others
    four = f"model.student_model_name_or_path={student(tmp_path / 'four', (999,), 4)}"
    assert "LoRA of rank 4" in said(monkeypatch, capsys, "emoji-score", four, "lora.rank=8")


MINE = "output_dir: .  # here\n"


@pytest.mark.parametrize(
    ("there", "words", "message"),
    [
        ({"recipe.yaml": MINE}, ["recipe.yaml"], "holds a recipe.yaml of your own"),
        ({"recipe.yaml": "train: {seed: 1}"}, ["emoji-score"], "holds a recipe.yaml of your own"),
        ({"recipe.yaml": "output_dir: .\n"}, ["recipe.yaml"], "holds a recipe.yaml of your own"),
        ({"my.yaml": MINE, "student/config.json": "{}"}, ["my.yaml"], "holds student, which a run"),
        ({"metrics.json": "{}"}, ["emoji-score", "--no-resume"], "holds metrics.json, which a run"),
    ],
)
def test_what_no_run_has_made_is_not_written_over(
    there: dict[str, str],
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    assert message in said(monkeypatch, capsys, *words, "output_dir=.")
    assert sorted(tmp_path.rglob("*")) == before
    assert all((tmp_path / name).read_text() == text for name, text in there.items())


def test_a_run_goes_on_from_the_recipe_that_it_wrote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """To where models would be loaded; also by its own recipe.yaml."""
    output = tmp_path / "out"
    recipe = config.read("emoji-score", [], output)
    run.prepare(recipe, True)
    (output / "student").mkdir()

    def load(*_: Any) -> None:
        raise UserError("it is loaded")

    for words in (["emoji-score", f"output_dir={output}"], [str(output / "recipe.yaml")]):
        for more in ([], ["--no-resume"]):
            with monkeypatch.context() as patch:
                patch.setattr(run, "open_session", load)
                assert "it is loaded" in said(patch, capsys, *words, *more)


def test_packages_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beforehand, "find_spec", lambda name: None)
    needs = said(monkeypatch, capsys, "emoji-score", "train.use_8bit_adam=true")
    assert "train.use_8bit_adam needs bitsandbytes" in needs
    changes = ("lora.rank=4", "model.quantize_base=int8")
    assert "needs torchao" in said(monkeypatch, capsys, "emoji-score", *changes)


@pytest.mark.parametrize("name", ["emoji-score", "emoji-flow"])
def test_the_embedded_recipes_pass_without_a_weight(name: str) -> None:
    beforehand.check(config.read(name, []))


def test_a_revision_is_judged_by_its_own_configurations(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, with that revision alone in the hub's cache, and its files are not those of main."""
    home = tmp_path / "models--someone--something"
    shutil.copytree(teacher, home / "snapshots" / ("1" * 40))
    (home / "refs").mkdir()
    (home / "refs/v1").write_text("1" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = {
        "pretrained_model_name_or_path": "someone/something",
        "reward_model_name_or_path": None,
    }
    content = {"model": model | {"revision": "v1"}, "train": {"joint_train_steps": 0}}
    beforehand.check(config.build(content, "it"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        beforehand.check(config.build({**content, "model": model}, "it"))


def test_a_reward_that_is_not_there_is_not_blamed_on_the_teacher(teacher: Path) -> None:
    model = {"pretrained_model_name_or_path": str(teacher), "reward_model_name_or_path": "nowhere"}
    with pytest.raises(UserError) as told:
        beforehand.check(config.build({"model": model}, "it"))
    assert "nowhere" in str(told.value)
    assert str(teacher) not in str(told.value)
