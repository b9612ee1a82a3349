"""Backbones of transformers at tiny size: the stock classes' states, frozen, at any size."""

import copy
import json
import sys
from logging import Handler as Listener
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextV2Backbone,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextBackbone,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
)
from transformers.utils import logging

from flashdmd.discriminator import Discriminator
from flashdmd.errors import UserError
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.models.vision import (
    CENTRED,
    IMAGENET,
    PyramidMaps,
    Vision,
    chosen,
    fitted,
    load_backbone,
    resized,
    timm_backbone,
)

GLOBAL = (1, 3)
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def sam_config(size: int = 64) -> SamVisionConfig:
    return SamVisionConfig(
        **VIT,
        image_size=size,
        patch_size=8,
        window_size=3,
        global_attn_indexes=list(GLOBAL),
        mlp_dim=48,
        output_channels=16,
        num_pos_feats=8,
    )


SAM = sam_config()
DINO2 = Dinov2Config(**VIT, image_size=56, patch_size=14, mlp_ratio=2)
REGISTERS = Dinov2WithRegistersConfig(**VIT, image_size=56, patch_size=14, num_register_tokens=3)
DINO3 = DINOv3ViTConfig(**VIT, image_size=64, patch_size=16, intermediate_size=48)
DINO3.num_register_tokens = 2
SIZES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
CONVNEXT = ConvNextV2Config(**SIZES, image_size=64)
DINO3_CONVNEXT = DINOv3ConvNextConfig(**SIZES, image_size=64)
RESNET = ResNetConfig(**SIZES, embedding_size=8, layer_type="basic")
SWIN = SwinConfig(embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4], window_size=4)
SWIN.image_size = 64
MADE: dict[str, tuple[Any, Any]] = {
    "sam": (SamVisionModel, SAM),
    "dinov2": (Dinov2ForImageClassification, DINO2),
    "registers": (Dinov2WithRegistersModel, REGISTERS),
    "dinov3": (DINOv3ViTModel, DINO3),
    "convnext": (ConvNextV2ForImageClassification, CONVNEXT),
    "dinov3-convnext": (DINOv3ConvNextModel, DINO3_CONVNEXT),
    "resnet": (ResNetForImageClassification, RESNET),
    "swin": (SwinForImageClassification, SWIN),
}
TRANSFORMERS = ["sam", "dinov2", "registers", "dinov3"]


def randomised(network: Any) -> Any:
    """No weight is left at the zero or one that would hide it."""
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            nn.init.normal_(m.running_mean)
    return network.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind as its own library saves it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("backbones")
    for name, (network, config) in MADE.items():
        randomised(network(config)).save_pretrained(root / name)
    return {name: root / name for name in MADE}


def pictures(height: int = 64, width: int = 64, n: int = 2) -> Tensor:
    return torch.rand(n, 3, height, width) * 2 - 1


def normalised(images: Tensor) -> Tensor:
    """As SAM says it, of 0..255; DINO's numbers are the same."""
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    return (images * 127.5 + 127.5 - mean) / torch.tensor([58.395, 57.12, 57.375])[:, None, None]


def close(maps: list[Tensor], expected: list[Tensor] | tuple[Tensor, ...]) -> None:
    assert len(maps) == len(expected)
    for a, b in zip(maps, expected, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, atol=2e-5 * scale, rtol=0)


# SAM


def sam_states(network: SamVisionModel, images: Tensor) -> list[Tensor]:
    states = network(normalised(images), output_hidden_states=True).hidden_states
    return [states[i + 1].permute(0, 3, 1, 2) for i in GLOBAL]


@torch.no_grad()
def test_sam_gives_the_stock_models_states_after_its_global_blocks(
    folders: dict[str, Path],
) -> None:
    images = pictures()
    maps = load_backbone(str(folders["sam"]))(images)
    close(maps, sam_states(SamVisionModel.from_pretrained(folders["sam"]), images))
    assert [m.shape for m in maps] == [(2, 32, 8, 8)] * 2


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 96])
def test_sam_of_another_size_is_the_stock_model_with_its_tables_interpolated(
    folders: dict[str, Path], size: int
) -> None:
    """Absolute positions bicubically; relative ones linearly, of the global blocks alone."""
    images, grid = pictures(size, size), size // 8
    weights = load_file(folders["sam"] / "model.safetensors")
    table = weights["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    table = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
    weights["vision_encoder.pos_embed"] = table.permute(0, 2, 3, 1)
    for i in GLOBAL:
        for side in "hw":
            key = f"vision_encoder.layers.{i}.attn.rel_pos_{side}"
            weights[key] = F.interpolate(weights[key].T[None], 2 * grid - 1, mode="linear")[0].T
    stock = SamVisionModel(sam_config(size)).eval()
    stock.load_state_dict(weights)
    close(load_backbone(str(folders["sam"]))(images), sam_states(stock, images))


@torch.no_grad()
def test_sams_heights_and_widths_are_not_mixed_up(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of pictures turned about their diagonal, a network so turned gives maps so turned."""
    weights = load_file(folders["sam"] / "model.safetensors")
    turned = {k.replace("rel_pos_h", "rel_pos_?"): v for k, v in weights.items()}
    turned = {k.replace("rel_pos_w", "rel_pos_h").replace("_?", "_w"): v for k, v in turned.items()}
    turned["vision_encoder.pos_embed"] = turned["vision_encoder.pos_embed"].transpose(1, 2)
    kernel = turned["vision_encoder.patch_embed.projection.weight"]
    turned["vision_encoder.patch_embed.projection.weight"] = kernel.transpose(2, 3)
    turned = {k: v.contiguous() for k, v in turned.items()}
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders["sam"] / "config.json").read_text())
    images = pictures(40, 72)
    maps = load_backbone(str(folders["sam"]))(images)
    assert [m.shape for m in maps] == [(2, 32, 5, 9)] * 2
    others = load_backbone(str(tmp_path))(images.transpose(2, 3))
    close(maps, [m.transpose(2, 3) for m in others])


def test_a_table_of_positions_stays_what_it_is_at_its_own_size() -> None:
    for table in (torch.randn(1, 8, 8, 32), torch.randn(1, 5, 9, 4).bfloat16()):
        assert torch.equal(resized(table, *table.shape[1:3]), table)


@torch.no_grad()
def test_a_whole_sam_is_loaded_as_its_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    config = SamConfig(
        vision_config=SAM.to_dict(),
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2},
    )
    whole = randomised(SamModel(config))
    encoder = SamVisionModel.from_pretrained(folders["sam"]).vision_encoder
    whole.vision_encoder.load_state_dict(encoder.state_dict())
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam"
    images = pictures()
    close(load_backbone(str(tmp_path))(images), load_backbone(str(folders["sam"]))(images))


def test_sam_b_l_and_h_are_tapped_at_their_global_blocks() -> None:
    """DINOs of the same depths at the same places."""
    assert tuple(SamVisionConfig().global_attn_indexes) == (2, 5, 8, 11)
    assert chosen("", None, 12) == (2, 5, 8, 11)
    assert chosen("", None, 24) == (5, 11, 17, 23)
    assert chosen("", None, 32) == (7, 15, 23, 31)
    assert [chosen("", None, n) for n in (1, 2, 3)] == [(0,), (0, 1), (0, 1, 2)]


# DINO


@torch.no_grad()
@pytest.mark.parametrize("size", [(56, 56), (28, 84), (70, 42)])
@pytest.mark.parametrize(
    ("name", "stock"), [("dinov2", Dinov2Backbone), ("registers", Dinov2WithRegistersBackbone)]
)
def test_dinov2_gives_the_maps_of_its_own_backbone_class(
    folders: dict[str, Path], name: str, stock: Any, size: tuple[int, int]
) -> None:
    images = pictures(*size)
    how = {"apply_layernorm": False, "out_features": STAGES}
    expected = stock.from_pretrained(folders[name], **how)(normalised(images)).feature_maps
    maps = load_backbone(str(folders[name]))(images)
    close(maps, expected)
    assert maps[0].shape == (2, 32, size[0] // 14, size[1] // 14)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_dinov3_gives_the_maps_of_its_own_backbone_class(
    folders: dict[str, Path], size: tuple[int, int]
) -> None:
    images = pictures(*size)  # the class normalises its last stage whatever it is told
    how = {"apply_layernorm": False, "out_features": STAGES[:3]}
    stock = DINOv3ViTBackbone.from_pretrained(folders["dinov3"], **how)
    expected = stock(normalised(images)).feature_maps
    close(load_backbone(str(folders["dinov3"]), blocks=(0, 1, 2))(images), expected)


@torch.no_grad()
def test_maps_are_of_the_blocks_asked_for(folders: dict[str, Path]) -> None:
    images = pictures()
    for name in TRANSFORMERS:
        every = load_backbone(str(folders[name]), blocks=(0, 1, 2, 3))(images)
        assert len(every) == 4
        first = load_backbone(str(folders[name]), blocks=(2, 0))
        close(first(images), [every[0], every[2]])
        assert len(first.maps.blocks) == 3  # type: ignore[arg-type]  # none for nothing
    every = load_backbone(str(folders["swin"]))(images)
    close(load_backbone(str(folders["swin"]), blocks=(2, 1))(images), every[1:3])


# Pyramids


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stock", "prefix"),
    [
        ("convnext", ConvNextV2Backbone, "convnextv2."),
        ("dinov3-convnext", DINOv3ConvNextBackbone, ""),
        ("resnet", ResNetBackbone, "resnet."),
        ("swin", SwinBackbone, ""),
    ],
)
def test_a_pyramid_gives_all_of_its_stages_with_the_weights_of_the_folder(
    folders: dict[str, Path], name: str, stock: Any, prefix: str
) -> None:
    config = copy.deepcopy(MADE[name][1])
    config.out_features = STAGES
    network = stock(config).eval()
    weights = MADE[name][0].from_pretrained(folders[name]).state_dict()
    weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    missing = network.load_state_dict(weights, strict=False).missing_keys
    assert all("hidden_states_norms" in k for k in missing)  # which no classifier has
    images = pictures()
    maps = load_backbone(str(folders[name]))(images)
    close(maps, network(normalised(images)).feature_maps)
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    assert len({m.shape[1] for m in maps}) == 4


@torch.no_grad()
def test_lists_of_maps_are_taken_as_they_are_channels_last_ones_turned() -> None:
    """What timm's features_only networks answer: a list; of Swin (B, H, W, C)."""
    images, network = pictures(), EfficientNetLite(0)
    close(Vision(PyramidMaps(network), CENTRED)(images), network(images))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> list[Tensor]:
            return [m.permute(0, 2, 3, 1) for m in self.network(images)]

    close(Vision(PyramidMaps(Last(), channels_last=True), CENTRED)(images), network(images))


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_timms_maps_come_channels_first(name: str) -> None:
    """Of Swin they are (B, H, W, C)."""
    network = pytest.importorskip("timm").create_model(name, features_only=True)
    backbone, images = timm_backbone(network, torch.float32), pictures(224, 224, 1)
    images.requires_grad_()
    maps = backbone(images)
    assert [m.shape[1] for m in maps] == network.feature_info.channels()
    assert [m.shape[-1] for m in maps] == [56, 28, 14, 7]
    expected = network(normalised(images))
    turned = name.startswith("swin")
    close(maps, [m.permute(0, 3, 1, 2) if turned else m for m in expected])
    (gradient,) = torch.autograd.grad(sum(m.square().mean() for m in maps), images)
    assert gradient.any()


@torch.no_grad()
def test_efficientnet_lite0_is_bit_for_bit_what_it_was() -> None:
    images = pictures(64, 96)
    maps = load_backbone("efficientnet-lite0")(images)
    for a, b in zip(maps, EfficientNetLite(0)(images), strict=True):
        assert torch.equal(a, b)


# What is common to all

ALL = [*MADE, "efficientnet-lite0"]


def named(folders: dict[str, Path], name: str) -> str:
    return str(folders.get(name, name))


@pytest.mark.parametrize("name", ALL)
def test_the_picture_gets_a_gradient_and_the_weights_none(
    folders: dict[str, Path], name: str
) -> None:
    backbone = load_backbone(named(folders, name)).train()
    assert not any(m.training for m in backbone.modules())
    images = pictures().requires_grad_()
    sum(m.square().mean() for m in backbone(images)).backward()
    assert images.grad is not None
    assert (images.grad.abs().sum(1) > 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ALL)
def test_weights_in_half_precision_give_maps_in_the_pictures(
    folders: dict[str, Path], name: str
) -> None:
    images = pictures().requires_grad_()
    half = load_backbone(named(folders, name), torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    maps, expected = half(images), load_backbone(named(folders, name))(images)
    for a, b in zip(maps, expected, strict=True):
        assert a.dtype == torch.float32
        assert ((a - b).norm() / b.norm()).item() < 0.1
    sum(m.square().mean() for m in maps).backward()
    assert images.grad is not None
    assert images.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_under_autocast_the_maps_are_nearly_the_same(
    folders: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    backbone, images = load_backbone(named(folders, name), dtype), pictures()
    expected = load_backbone(named(folders, name))(images)
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(images)
    for a, b in zip(maps, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 0.1


@pytest.mark.parametrize("name", ALL)
def test_a_discriminator_on_it_judges_every_bucket(folders: dict[str, Path], name: str) -> None:
    judge = Discriminator(load_backbone(named(folders, name)), (64, 96), width=16)
    for size in ((64, 96), (96, 64), (80, 80), (56, 112)):
        images = pictures(*size).requires_grad_()
        logits = judge(images)
        assert logits.shape == (2, len(judge.heads))
        (gradient,) = torch.autograd.grad(logits.sum(), images)
        assert gradient.abs().sum((1, 2, 3)).min() > 0


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_checkpointed_blocks_run_twice_and_change_nothing(
    folders: dict[str, Path], name: str
) -> None:
    images = pictures().requires_grad_()
    answers = []
    for checkpointing in (False, True):
        backbone = load_backbone(str(folders[name]), checkpointing=checkpointing)
        calls: list[int] = []
        for i, block in enumerate(backbone.maps.blocks):  # type: ignore[arg-type]
            block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        maps = backbone(images)
        assert calls == [0, 1, 2, 3]
        (gradient,) = torch.autograd.grad(sum(m.square().mean() for m in maps), images)
        assert sorted(calls) == sorted([0, 1, 2, 3] * (1 + checkpointing))
        answers.append([*maps, gradient])
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)


def test_sides_become_the_nearest_multiples() -> None:
    assert fitted(512, 512, 14, None) == (518, 518)
    assert fitted(512, 512, 16, None) == (512, 512)
    assert fitted(30, 45, 14, None) == (28, 42)
    assert fitted(3, 200, 16, None) == (16, 192)
    assert fitted(512, 512, 16, 1024) == (1024, 1024)
    assert fitted(832, 1216, 16, 1024) == (704, 1024)
    assert fitted(1216, 832, 14, 518) == (518, 350)


@torch.no_grad()
def test_pictures_are_resized_to_what_the_network_takes(folders: dict[str, Path]) -> None:
    images = pictures(30, 45)
    smooth = F.interpolate(images, (28, 42), mode="bilinear", antialias=True)
    backbone = load_backbone(str(folders["dinov2"]))
    close(backbone(images), backbone(smooth))
    large = load_backbone(str(folders["sam"]), longer_side=64)
    own = F.interpolate(images, (40, 64), mode="bilinear", antialias=True)
    close(large(images), load_backbone(str(folders["sam"]))(own))


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        (None, *IMAGENET),
        (
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
            (0.5, 0.4, 0.3),
            (0.2, 0.3, 0.4),
        ),
        ({"do_normalize": False}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_pixels_are_normalised_as_the_folder_says(
    folders: dict[str, Path],
    tmp_path: Path,
    said: dict[str, Any] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    for file in folders["resnet"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if said is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    backbone, seen = load_backbone(str(tmp_path)), []
    backbone.maps.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    backbone(torch.cat([-torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32)]))
    m, s = torch.tensor(mean), torch.tensor(std)
    torch.testing.assert_close(seen[0][0, :, 0, 0], (0 - m) / s)
    torch.testing.assert_close(seen[0][1, :, 0, 0], (1 - m) / s)


# What is refused


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@torch.no_grad()
def test_a_hub_id_is_found_in_the_cache_when_offline(
    offline: Path, folders: dict[str, Path]
) -> None:
    repository = offline / "models--someone--sam-tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    for file in folders["sam"].iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    images = pictures()
    close(load_backbone("someone/sam-tiny")(images), load_backbone(str(folders["sam"]))(images))


@pytest.mark.parametrize("name", ["someone/nothing", "./runs/none", "/nowhere", "lite0", "a b"])
def test_what_is_not_there_is_an_error_that_says_what_is_accepted(offline: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no folder.*efficientnet-lite0, timm:NAME, .*DINOv2"):
        load_backbone(name)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read .*accepted are"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(UserError, match=r"config\.json cannot be read .*accepted are"):
        load_backbone(str(tmp_path))


def test_networks_that_are_no_backbones_are_refused(tmp_path: Path) -> None:
    clip = CLIPVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    clip.intermediate_size = 8
    CLIPVisionModel(clip).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model_type='clip_vision_model'; accepted are .*SAM"):
        load_backbone(str(tmp_path))
    for kind in ("nonsense", "timm_backbone"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=rf"model_type='{kind}'; accepted are .*timm:NAME"):
            load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [{"model_type": "resnet", "depths": "x"}, {"model_type": "dinov2", "hidden_size": "x"}],
)
def test_a_config_of_other_values_is_refused(tmp_path: Path, config: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)cannot be .*: Validation error for field"):
        load_backbone(str(tmp_path))


def test_loading_says_nothing_and_leaves_the_librarys_voice_as_it_was(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a classifier's head that a backbone has no use for, or the norms that it adds."""
    said: list[str] = []
    listener = Listener()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = logging.get_verbosity()
    logging.add_handler(listener)
    try:
        load_backbone(str(folders["swin"]))
    finally:
        logging.remove_handler(listener)
    assert said == []
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before < logging.ERROR


def test_pickles_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders["sam"] / "config.json").read_text())
    with pytest.raises(UserError, match="has no safetensors; if you trust"):
        load_backbone(str(tmp_path))
    weights = load_file(folders["sam"] / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only a pickle"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "key"),
    [("sam", "layers.2.attn.rel_pos_h"), ("dinov2", "norm1.bias"), ("resnet", "running_mean")],
)
def test_weights_that_are_missing_or_of_another_shape_are_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, key: str
) -> None:
    (tmp_path / "config.json").write_text((folders[name] / "config.json").read_text())
    weights = load_file(folders[name] / "model.safetensors")
    gone = next(k for k in weights if key in k)
    tensor = weights.pop(gone)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_backbone(str(tmp_path))
    weights[gone] = torch.cat([tensor, tensor])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path))


def test_blocks_that_there_are_not_are_refused(folders: dict[str, Path]) -> None:
    for name in ("sam", "dinov3", "convnext"):
        for blocks in ((1, 4), (-1,), ()):
            with pytest.raises(UserError, match=r"must be one or more of 0\.\.3"):
                load_backbone(str(folders[name]), blocks=blocks)
    with pytest.raises(UserError, match="leave blocks out"):
        load_backbone("efficientnet-lite0", blocks=(1,))


@pytest.mark.parametrize("name", ["resnet", "efficientnet-lite0"])
def test_a_pyramid_cannot_be_checkpointed(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be checkpointed; SAM, .*can"):
        load_backbone(named(folders, name), checkpointing=True)


def test_timm_is_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm:resnet18 needs the package timm: pip install timm"):
        load_backbone("timm:resnet18")
