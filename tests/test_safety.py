"""Nothing unsafe: files that a user names run no code, write nowhere, and tell no secrets.

docs/security.md names these tests. Everything hostile is real: see hostile.py.
"""

import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_data
import tiny_reward
import torch
from PIL import Image
from safetensors.torch import save_file
from test_cli_models import flashdmd
from transformers import AutoConfig

from flashdmd import checkpoint
from flashdmd.data import open_data
from flashdmd.emoji.world import PACKED, World
from flashdmd.errors import UserError
from flashdmd.models import latent_reward
from flashdmd.models.teacher import load_pipeline
from flashdmd.models.vision import load_backbone

Place = Callable[[Path, Path], Path]  # (a folder with models, the mark) -> what must stay closed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a teacher, a latent reward model, a backbone and pictures."""
    here = tmp_path_factory.mktemp("models")
    tiny.score_folder(here / "teacher")
    tiny_data.sam(here / "sam")
    tiny_data.pictures(here / "pictures", (64, 64))
    base = tiny_reward.folder_of("sd", here / "base")
    latent_reward.write(latent_reward.build(latent_reward.open_base(str(base)), str(base), True),
                        here / "reward")  # fmt: skip
    return here


@pytest.fixture
def here(models: Path, tmp_path: Path) -> Path:
    """A copy that a test may poison, the working directory."""
    shutil.copytree(models, tmp_path / "here")
    for name, content in {"prompts.txt": "a cat\n", "recipe.yaml": RECIPE}.items():
        (tmp_path / "here" / name).write_text(content)
    return tmp_path / "here"


RECIPE = """\
model: {pretrained_model_name_or_path: teacher, reward_model_name_or_path: null}
data: {train_data_dir: pictures}
train: {joint_train_steps: 0, max_train_steps: 1, gan_calibration_steps: [0, 1],
        train_batch_size: 2, preference_batch_size: 2}
output_dir: out
"""
SAMPLE = ("sample", "teacher", "a cat", "--steps", "1")
TRAIN = ("train", "recipe.yaml")


def with_(**keys: str) -> tuple[str, ...]:
    return (*TRAIN, *(f"{name.replace('__', '.')}={value}" for name, value in keys.items()))


# ---- pickles


def in_place_of(part: str, name: str, *others: str) -> Place:
    """A pickle where a component's safetensors were."""

    def place(here: Path, mark: Path) -> Path:
        for path in (here / part).glob("*.safetensors"):
            path.unlink()
        for other in others:
            (here / part / other).write_text("{}")
        return hostile.pickled(here / part / name, mark)

    return place


def beside(name: str, plainly: bool = False) -> Place:
    make = hostile.plainly_pickled if plainly else hostile.pickled
    return lambda here, mark: make(here / name, mark)


def with_adapter(part: str) -> Place:
    def place(here: Path, mark: Path) -> Path:
        said = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
        hostile.edited(here / part / "adapter_config.json", **said)
        return hostile.pickled(here / part / "adapter_model.bin", mark)

    return place


def in_shards(here: Path, mark: Path) -> Path:
    in_place_of("teacher/unet", "diffusion_pytorch_model-00001-of-00001.bin")(here, mark)
    shard = here / "teacher/unet/diffusion_pytorch_model-00001-of-00001.bin"
    index = {"metadata": {}, "weight_map": {"weight": shard.name}}
    (here / "teacher/unet/diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    return shard


def shard_named(name: str) -> Place:
    """An index of safetensors that names a shard of another kind, or of another place."""

    def place(here: Path, mark: Path) -> Path:
        (whole,) = (here / "teacher/unet").glob("*.safetensors")
        index = {"metadata": {}, "weight_map": {"weight": name}}
        (here / f"teacher/unet/{whole.name}.index.json").write_text(json.dumps(index))
        whole.rename(whole.with_stem("other"))
        return hostile.pickled(here / "teacher/unet" / name, mark)

    return place


def published(here: Path, mark: Path) -> Path:
    shutil.copytree(here / "base/unet", here / "lrm/unet")
    shutil.copytree(here / "base/text_encoder", here / "lrm/text_encoder")
    return hostile.pickled(here / "lrm/state_dict.pt", mark)


def checkpointed(here: Path, mark: Path) -> Path:
    (here / "out/checkpoint-1").mkdir(parents=True)
    state = {"stage": "distill", "updates": {}, "before": {}}
    (here / "out/checkpoint-1/state.json").write_text(json.dumps(state))
    for name in ("student.pt", "optimizer.bin", "score.pth"):
        hostile.pickled(here / "out/checkpoint-1" / name, mark)
    evil = hostile.plainly_pickled(here / "out/checkpoint-1/student.safetensors", mark)
    checkpoint.write_manifest(here / "out/checkpoint-1")  # whole, as far as that tells
    return evil


IMPORT = ("import-reward", "lrm", "--base", "base", "--output", "imported")
LORA = {"model__teacher_lora": "lora"}
PICKLES: dict[str, tuple[Place, tuple[str, ...], str]] = {  # what, the command, what it says
    "encoder": (in_place_of("teacher/text_encoder", "pytorch_model.bin"), SAMPLE, "is a pickle"),
    "unet": (in_place_of("teacher/unet", "diffusion_pytorch_model.bin"), SAMPLE, "is a pickle"),
    "vae": (in_place_of("teacher/vae", "diffusion_pytorch_model.bin"), TRAIN, "is a pickle"),
    "shards": (in_shards, SAMPLE, "is a pickle"),
    "shard": (shard_named("evil.bin"), SAMPLE, "no .safetensors file beside it"),
    "shard elsewhere": (shard_named("../evil.bin"), SAMPLE, "no .safetensors file beside it"),
    "variant": (
        in_place_of("teacher/text_encoder", "pytorch_model.fp16.bin"),
        with_(model__variant="fp16"),
        "is a pickle",
    ),
    "variant beside the plain": (
        beside("teacher/unet/diffusion_pytorch_model.fp16.bin"),
        with_(model__variant="fp16"),
        "",
    ),
    "adapter": (with_adapter("teacher/text_encoder"), SAMPLE, "adapter_config.json"),
    "named safetensors": (
        beside("teacher/text_encoder/model.safetensors", plainly=True),
        SAMPLE,
        "cannot be loaded",
    ),
    "other vae": (
        in_place_of("base/vae", "diffusion_pytorch_model.bin"),
        with_(model__pretrained_vae_model_name_or_path="base/vae"),
        "is a pickle",
    ),
    "lora file": (beside("lora.bin"), with_(model__teacher_lora="lora.bin"), "may be a pickle"),
    "lora file .pt": (beside("lora.pt"), with_(model__teacher_lora="lora.pt"), "may be a pickle"),
    "lora folder": (beside("lora/pytorch_lora_weights.bin"), with_(**LORA), "cannot be put on"),
    "lora, lying": (
        beside("lora/pytorch_lora_weights.safetensors", plainly=True),
        with_(**LORA),
        "cannot be put on",
    ),
    "reward": (
        in_place_of("reward", "model.bin"),
        with_(model__reward_model_name_or_path="reward"),
        "cannot be read",
    ),
    "reward's words": (
        in_place_of("reward/text_encoder", "pytorch_model.bin"),
        with_(model__reward_model_name_or_path="reward"),
        "is a pickle",
    ),
    "reward's adapter": (
        with_adapter("reward/text_encoder"),
        with_(model__reward_model_name_or_path="reward"),
        "adapter_config.json",
    ),
    "published reward": (published, IMPORT, "state_dict.pt is a pickle"),
    "backbone": (
        in_place_of("sam", "pytorch_model.bin"),
        with_(discriminator__backbone="sam"),
        "is a pickle|only a pickle",
    ),
    "backbone's adapter": (
        with_adapter("sam"),
        with_(discriminator__backbone="sam"),
        "adapter_config.json",
    ),
    "timm's folder": (
        beside("timm/pytorch_model.bin"),
        with_(discriminator__backbone="timm:local-dir:timm"),
        "no name of timm's own",
    ),
    "single file": (beside("model.ckpt"), ("sample", "model.ckpt", "a cat"), "is not a folder"),
    "single file in a folder": (beside("a/b.ckpt"), ("sample", "a/b.ckpt", "a cat"), "cannot be"),
    "checkpoint": (checkpointed, TRAIN, "checkpoint-1 cannot be read"),
    "student": (
        in_place_of("base/unet", "diffusion_pytorch_model.bin"),
        with_(model__student_model_name_or_path="base"),
        "is a pickle",
    ),
    "tokenizer": (
        beside("teacher/tokenizer/tokenizer.json", plainly=True),
        SAMPLE,
        "cannot be loaded",
    ),
    "config": (beside("teacher/unet/config.json", plainly=True), SAMPLE, "cannot be loaded"),
    "index": (beside("teacher/model_index.json", plainly=True), SAMPLE, "cannot be read"),
    "recipe": (beside("recipe.yaml", plainly=True), TRAIN, "not UTF-8|not YAML"),
    "prompts": (beside("prompts.txt", plainly=True), with_(data__prompts="prompts.txt"), "prompts"),
    "start of the embedded": (
        in_place_of("base/unet", "diffusion_pytorch_model.bin"),
        ("emoji", "teacher", "--start", "base", "--output", "out"),
        "is a pickle",
    ),
    "start of the autoencoder": (
        in_place_of("base/vae", "diffusion_pytorch_model.bin"),
        ("emoji", "vae", "--start", "base/vae", "--output", "out"),
        "is a pickle",
    ),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_stay_closed(kind: str, here: Path, tmp_path: Path) -> None:
    """Refused with what to do and exit code 2; nobody so much as opens them but as safetensors."""
    place, command, said = PICKLES[kind]
    mark = tmp_path / "mark"
    evil = place(here, mark)
    with hostile.opened() as opened:
        status, _, err = flashdmd(here, *command)
    assert status == 2, err
    assert any(words in err for words in said.split("|")), err
    assert "Traceback" not in err
    assert not mark.exists()
    if evil.suffix in (".bin", ".pt", ".pth", ".ckpt") and kind != "single file in a folder":
        assert not [path for path in opened if path.endswith(evil.name)]


def test_the_pickles_of_these_tests_are_live(tmp_path: Path) -> None:
    for n, make in enumerate((hostile.pickled, hostile.plainly_pickled)):
        mark = tmp_path / f"mark{n}"
        path = make(tmp_path / "evil.bin", mark)
        with hostile.opened() as opened:
            (torch.load(path, weights_only=False) if n == 0 else pickle.loads(path.read_bytes()))
        assert mark.exists()
        assert str(path) in opened


def test_with_leave_a_published_reward_is_unpickled_and_runs_nothing(
    here: Path, tmp_path: Path
) -> None:
    published(here, tmp_path / "mark")
    status, _, err = flashdmd(here, *IMPORT, "--unpickle")
    assert status == 2
    assert "state_dict.pt cannot be read" in err
    assert not (tmp_path / "mark").exists()
    assert not (here / "imported").exists()


def test_what_is_not_needed_of_a_pipeline_is_not_read(here: Path, tmp_path: Path) -> None:
    """Of a whole repository: a safety checker and other formats, pickles beside safetensors."""
    for name in ("safety_checker/pytorch_model.bin", "unet/diffusion_pytorch_model.bin",
                 "vae_decoder/openvino_model.bin", "v1-5-pruned.ckpt"):  # fmt: skip
        hostile.pickled(here / "teacher" / name, tmp_path / "mark")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    hostile.edited(here / "teacher/model_index.json", safety_checker=checker)
    with hostile.opened() as opened:
        status, out, err = flashdmd(here, *SAMPLE)
    assert status == 0, err
    assert "Wrote" in out
    assert not [path for path in opened if path.endswith((".bin", ".ckpt"))]
    assert not (tmp_path / "mark").exists()


def test_caches_that_are_pickles_are_made_anew(here: Path, tmp_path: Path) -> None:
    """Encoded latents and embeddings that somebody swapped for pickles, and other leavings."""
    cached = ("data.cache_latents=true", "data.cache_text_embeddings=true", "data.cache_dir=kept",
              "validation.num_prompts=8", "validation.teacher_steps=1",
              "discriminator.width=8")  # fmt: skip
    from flashdmd import config, session

    read = config.load(here / "recipe.yaml", list(cached))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        session.open_session(read)
        kept = [p for p in (here / "kept").rglob("*") if p.is_file()]
        assert len(kept) >= 2
        for path in kept:
            hostile.plainly_pickled(path, tmp_path / "mark")
        session.open_session(read)
    assert not (tmp_path / "mark").exists()


# ---- data


def test_data_sets_run_nothing(tmp_path: Path) -> None:
    """A loading script, pickles among pictures and in tars, and one that arrow once unpickled."""
    mark, good = tmp_path / "mark", tmp_path / "good"
    tiny_data.pictures(good, (16, 16), 3)
    one = (good / "16x16-0.png").read_bytes()

    scripted = tiny_data.pictures(tmp_path / "scripted", (16, 16), 3)
    hostile.code(scripted / "scripted.py", mark)
    hostile.plainly_pickled(scripted / "dataset.pickle", mark)
    np.save(scripted / "16x16-0.npy", np.array([hostile.Touch(mark)]), allow_pickle=True)
    assert len(open_data(scripted, 16).catalogue) == 3

    tar = hostile.tarred(
        tmp_path / "a.tar",
        {
            "0.png": one,
            "0.txt": b"a cat",
            "0.pkl": pickle.dumps(hostile.Touch(mark)),
            "0.pth": hostile.pickled(tmp_path / "x.pth", mark).read_bytes(),
            "0.npy": (scripted / "16x16-0.npy").read_bytes(),
        },
        [],
    )
    assert len(open_data(str(tar), 16).catalogue) == 1

    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(hostile.Touch(mark)),
    }
    schema = pa.schema(
        [
            pa.field("image", pa.binary()),
            pa.field("text", pa.string()),
            pa.field("evil", pa.int32(), metadata=extension),
        ]
    )
    table = pa.table({"image": [one], "text": ["a cat"], "evil": [1]}, schema=schema)
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet/train.parquet")
    (tmp_path / "parquet/parquet.py").write_text(hostile.CODE.format(mark=str(mark), name="Evil"))
    found = open_data(tmp_path / "parquet", 16, cache=tmp_path / "cache")
    assert len(found.catalogue) == 1
    assert not mark.exists()


def test_preferences_read_pictures_alone_and_inside_their_folder(tmp_path: Path) -> None:
    """No Ghostscript for PostScript, no pictures of the user's from elsewhere."""
    from flashdmd.preferences import picture, raw_of

    eps = tmp_path / "a.eps"
    Image.new("RGB", (8, 8)).save(eps)
    with pytest.raises(OSError, match="cannot identify"):
        picture(eps, 8)
    for path in ("/etc/hostname", "../a.png", "a/../../b.png"):
        with pytest.raises(ValueError, match="outside"):
            raw_of(tmp_path, {"bytes": None, "path": path})
    assert raw_of(tmp_path, {"bytes": None, "path": "a.png"}) == tmp_path / "a.png"


# ---- code


def custom_pipeline(here: Path, mark: Path) -> None:
    hostile.code(here / "teacher/pipeline.py", mark, "MyPipeline")
    hostile.edited(here / "teacher/model_index.json", _class_name=["pipeline", "MyPipeline"])


def custom_part(here: Path, mark: Path) -> None:
    hostile.code(here / "teacher/unet/my_unet.py", mark, "MyUNet")
    hostile.edited(here / "teacher/model_index.json", unet=["my_unet", "MyUNet"])


def nameless_part(here: Path, mark: Path) -> None:
    hostile.code(here / "teacher/unet/None.py", mark, "UNet2DConditionModel")
    hostile.edited(here / "teacher/model_index.json", unet=[None, "UNet2DConditionModel"])


def installed_part(here: Path, mark: Path) -> None:
    """A module that Python finds, as it finds those of the working directory for python -m."""
    hostile.code(here / "my_module.py", mark, "MyUNet")
    hostile.edited(here / "teacher/model_index.json", unet=["my_module", "MyUNet"])


def mapped(part: str) -> Callable[[Path, Path], None]:
    def place(here: Path, mark: Path) -> None:
        hostile.code(here / part / "modeling_evil.py", mark)
        names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoBackbone", "CLIPTextModel")
        told = {name: "modeling_evil.Evil" for name in names}
        file = "tokenizer_config.json" if part.endswith("tokenizer") else "config.json"
        more = {"model_type": "evil"} if part in ("sam", "reward/text_encoder") else {}
        hostile.edited(here / part / file, auto_map=told, **more)

    return place


def kernels(here: Path, mark: Path) -> None:
    changes = {"attn_implementation": "someone/kernel"}
    hostile.edited(here / "teacher/text_encoder/config.json", **changes)


REWARD, SAM = (
    with_(model__reward_model_name_or_path="reward"),
    with_(discriminator__backbone="sam"),
)
DOCTOR = ("doctor", "recipe.yaml")
INIT = ("config", "init", "teacher", "--output", "new.yaml")
FOREIGN: dict[str, tuple[Callable[[Path, Path], None], tuple[tuple[str, ...], ...], str]] = {
    "pipeline.py": (custom_pipeline, (SAMPLE, TRAIN, DOCTOR, INIT), "supported"),
    "part": (custom_part, (SAMPLE, TRAIN, DOCTOR), "no option that runs code"),
    "None.py": (nameless_part, (SAMPLE, TRAIN, DOCTOR), "no option that runs code|no unet"),
    "module": (installed_part, (SAMPLE, TRAIN, DOCTOR), "no option that runs code"),
    "kernel": (kernels, (SAMPLE, TRAIN), "no option that runs code"),
    "reward": (mapped("reward/text_encoder"), (REWARD,), "cannot be read"),
    "backbone": (mapped("sam"), (SAM, DOCTOR[:1] + SAM[1:]), "sam"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_code_that_comes_with_a_model_is_refused(
    kind: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 without a question on the terminal, though the answer there would be yes."""
    place, commands, said = FOREIGN[kind]
    place(here, tmp_path / "mark")
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    for command in commands:
        status, _, err = flashdmd(here, *command)
        assert status == 2, (command, err)
        assert any(words in err for words in said.split("|")), err
        assert "Traceback" not in err
        assert not (tmp_path / "mark").exists()
    sys.modules.pop("my_module", None)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "unet", "vae"])
def test_code_that_a_known_class_does_not_need_is_left_alone(
    part: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped(f"teacher/{part}")(here, tmp_path / "mark")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    status, _, err = flashdmd(here, *SAMPLE)
    assert status == 0, err
    assert not (tmp_path / "mark").exists()


def test_the_code_of_these_tests_is_live(here: Path, tmp_path: Path) -> None:
    mapped("sam")(here, tmp_path / "mark")
    home = tmp_path / "modules"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home))
        with pytest.raises(AttributeError):
            AutoConfig.from_pretrained(here / "sam", trust_remote_code=True)
    assert (tmp_path / "mark").exists()


# ---- sizes


BOMBS = (
    ("text_encoder", "num_hidden_layers", 10**9),
    ("text_encoder", "vocab_size", 10**12),
    ("unet", "layers_per_block", 10**9),
    ("unet", "block_out_channels", [10**8, 10**8]),
    ("vae", "latent_channels", 10**12),
)


@pytest.mark.parametrize(("part", "key", "value"), BOMBS)
def test_a_config_that_asks_for_a_trillion_numbers_is_refused_unbuilt(
    part: str, key: str, value: object, here: Path
) -> None:
    hostile.edited(here / "teacher" / part / "config.json", **{key: value})
    for command in (TRAIN, DOCTOR):
        status, _, err = flashdmd(here, *command)
        assert status == 2
        assert f"has {key}=" in err
        assert "no network has more than" in err


# ---- archives


def test_names_of_templates_and_parts_lead_nowhere(here: Path) -> None:
    """Parts of a pipeline and templates of a tokenizer become names of files when it is saved."""
    named = [{"name": "../../../outside", "template": "x"}, {"name": "default", "template": "x"}]
    hostile.edited(here / "teacher/tokenizer/tokenizer_config.json", chat_template=named)
    kind = ["diffusers", "UNet2DConditionModel"]
    hostile.edited(here / "teacher/model_index.json", **{"../../outside": kind})
    (here / "in").mkdir()
    with pytest.raises(ValueError, match="Invalid chat template name"):
        load_pipeline(here / "teacher").pipeline.save_pretrained(here / "in/a/b")
    assert not [p for p in everything(here.parent) if "outside" in p]


def everything(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*")}


MEMBERS = [
    ("../outside.png", tarfile.REGTYPE, ""),
    ("a/../../outside.png", tarfile.REGTYPE, ""),
    ("link.png", tarfile.SYMTYPE, "/etc/passwd"),
    ("hard.png", tarfile.LNKTYPE, "../../secret.png"),
    ("folder", tarfile.SYMTYPE, "../.."),
    ("folder/inside.png", tarfile.REGTYPE, ""),
    ("pipe.png", tarfile.FIFOTYPE, ""),
    ("disk.png", tarfile.BLKTYPE, ""),
    ("tty.png", tarfile.CHRTYPE, ""),
    ("new\nline.png", tarfile.REGTYPE, ""),
    ("x\\..\\..\\y.png", tarfile.REGTYPE, ""),
    ("C:\\windows.png", tarfile.REGTYPE, ""),
]


def test_tars_write_nothing_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_data.pictures(tmp_path / "good", (16, 16), 1)
    one = (tmp_path / "good/16x16-0.png").read_bytes()
    (tmp_path / "secret.png").write_bytes(one)
    work = tmp_path / "a/b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    good = {f"{i}.{end}": c for i in range(99) for end, c in (("png", one), ("txt", b"a cat"))}
    hostile.tarred(work / "x.tar", good, MEMBERS[:1])  # of so many good ones that they are read
    before = everything(tmp_path)
    source = open_data(str(work / "x.tar"), 16)
    assert source.report.refused == 1
    source(np.random.default_rng(0), 2)
    assert everything(tmp_path) == before
    for member in [*MEMBERS, (str(tmp_path / "outside.png"), tarfile.REGTYPE, "")]:
        hostile.tarred(work / "x.tar", {}, [member])
        said = "cannot be used" if member[1] == tarfile.REGTYPE else "a link or a device"
        with pytest.raises(UserError, match=rf"x\.tar.* holds no|{said}"):
            open_data(str(work / "x.tar"), 16)
        assert everything(tmp_path) == before


def test_the_pack_of_pictures_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(PACKED) as pack:
        first = json.loads(pack.read("metadata.jsonl").decode().splitlines()[0])
        picture = pack.read(first["file_name"])
    work = tmp_path / "a/b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    with zipfile.ZipFile(work / "x.zip", "w") as made:
        first["file_name"] = "../../outside.webp"
        made.writestr(zipfile.ZipInfo(first["file_name"]), picture)
        made.writestr("metadata.jsonl", json.dumps(first))
    before = everything(tmp_path)
    assert len(World(work / "x.zip").pictures) == 1
    assert everything(tmp_path) == before


# ---- what is written


def test_files_have_the_permissions_that_the_user_gives(here: Path) -> None:
    from flashdmd.files import replace_file, replace_folder

    for mask, files, folders in ((0o022, 0o644, 0o755), (0o077, 0o600, 0o700)):
        old = os.umask(mask)
        try:
            with replace_folder(here / f"folder{mask}") as beside:
                save_file({"x": torch.ones(1)}, beside / "x.safetensors")
                (beside / "x.json").write_text("{}")
            with replace_file(here / f"file{mask}.safetensors") as beside:
                save_file({"x": torch.ones(1)}, beside)
        finally:
            os.umask(old)
        written = [*(here / f"folder{mask}").iterdir(), here / f"file{mask}.safetensors"]
        assert {p.stat().st_mode & 0o777 for p in written} == {files}
        assert (here / f"folder{mask}").stat().st_mode & 0o777 == folders


def test_a_link_that_waits_under_the_name_of_what_is_written_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that others may write to, such as /tmp, by who foresaw the name."""
    from flashdmd import files
    from flashdmd.files import replace_folder, write_text

    monkeypatch.setattr(files, "own", lambda: "1-a")
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / ".notes.writing-1-a.json").symlink_to(mine)
    write_text(tmp_path / "notes.json", "{}")
    assert mine.read_text() == "precious"
    assert (tmp_path / "notes.json").read_text() == "{}"

    def quick(path: Path, missing_ok: bool = False) -> None:
        """Whoever waits puts the link there anew."""
        os.path.lexists(path) and os.unlink(path)
        path.symlink_to(mine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", quick)
        with pytest.raises(FileExistsError):
            write_text(tmp_path / "notes.json", "{}")
    assert mine.read_text() == "precious"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".out.writing-1-a").symlink_to(elsewhere)
    with replace_folder(tmp_path / "out") as beside:
        (beside / "x").write_text("x")
    assert (tmp_path / "out/x").read_text() == "x"
    assert not (tmp_path / "out").is_symlink()
    (tmp_path / ".out.writing-1-a").symlink_to(elsewhere)
    monkeypatch.setattr(files, "mend", lambda folder: None)  # put there after it had looked
    with pytest.raises(FileExistsError), replace_folder(tmp_path / "out") as beside:
        (beside / "x").write_text("x")
    assert not any(elsewhere.iterdir())


def test_timm_is_asked_for_its_own_models_alone() -> None:
    for name in ("local-dir:/x", "hf-hub:someone/model", "a/b", "/x", ""):
        with pytest.raises(UserError, match="no name of timm's own models"):
            load_backbone(f"timm:{name}")
