"""LoRA files through the loaders they are for: diffusers' and peft's own, and ComfyUI's rules."""

import functools
import json
from pathlib import Path
from typing import Any

import comfyui
import pytest
import tiny_export as tiny
import torch
from diffusers import AuraFlowTransformer2DModel, PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.models import lora_keys
from flashdmd.models.single_file import to_single_file

A, B = torch.ones(2, 4), torch.ones(3, 2)
SCALE = 0.75  # alpha / rank, not the 1 that a loader would take for granted


KINDS = ("sd1", "sdxl", "sd3", "flux")  # the layers of SD 2 are those of the other UNets


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def saved(file: lora_keys.LoraFile, folder: Path) -> Path:
    save_file(file.tensors, folder / lora_keys.FILE_NAME, metadata=file.metadata)
    return folder


def merge_into(pipeline: Any, adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    network = tiny.network(pipeline)
    merged = lora_keys.merge(network.state_dict(), adapter, scale)
    network.load_state_dict(merged)
    return merged


def test_what_diffusers_loads_is_what_is_merged(kind: str, tmp_path: Path) -> None:
    loaded, merged = tiny.pipeline(kind), tiny.pipeline(kind)
    before = tiny.picture(loaded)
    adapter = tiny.adapter(tiny.network(loaded))
    expected = merge_into(merged, adapter, SCALE)
    saved(lora_keys.to_diffusers(adapter, tiny.component(loaded), SCALE), tmp_path)
    loaded.load_lora_weights(tmp_path)
    after = tiny.picture(loaded)
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, tiny.picture(merged), atol=1e-5, rtol=0)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    weights = tiny.network(loaded).state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tiny.picture(loaded), tiny.picture(merged), atol=1e-5, rtol=0)


def test_what_comfyui_applies_is_what_is_merged(kind: str) -> None:
    pipeline = tiny.pipeline(kind)
    name = type(pipeline).__name__
    adapter = tiny.adapter(tiny.network(pipeline))
    checkpoint = to_single_file(name, tiny.parts(pipeline))
    checkpoint = {k: v.clone() for k, v in checkpoint.items()}
    file = lora_keys.to_comfyui(adapter, name, SCALE)
    assert comfyui.apply(file.tensors, checkpoint, pipeline) == set()
    merge_into(pipeline, adapter, SCALE)
    expected = to_single_file(name, tiny.parts(pipeline))
    assert checkpoint.keys() == expected.keys()
    for key, weight in checkpoint.items():
        torch.testing.assert_close(weight, expected[key], atol=1e-6, rtol=1e-6)


def test_diffusers_reads_what_comfyui_does(kind: str, tmp_path: Path) -> None:
    pipeline = tiny.pipeline(kind)
    drawn = tiny.adapter(tiny.network(pipeline))
    adapter = {k: v for k, v in drawn.items() if "add_embedding" not in k}  # it does not know these
    expected = lora_keys.merge(tiny.network(pipeline).state_dict(), adapter, SCALE)
    saved(lora_keys.to_comfyui(adapter, type(pipeline).__name__, SCALE), tmp_path)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(tiny.network(pipeline).state_dict(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("header", [True, False])
def test_rank_and_alpha_are_right_with_the_header_and_without(header: bool, tmp_path: Path) -> None:
    pipeline = tiny.pipeline("flux")
    adapter = {k: v for k, v in tiny.adapter(pipeline.transformer).items() if "proj_mlp" in k}
    file = lora_keys.to_diffusers(adapter, "transformer", SCALE)
    told = json.loads(file.metadata["lora_adapter_metadata"])
    assert told["transformer.r"] == told["transformer.lora_alpha"] == 4
    saved(file if header else file._replace(metadata={}), tmp_path)
    *_, read = pipeline.lora_state_dict(tmp_path, return_alphas=True, return_lora_metadata=True)
    assert read == (told if header else None)
    pipeline.load_lora_weights(tmp_path)
    config = pipeline.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha, config.rank_pattern) == (4, 4, {})
    assert set(config.target_modules) == {name for name, _, _ in lora_keys.layers(adapter)}


def test_a_layer_whose_name_ends_others_moves_alone(tmp_path: Path) -> None:
    pipeline = tiny.pipeline("flux")  # it has proj_out, and single_transformer_blocks.0.proj_out
    adapter = {k: v for k, v in tiny.adapter(pipeline.transformer).items() if k[:8] == "proj_out"}
    expected = lora_keys.merge(pipeline.transformer.state_dict(), adapter, SCALE)
    pipeline.load_lora_weights(
        saved(lora_keys.to_diffusers(adapter, "transformer", SCALE), tmp_path)
    )
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline.transformer.state_dict(), expected)


@pytest.mark.parametrize("alpha", [4, 6])
def test_merging_is_pefts(alpha: int) -> None:
    unet = tiny.pipeline("sd1").unet  # linear layers, convolutions of 1 x 1 and of 3 x 3
    base = {k: v.clone() for k, v in unet.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=list(tiny.layers(unet)))
    inject_adapter_in_model(config, unet)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    adapter = get_peft_model_state_dict(unet)
    ours = lora_keys.merge(base, adapter, alpha / 4)
    moved = 0
    for name, layer in unet.named_modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
            torch.testing.assert_close(ours[f"{name}.weight"], layer.base_layer.weight.data)
            moved += 1
    assert moved == len(adapter) / 2 == len(tiny.layers(tiny.pipeline("sd1").unet))
    assert all(ours[k] is base[k] for k in base if k.endswith(".bias"))


def test_merging_is_done_in_float32_and_keeps_the_dtype() -> None:
    base = {"x.weight": torch.full((1, 1), 256.0, dtype=torch.bfloat16)}
    small = {"x.lora_A.weight": torch.ones(4, 1), "x.lora_B.weight": torch.full((1, 4), 1.001 / 4)}
    merged = lora_keys.merge(base, small)["x.weight"]  # steps of 2 here, so 1.001 counts
    assert (merged.dtype, merged.item()) == (torch.bfloat16, 258.0)
    step = 1 + 2**-7
    half = {k: torch.full((1, 1), step, dtype=torch.bfloat16) for k in small}
    assert lora_keys.merge({"x.weight": torch.zeros(1, 1)}, half)["x.weight"].item() == step**2


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 16)
        self.wide = nn.Conv2d(8, 12, 3)
        self.point = nn.Conv2d(8, 12, 1)
        self.small = nn.Linear(24, 2)
        self.still = nn.Linear(4, 4)


def moved(base: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A fine-tuning whose change has this rank in every layer but `still`."""
    network = Layers()
    adapter = {k: v for k, v in tiny.adapter(network, rank).items() if "still" not in k}
    return lora_keys.merge(base, adapter)


def test_a_change_of_no_higher_rank_is_extracted_exactly() -> None:
    base = Layers().state_dict()
    tuned = moved(base, rank=3)
    adapter, errors, error = lora_keys.from_full(base, tuned, rank=5)
    assert {k.split(".")[0] for k in adapter} == {"linear", "wide", "point", "small"}
    assert lora_keys.rank_of(adapter) == 5  # of `small` as well, which has 2 rows
    assert errors.keys() == {"linear.weight", "wide.weight", "point.weight", "small.weight"}
    assert max(errors.values()) < 1e-5
    assert error < 1e-5
    merged = lora_keys.merge(base, adapter)
    for key in base:
        torch.testing.assert_close(merged[key], tuned[key], atol=1e-6, rtol=1e-5)


def test_what_is_lost_of_a_change_is_what_must_be_lost() -> None:
    """Eckart and Young: no matrix of rank r is nearer than the first r singular values."""
    base = {"a.weight": torch.zeros(96, 80), "c.weight": torch.zeros(40, 8, 3, 3)}
    lost = {
        "a.bias": torch.full((96,), 2.0),
        "table": torch.full((6, 96), 0.5),
    }  # no layers' weights
    tuned = {k: torch.randn_like(v) for k, v in base.items()} | lost
    base |= {k: torch.zeros_like(v) for k, v in lost.items()}
    _, errors, error = lora_keys.from_full(base, tuned, rank=8)
    for key in ("a.weight", "c.weight"):
        values = torch.linalg.svdvals(tuned[key].flatten(1))
        lost[key] = values[8:].norm()
        best = float(lost[key] / values.norm())
        assert best * (1 - 1e-6) < errors[key] < 1.003 * best
    assert errors["a.bias"] == errors["table"] == 1.0
    total = torch.cat([v.flatten() for v in tuned.values()]).norm()
    everything = float(torch.stack([v.norm() for v in lost.values()]).norm() / total)
    assert everything * (1 - 1e-6) < error < 1.003 * everything


def test_extraction_is_repeatable_and_draws_nothing_of_its_callers() -> None:
    base = Layers().state_dict()
    tuned = {k: v + torch.randn_like(v) for k, v in base.items()}
    state = torch.random.get_rng_state()
    first = lora_keys.from_full(base, tuned, rank=2)
    assert torch.equal(state, torch.random.get_rng_state())
    again = lora_keys.from_full(base, tuned, rank=2)
    assert all(torch.equal(first.adapter[k], again.adapter[k]) for k in again.adapter)
    assert (first.errors, first.error) == (again.errors, again.error)


def test_nothing_changed_is_an_empty_adapter() -> None:
    base = Layers().state_dict()
    assert lora_keys.from_full(base, base, rank=2) == ({}, {}, 0.0)


class Pipeline:
    """A pipeline as far as its class and its transformer."""

    def __init__(self, name: str, transformer: nn.Module) -> None:
        self.__class__ = type(name, (Pipeline,), {})
        self.transformer = transformer


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=8, sample_size=8, caption_channels=6,
        use_additional_conditions=True,
    )  # fmt: skip


def aura() -> nn.Module:
    return AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
        pos_embed_max_size=64,
    )  # fmt: skip


@functools.cache
def of_its_class(kind: str) -> Any:
    """Only to be looked at."""
    if kind == "pixart":
        return Pipeline("PixArtSigmaPipeline", pixart())
    if kind == "aura":
        return Pipeline("AuraFlowPipeline", aura())
    return tiny.pipeline(kind)


@pytest.mark.parametrize("kind", [*KINDS, "pixart", "aura"])
def test_comfyui_looks_for_every_key_that_it_is_given(kind: str) -> None:
    pipeline = of_its_class(kind)
    adapter = tiny.adapter(tiny.network(pipeline))
    keys = lora_keys.to_comfyui(adapter, type(pipeline).__name__).tensors
    ends = (".lora_up.weight", ".lora_down.weight", ".lora_A.weight", ".lora_B.weight", ".alpha")
    for key in keys:
        name = next(key.removesuffix(end) for end in ends if key.endswith(end))
        assert name in comfyui.names(pipeline), key
    assert len([k for k in keys if "alpha" not in k]) == len(adapter)


@pytest.mark.parametrize("kind", [*KINDS, "pixart", "aura"])
@pytest.mark.parametrize(
    "layer",
    [
        "time_embedding.cond_proj",
        "encoder_hid_proj",
        "mid_block.attentions.0.transformer_blocks.0.attn1.add_k_proj",
        "down_blocks.0.attentions.0.to_q",
        "transformer_blocks.0.attn.to_qkv",
        "single_transformer_blocks.0.attn.to_out.0.extra",
    ],
)
def test_layers_that_comfyui_would_skip_are_refused(kind: str, layer: str) -> None:
    pipeline = of_its_class(kind)
    adapter = {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    assert not any(n.endswith(layer.replace(".", "_")) for n in comfyui.names(pipeline))
    with pytest.raises(UserError, match=rf"skips {layer} of a {type(pipeline).__name__}"):
        lora_keys.to_comfyui(adapter, type(pipeline).__name__)


def test_pipelines_that_comfyui_does_not_know_are_named() -> None:
    with pytest.raises(UserError, match=r"no layer of a SanaPipeline .* FluxPipeline, "):
        lora_keys.to_comfyui({}, "SanaPipeline")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"x.lora_A.weight": A}, "has no x.lora_B.weight"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B, "x.lora_B.bias": B}, "no lora_bias"),
        (
            {"x.lora_A.weight": A, "x.lora_B.weight": B, "y.lora_A.weight": A[:1]}
            | {"y.lora_B.weight": B[:, :1]},
            r"layers of ranks \[1, 2\]",
        ),
        ({}, r"layers of ranks \[\]"),
    ],
)
def test_an_adapter_that_cannot_be_exported_is_refused(
    adapter: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        lora_keys.to_diffusers(adapter, "unet")


def test_an_adapter_or_a_fine_tuning_of_another_network_is_refused() -> None:
    adapter = {"x.lora_A.weight": A, "x.lora_B.weight": B}
    with pytest.raises(UserError, match=r"x.weight of shape \(3, 4\), which does not exist"):
        lora_keys.merge({}, adapter)
    with pytest.raises(UserError, match=r"which is \(4, 4\) in this network"):
        lora_keys.merge({"x.weight": torch.ones(4, 4)}, adapter)
    with pytest.raises(UserError, match=r"x is \(2, 4\) in the base and None in it"):
        lora_keys.from_full({"x": A}, {}, rank=1)
    with pytest.raises(UserError, match="rank=0 must be 1 or more"):
        lora_keys.from_full({}, {}, rank=0)
