"""Safetensors, configurations, notes, checkpoints of every kind: read whole, or a clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_reward
import torch
from fuzzing import ODD, VALUES, answered, files_in, fuzz, patient, spoilt_bytes, spoilt_json
from fuzzing import spoilt_safetensors as spoilt
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor, nn

from flashdmd import checkpoint, export, initial
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import UserError
from flashdmd.loading import load_lora, load_reward, load_teacher
from flashdmd.models import latent_reward, meta, published_lrm
from flashdmd.models.denoiser import Adapter, AdapterDenoiser
from flashdmd.models.lora_keys import FILE_NAME as LORA
from flashdmd.models.teacher import (
    Teacher,
    add_lora,
    index_of,
    load_pipeline,
    load_vae,
    part_config,
    to_uint8,
)
from flashdmd.models.vision import load_backbone, statistics_of

WHOLE = save(
    {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}, metadata={"format": "pt"}
)
DIFFUSERS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def teacher(base: Path) -> Teacher:
    return load_pipeline(tiny.score_folder(base / "teacher"))


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def reading(call: Callable[[], Any], folder: Path, area: str) -> Any:
    """What reading gives; it leaves nothing behind."""
    before = files_in(folder)
    found = answered(call, area)
    assert files_in(folder) == before
    return found


def numbers(tensors: dict[str, Tensor]) -> bool:
    return all(t.isfinite().all() for t in tensors.values())


# safetensors --------------------------------------------------------------------------------------


@fuzz(150)
@given(spoilt(WHOLE))
def test_a_networks_weights(base: Path, content: bytes) -> None:
    """Read whole: every weight is the file's."""
    folder, network = base / "full", nn.Linear(3, 2)
    path = put(folder / DIFFUSERS, content)
    done = reading(
        lambda: checkpoint.load_network(network, folder, "unet") or True, folder, "network"
    )
    if done:
        for name, tensor in load_file(path).items():
            assert torch.equal(network.state_dict()[name], tensor.float())


@fuzz(100)
@given(spoilt(WHOLE) | ODD)
def test_the_bytes_of_a_folder(base: Path, content: bytes) -> None:
    put(base / "counted/model.safetensors", content)
    total = reading(lambda: meta.stored_bytes(base / "counted"), base / "counted", "header")
    assert total is None or total >= 0


@pytest.fixture(scope="module")
def adapter(teacher: Teacher) -> AdapterDenoiser:
    frozen = teacher.denoiser
    made = AdapterDenoiser(
        frozen.network, frozen.family, frozen.process, Adapter(2, 2.0, ("to_q",))
    )
    return made.twin("student")


@pytest.fixture(scope="module")
def lora(adapter: AdapterDenoiser) -> bytes:
    own = {f"unet.{k}": torch.ones_like(v).contiguous() for k, v in adapter.named_parameters()}
    return save(own, metadata={"format": "pt"})


@fuzz(100)
@given(data=st.data())
def test_a_loras_weights(base: Path, adapter: AdapterDenoiser, lora: bytes, data: Any) -> None:
    """All of them, or none: a refused file changes nothing."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(-7.0)
    put(base / "lora" / LORA, data.draw(spoilt(lora)))
    before = {k: p.detach().clone() for k, p in adapter.named_parameters()}
    done = reading(
        lambda: export.read_student(adapter, base / "lora") or True, base / "lora", "LoRA"
    )
    changed = [k for k, p in adapter.named_parameters() if not torch.equal(p, before[k])]
    assert bool(done) == (len(changed) == len(before))
    assert done or not changed


@fuzz(15)
@given(data=st.data())
def test_a_teachers_lora(base: Path, lora: bytes, data: Any) -> None:
    path = put(base / "teachers/lora.safetensors", data.draw(spoilt(lora)))
    pipeline = load_pipeline(base / "teacher").pipeline
    reading(lambda: add_lora(pipeline, str(path)), base / "teachers", "LoRA")


@pytest.fixture(scope="module")
def reward(base: Path) -> Path:
    """A reward as `flashdmd reward` writes it, of a tiny Stable Diffusion."""
    pipeline = latent_reward.open_base(str(tiny_reward.sd(base / "sd")))
    made = latent_reward.build(pipeline, str(base / "sd"), learns_words=False)
    latent_reward.write(made, base / "reward")
    return base / "reward"


@fuzz(25)
@given(data=st.data())
def test_a_reward(base: Path, reward: Path, data: Any) -> None:
    """Its weights or its configuration are damaged."""
    folder = shutil.copytree(reward, base / "damaged-reward", dirs_exist_ok=True)
    pipeline = load_once(base / "sd")
    if data.draw(st.booleans()):
        good = (reward / "model.safetensors").read_bytes()
        put(folder / "model.safetensors", data.draw(spoilt(good)))
    else:
        good = json.loads((reward / "config.json").read_text())
        put(folder / "config.json", data.draw(spoilt_json(good)))
    reading(lambda: load_reward(str(folder), pipeline), folder, "reward")


CACHE: dict[Path, Teacher] = {}


def load_once(folder: Path) -> Teacher:
    if folder not in CACHE:
        CACHE[folder] = load_pipeline(folder)
    return CACHE[folder]


@fuzz(40)
@given(data=st.data())
def test_the_embedded_kind_of_reward(base: Path, data: Any) -> None:
    """With another configuration; the weights are those that are shipped, or damaged."""
    folder = base / "emoji-reward"
    good = json.loads((ASSETS / "reward/config.json").read_text())
    put(folder / "config.json", data.draw(spoilt_json(good)))
    put(folder / "reward.safetensors", data.draw(spoilt(WHOLE)))
    embedded = CACHE.setdefault(ASSETS, load_teacher("emoji-score")) if ASSETS not in CACHE else (
        CACHE[ASSETS]
    )  # fmt: skip
    assert reading(lambda: load_reward(str(folder), embedded), folder, "reward") is None


@fuzz(60)
@given(spoilt(WHOLE) | ODD, st.sampled_from([".safetensors", ".pt", ".bin", ""]), st.booleans())
def test_published_rewards(base: Path, content: bytes, ending: str, unpickle: bool) -> None:
    path = put(base / f"published/one{ending}", content)
    found = reading(lambda: published_lrm.read(path, unpickle), base / "published", "published")
    assert found is None or all(isinstance(t, Tensor) for t in found.values())


PICKLED = st.recursive(
    st.none() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3) | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=5,
)


@fuzz(60)
@given(PICKLED)
def test_published_rewards_of_anything_that_may_be_unpickled(base: Path, content: Any) -> None:
    path = base / "published/one.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    found = reading(lambda: published_lrm.read(path, True), base / "published", "published")
    assert found is None or all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()
    )


# configurations and notes -------------------------------------------------------------------------

NOTES = {
    "student_timesteps": [999, 749], "teacher_guidance_scale": 3.0, "averaged_updates": 4,
    "teacher": {"name": "emoji-score", "dtype": "fp32"}, "lora_rank": 4, "resolution": 64,
}  # fmt: skip


@fuzz(150)
@given(spoilt_json(NOTES))
def test_a_students_notes(base: Path, content: bytes) -> None:
    put(base / "noted" / export.NOTES, content)
    notes = reading(lambda: export.notes_of(base / "noted"), base / "noted", "notes")
    if notes is not None:
        said = json.loads(content)
        assert list(notes.steps) == said["student_timesteps"]
        assert all(type(t) is int for t in said["student_timesteps"])
        assert notes.guidance == said["teacher_guidance_scale"]
        assert notes.rank == said.get("lora_rank", 0)


@fuzz(40)
@given(spoilt_json(NOTES["teacher"]))
def test_notes_of_a_teacher_that_cannot_be(base: Path, content: bytes) -> None:
    """A LoRA whose notes name something else than a pipeline."""
    told = json.dumps(NOTES).encode().replace(json.dumps(NOTES["teacher"]).encode(), content)
    put(base / "noted" / export.NOTES, told)
    assert reading(lambda: load_lora(base / "noted"), base / "noted", "notes") is None


@fuzz(20)
@given(data=st.data())
def test_a_pipelines_configurations(base: Path, teacher: Teacher, data: Any) -> None:
    """One of them is anything; no weight is there, so a whole pipeline is never loaded."""
    folder = base / "configured"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        base / "teacher", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.txt")
    )
    name = data.draw(
        st.sampled_from(["model_index.json", "unet/config.json", "vae/config.json"])
        | st.sampled_from(["scheduler/scheduler_config.json", "text_encoder/config.json"])
    )
    good = json.loads((base / "teacher" / name).read_text())
    put(folder / name, data.draw(spoilt_json(good)))
    assert reading(lambda: load_teacher(str(folder)), folder, "configurations") is None
    reading(lambda: meta.parts_of(str(folder)), folder, "configurations")
    reading(lambda: initial.initial(str(folder)), folder, "configurations")
    reading(lambda: index_of(str(folder)), folder, "configurations")
    for part in ("unet", "vae", "scheduler"):
        assert isinstance(part_config(str(folder), part), dict)


@fuzz(30)
@given(
    spoilt_json({"model_type": "sam_vision_model", "hidden_size": 16, "num_hidden_layers": 2}),
    spoilt_json({"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
)
def test_a_backbones_configurations(base: Path, config: bytes, normal: bytes) -> None:
    folder = base / "backbone"
    put(folder / "config.json", config)
    put(folder / "preprocessor_config.json", normal)
    assert reading(lambda: load_backbone(str(folder)), folder, "configurations") is None
    reading(lambda: meta.backbone(str(folder)), folder, "configurations")


# checkpoints --------------------------------------------------------------------------------------


@fuzz(60)
@given(data=st.data())
def test_a_damaged_checkpoint(base: Path, data: Any) -> None:
    """Filled whole, or a clear error."""
    folder = base / "checkpoint-1"
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint.save(folder, {"student": network}, {"student": optimizer}, {"stage": "distill"})
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    good = path.read_bytes()
    damaged = spoilt(good) if path.suffix == ".safetensors" else spoilt_bytes(good) | VALUES.map(
        lambda value: json.dumps(value).encode("utf-8", "surrogatepass")
    )  # fmt: skip
    path.write_bytes(data.draw(damaged))
    reading(
        lambda: checkpoint.load(folder, {"student": network}, {"student": optimizer}),
        folder,
        "checkpoints",
    )
    reading(lambda: checkpoint.state_of(folder), folder, "checkpoints")


# found by the properties above, by name ----------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_network_of_endless_layers_is_not_begun(base: Path, teacher: Teacher, part: str) -> None:
    folder = shutil.copytree(base / "teacher", base / "endless", dirs_exist_ok=True)
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    key = "num_hidden_layers" if part == "text_encoder" else "layers_per_block"
    path.write_text(json.dumps(config | {key: 2**31}))
    for read in (load_teacher, meta.parts_of):
        with (
            patient(),
            pytest.raises(UserError, match=f"{key}=2147483648; no network has"),
        ):
            read(str(folder))


NAN = float("nan")
UNET, VAE, WORDS = "unet/config.json", "vae/config.json", "text_encoder/config.json"
STEPS, TOKENS = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"
NESTED = b'{"a":' * 100_000


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (UNET, {"sample_size": 0}, "sample_size=0; a whole number above 0"),
        (UNET, {"sample_size": -8}, "sample_size=-8; a whole number above 0"),
        (UNET, {"layers_per_block": -1}, "layers_per_block=-1; no network has less"),
        (UNET, {"mid_block_scale_factor": {}}, "has an object for mid_block_scale_factor"),
        (VAE, {"scaling_factor": "x"}, "scaling_factor='x'.* accepted are a finite number above 0"),
        (VAE, {"scaling_factor": 0}, "scaling_factor=0 "),
        (VAE, {"scaling_factor": NAN}, "scaling_factor=nan"),
        (VAE, {"shift_factor": NAN}, "shift_factor=nan"),
        (STEPS, {"beta_end": NAN}, "beta_end=nan; accepted are numbers between 0 and 1"),
        (STEPS, {"beta_start": 0}, "beta_start=0 "),
        (STEPS, {"timestep_spacing": "x"}, "timestep_spacing='x'; supported are leading"),
        (WORDS, {"quantization_config": {"quant_method": "bitsandbytes"}}, "not quantised"),
        (TOKENS, None, r"tokenizer in .* has model_max_length=1000000.*; accepted are 3 to 24"),
        (TOKENS, {"model_max_length": -5}, "model_max_length=-5; accepted are 3 to 24"),
        (TOKENS, {"model_max_length": 2}, "model_max_length=2; accepted are 3 to 24"),
        (TOKENS, {"model_max_length": 10**9}, "model_max_length=1000000000; accepted are 3 to 24"),
        (TOKENS, {"model_max_length": 24.0}, r"model_max_length=24\.0; accepted are 3 to 24"),
        (UNET, NESTED, "unet/config.json cannot be loaded: nested too deeply"),
        (VAE, NESTED, "vae/config.json cannot be loaded: nested too deeply"),
        (WORDS, NESTED, "text_encoder/config.json cannot be loaded: nested too deeply"),
        (SHARDS, {"weight_map": [1, 2]}, "index.json has no weight_map"),
        (SHARDS, b'"abc"', "index.json cannot be loaded: a str where an object is wanted"),
        (SHARDS, b"3", "index.json cannot be loaded: a int where an object is wanted"),
    ],
)
def test_what_a_pipelines_files_say_is_looked_at_before_it_is_a_teacher(
    base: Path, teacher: Teacher, name: str, change: Any, said: str
) -> None:
    """Its weights are whole, and diffusers loads most of these."""
    shutil.rmtree(base / "changed", ignore_errors=True)
    path = shutil.copytree(base / "teacher", base / "changed") / name
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | change))
    with patient(), pytest.raises(UserError, match=said):
        load_teacher(str(base / "changed"))


def test_a_tokenizer_whose_pipeline_says_the_length_may_say_anything(base: Path) -> None:
    """T5's is without one in SD3's folder as it is published."""
    folder = tiny.flow_folder(base / "flow")
    path = folder / "tokenizer_3/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 10**30}))
    read = load_pipeline(folder)
    assert read.pipeline.tokenizer_3.model_max_length == 10**30
    assert all(v.isfinite().all() for v in read.encode_prompts(["a cat"]).values())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_no_floats(base: Path, teacher: Teacher, part: str) -> None:
    folder = shutil.copytree(base / "teacher", base / f"whole-{part}", dirs_exist_ok=True)
    (path,) = (folder / part).glob("*.safetensors")
    content = save({k: v.int() for k, v in load_file(path).items()}, metadata={"format": "pt"})
    put(path, content)
    with pytest.raises(UserError, match=r"has .* in I32; accepted are floats"):
        load_teacher(str(folder))
    if part == "vae":
        with pytest.raises(UserError, match="in I32; accepted are floats"):
            load_vae(str(folder / "vae"))


def test_pictures_that_are_not_finite_are_no_pictures(base: Path, teacher: Teacher) -> None:
    broken = load_teacher(str(base / "teacher"))
    broken.denoiser.network.conv_out.bias.fill_(NAN)
    with pytest.raises(UserError, match="teacher draws holds numbers that are none"):
        broken.sample(["a cat"], broken.noise(1, 0), 1, 1.0)
    with pytest.raises(UserError, match="the student draws holds numbers that are none"):
        to_uint8(torch.full((1, 3, 2, 2), NAN))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_rank": 3.7}, "lora_rank"),
        ({"lora_rank": True}, "lora_rank"),
        ({"teacher_guidance_scale": float("inf")}, "finite"),
        ({"averaged_updates": 1e400}, "averaged_updates"),
        ({"student_timesteps": []}, "student_timesteps"),
        ({"student_timesteps": [0]}, "student_timesteps"),
        ({"teacher": {"nme": "x"}}, "teacher.name"),
        ({"teacher": {"name": 3}}, "teacher.name"),
    ],
)
def test_notes_are_read_as_they_are_or_not_at_all(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    put(tmp_path / export.NOTES, json.dumps(NOTES | change).encode())
    with pytest.raises(UserError, match=said):
        export.notes_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"9" * 8, b"[" * 100, WHOLE[:40]])
def test_a_header_that_is_none(content: bytes, tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors", content)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        meta.stored_bytes(tmp_path)
    put(tmp_path / "a.safetensors", WHOLE)
    assert meta.stored_bytes(tmp_path) == 4 * (6 + 2)


@pytest.mark.parametrize("std", [None, [0.5], [0.5, 0.5, 0], [0.5, 0.5, float("nan")], "abc"])
def test_statistics_that_are_none(std: Any, tmp_path: Path) -> None:
    put(tmp_path / "preprocessor_config.json", json.dumps({"image_std": std}).encode())
    with pytest.raises(UserError, match="image_std"):
        statistics_of(tmp_path)
