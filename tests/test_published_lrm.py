"""The published latent reward models' own names and files, at tiny size, from the real classes."""

from pathlib import Path

import pytest
import tiny_reward
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_reward import PROMPTS, stirred
from torch import Tensor

from flashdmd import cli
from flashdmd.errors import UserError
from flashdmd.models.latent_reward import LRM, build, load, open_base, write
from flashdmd.models.published_lrm import load_published
from flashdmd.schedule import Process, VariancePreserving

VP = Process(VariancePreserving(), "eps")
T = torch.tensor([1.0, 501.0, 951.0])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_reward.folder_of(kind, root / kind) for kind in ("sd", "sdxl")}


def old_names(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """As transformers 4 wrote every CLIP text encoder."""
    state = {
        name if name.startswith("text_") else f"text_model.{name}": value.contiguous()
        for name, value in encoder.state_dict().items()
    }
    return {**state, "text_model.embeddings.position_ids": torch.arange(24)[None]}


def publish(kind: str, base: Path, folder: Path) -> LRM:
    """A folder as LPO's code leaves it; returns what it should be read as."""
    torch.manual_seed(2)
    pipeline = open_base(str(base))
    stirred(pipeline.unet)
    names = ("text_encoder", "text_encoder_2") if kind == "sdxl" else ("text_encoder",)
    pipeline.unet.save_pretrained(folder / "unet")
    for name in names:
        (folder / name).mkdir()
        encoder = stirred(getattr(pipeline, name))
        save_file(old_names(encoder), folder / name / "model.safetensors")
    reward = build(pipeline, str(base))
    with torch.no_grad():
        reward.network.visual.weight.normal_()
        reward.network.logit_scale.fill_(3.5)
    heads = {"visual_projection": reward.network.visual.state_dict(), "logit_scale": 3.5}
    if kind == "sd":
        stirred(reward.network.text)
        heads["text_projection"] = reward.network.text.state_dict()
    torch.save(heads, folder / "state_dict.pt")
    return reward


def flat_names(folder: Path) -> dict[str, Tensor]:
    """The whole module's state dict, with what it holds and a reward does not need."""
    heads = torch.load(folder / "state_dict.pt", weights_only=True)
    state = {
        "vae.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "logit_scale": torch.tensor(heads["logit_scale"]),
        "visual_projection.weight": heads["visual_projection"]["weight"],
    }
    if "text_projection" in heads:
        state["text_projection.weight"] = heads["text_projection"]["weight"]
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for file in (folder / part).glob("*.safetensors"):
            state |= {f"{part}.{name}": value for name, value in load_file(file).items()}
    return state


def same(ours: LRM, theirs: LRM) -> None:
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        expected = theirs(x, T, theirs.encode_prompts(PROMPTS))
        torch.testing.assert_close(ours(x, T, ours.encode_prompts(PROMPTS)), expected)
    state = theirs.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_published_folder_is_read_by_its_names(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    reward = publish(kind, bases[kind], tmp_path / "lrm")
    with pytest.raises(UserError, match=r"state_dict\.pt is a pickle; safetensors are accepted"):
        load_published(tmp_path / "lrm", str(bases[kind]))
    loaded = load_published(tmp_path / "lrm", str(bases[kind]), unpickle=True)
    same(loaded, reward)
    assert loaded.network.logit_scale.item() == 3.5
    untouched = build(open_base(str(bases[kind])), "base").state_dict()
    changed = {k.split(".")[0] for k, v in loaded.state_dict().items() if (v != untouched[k]).any()}
    assert changed == {"network", "words"}

    write(loaded, tmp_path / "ours")
    vae = AutoencoderKL.from_pretrained(bases[kind] / "vae")
    same(load(tmp_path / "ours", VP, vae), reward)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_one_file_of_the_whole_module_is_read_too(
    ending: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    reward = publish("sdxl", bases["sdxl"], tmp_path / "lrm")
    file, state = tmp_path / f"lrm.{ending}", flat_names(tmp_path / "lrm")
    if ending == "bin":
        torch.save(state, file)
    else:
        save_file(state, file)
    same(load_published(file, str(bases["sdxl"]), unpickle=ending == "bin"), reward)


def test_half_precision_beside_full_is_not_read(bases: dict[str, Path], tmp_path: Path) -> None:
    reward = publish("sd", bases["sd"], tmp_path / "lrm")
    unet = tmp_path / "lrm/unet/diffusion_pytorch_model.safetensors"
    half = {k: v.half() for k, v in load_file(unet).items()}
    save_file(half, tmp_path / "lrm/unet/diffusion_pytorch_model.fp16.safetensors")
    same(load_published(tmp_path / "lrm", str(bases["sd"]), unpickle=True), reward)
    unet.unlink()
    read = load_published(tmp_path / "lrm", str(bases["sd"]), unpickle=True)
    weight = read.network.trunk.conv_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, reward.network.trunk.conv_in.weight.half().float())


def test_weights_that_lack_or_are_too_many_or_of_another_shape_are_named(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    publish("sd", bases["sd"], tmp_path / "lrm")
    whole = flat_names(tmp_path / "lrm")
    file = tmp_path / "lrm.safetensors"

    def refused(state: dict[str, Tensor], match: str, base: str = "sd") -> None:
        save_file(state, file)
        with pytest.raises(UserError, match=match):
            load_published(file, str(bases[base]))

    without = {k: v for k, v in whole.items() if k != "unet.mid_block.resnets.0.conv1.weight"}
    refused(without, r"lacks 1 weights \(network\.trunk\.mid_block\.resnets\.0\.conv1\.weight\)")
    refused({**whole, "adapter.weight": torch.zeros(1)}, r"should not, 1 weights \(adapter\.weight")
    wide = {**whole, "visual_projection.weight": torch.zeros(32, 97)}
    refused(wide, r"of another shape, 1 weights \(network\.visual\.weight\)")
    refused(whole, r"is no latent reward model on .*sdxl.*lacks \d+ weights .*, \.\.\.\)", "sdxl")


def test_what_cannot_be_a_published_model_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no published latent reward model: a folder of unet"):
        load_published(tmp_path, str(bases["sd"]))
    (tmp_path / "lrm.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"lrm\.safetensors cannot be read"):
        load_published(tmp_path / "lrm.safetensors", str(bases["sd"]))
    torch.save({"unet": Process}, tmp_path / "lrm.bin")  # a class: more than tensors and numbers
    with pytest.raises(UserError, match=r"lrm\.bin cannot be read"):
        load_published(tmp_path / "lrm.bin", str(bases["sd"]), unpickle=True)


def test_a_published_folder_is_taken_over_by_a_command(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = publish("sd", bases["sd"], tmp_path / "lrm")
    words = ["import-reward", str(tmp_path / "lrm"), "--base", str(bases["sd"])]
    words += ["--output", str(tmp_path / "ours")]
    codes = []
    for more in ([], ["--unpickle"], ["--unpickle"]):  # refused, written, there already
        monkeypatch.setattr("sys.argv", ["flashdmd", *words, *more])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        codes.append(int(caught.value.code or 0))
    assert codes == [2, 0, 2]
    vae = AutoencoderKL.from_pretrained(bases["sd"] / "vae")
    same(load(tmp_path / "ours", reward.process, vae), reward)
