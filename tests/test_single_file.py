"""Single files through diffusers' own readers; at published sizes, what ComfyUI takes them for."""

import types
from pathlib import Path
from typing import Any

import comfyui
import pytest
import tiny_export as tiny
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.models.single_file import to_single_file

NETWORK = "model.diffusion_model."
FLUX_WIDTH = 32  # of the tiny one; diffusers' reader takes 3072 for granted


def narrow(width: int) -> Any:
    """diffusers' reader of FLUX with its constant 3072 replaced, and nothing else."""
    reader = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    constants = tuple(width if c == 3072 else c for c in reader.__code__.co_consts)
    assert constants != reader.__code__.co_consts
    code = reader.__code__.replace(co_consts=constants)
    return types.FunctionType(code, reader.__globals__)


@pytest.fixture(scope="module", params=tiny.KINDS)
def pipeline(request: pytest.FixtureRequest) -> Any:
    return tiny.pipeline(request.param)


def name(pipeline: Any) -> str:
    return type(pipeline).__name__


def read_network(pipeline: Any, checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    bare = {k.removeprefix(NETWORK): v for k, v in checkpoint.items() if k.startswith(NETWORK)}
    if hasattr(pipeline, "unet"):
        return single_file_utils.convert_ldm_unet_checkpoint(checkpoint, pipeline.unet.config)
    if name(pipeline) == "FluxPipeline":
        return narrow(FLUX_WIDTH)(bare)
    return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(bare)


def assert_same(read: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert read.keys() == state.keys()
    for key, weight in state.items():
        assert torch.equal(read[key], weight), key


def test_diffusers_reads_every_weight_back_bit_for_bit(pipeline: Any) -> None:
    parts = tiny.parts(pipeline)
    checkpoint = to_single_file(name(pipeline), parts)
    assert_same(read_network(pipeline, checkpoint), parts[tiny.component(pipeline)])
    vae = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, pipeline.vae.config)
    assert_same(vae, parts["vae"])


def test_a_pipeline_read_from_one_file_draws_the_same_picture(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(readers, "checkpoint_mapping_fn", narrow(FLUX_WIDTH))
    pipeline.save_pretrained(tmp_path / "configs")
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()  # they must come from the file
    save_file(to_single_file(name(pipeline), tiny.parts(pipeline)), tmp_path / "all.safetensors")
    read = type(pipeline).from_single_file(
        str(tmp_path / "all.safetensors"), config=str(tmp_path / "configs"), local_files_only=True
    )
    read.set_progress_bar_config(disable=True)
    for part, state in tiny.parts(pipeline).items():
        assert_same(getattr(read, part).state_dict(), state)
        getattr(read, part).eval()  # diffusers 0.42 leaves T5 in training mode, with its dropout
    torch.testing.assert_close(tiny.picture(read), tiny.picture(pipeline), atol=1e-5, rtol=0)


VAE = "decoder.mid.attn_1.q.weight"
CLIP_L, OPEN_CLIP = "transformer.text_model.final_layer_norm.weight", "ln_final.weight"
SD3_ENCODERS = ("clip_l.transformer.text_model", "t5xxl.transformer.encoder")
COMFYUI_LOOKS_FOR = {
    "sd1": (f"first_stage_model.{VAE}", f"cond_stage_model.{CLIP_L}"),
    "sd2": (
        f"first_stage_model.{VAE}",
        f"cond_stage_model.model.{OPEN_CLIP}",
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight",
    ),
    "sdxl": (
        f"first_stage_model.{VAE}",
        f"conditioner.embedders.0.{CLIP_L}",
        f"conditioner.embedders.1.model.{OPEN_CLIP}",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
    ),
    "sd3": (
        f"first_stage_model.{VAE}",
        f"text_encoders.clip_g.{CLIP_L}",
        "text_encoders.clip_g.transformer.text_projection.weight",
        *(f"text_encoders.{x}.final_layer_norm.weight" for x in SD3_ENCODERS),
    ),
    "flux": (
        f"vae.{VAE}",
        *(f"text_encoders.{x}.final_layer_norm.weight" for x in SD3_ENCODERS),
    ),
}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_autoencoder_and_text_encoders_are_where_comfyui_looks_for_them(kind: str) -> None:
    made = tiny.pipeline(kind)
    checkpoint = to_single_file(name(made), tiny.parts(made))
    assert set(COMFYUI_LOOKS_FOR[kind]) <= checkpoint.keys()
    assert checkpoint[COMFYUI_LOOKS_FOR[kind][0]].shape == (8, 8, 1, 1)  # a convolution there


def test_text_encoders_that_are_not_there_are_left_out() -> None:
    made = tiny.pipeline("sd3")
    parts = tiny.parts(made)
    with_t5 = to_single_file(name(made), parts)
    del parts["text_encoder_3"]
    without = to_single_file(name(made), parts)
    assert {k for k in with_t5 if "t5xxl" not in k} == without.keys()


def flux_at_full_size(**sizes: Any) -> tuple[str, nn.Module]:
    return "FluxPipeline", FluxTransformer2DModel(pooled_projection_dim=768, **sizes)


def sd3_at_full_size(**sizes: Any) -> tuple[str, nn.Module]:
    common = {"in_channels": 16, "out_channels": 16, "pooled_projection_dim": 2048}
    return "StableDiffusion3Pipeline", SD3Transformer2DModel(**common, **sizes)


def unet_at_full_size(pipeline: str, **sizes: Any) -> tuple[str, nn.Module]:
    return pipeline, UNet2DConditionModel(**sizes)


def sd1() -> tuple[str, nn.Module]:
    return unet_at_full_size(
        "StableDiffusionPipeline", cross_attention_dim=768, attention_head_dim=8
    )


def sd2() -> tuple[str, nn.Module]:
    return unet_at_full_size(
        "StableDiffusionPipeline",
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )


def sdxl() -> tuple[str, nn.Module]:
    return unet_at_full_size(
        "StableDiffusionXLPipeline",
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


FOUR_LEVELS = {
    "model_channels": 320,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
PUBLISHED = {
    "sd1": (sd1, FOUR_LEVELS | {"context_dim": 768, "linear": False}),
    "sd2": (sd2, FOUR_LEVELS | {"context_dim": 1024, "linear": True}),
    "sdxl": (
        sdxl,
        {
            "model_channels": 320,
            "in_channels": 4,
            "out_channels": 4,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "adm_in_channels": 2816,
            "context_dim": 2048,
            "linear": True,
        },
    ),
    "sd3.5 medium": (
        lambda: sd3_at_full_size(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=96,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        {
            "depth": 24,
            "blocks": 24,
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "context": (1536, 4096),
            "pooled": 2048,
            "pos_embed_max_size": 96,
            "qk_norm": True,
            "self_attention": 13,
        },
    ),
    "flux": (
        lambda: flux_at_full_size(guidance_embeds=True),
        {"in_channels": 16, "pooled": 768, "depth": 19, "depth_single": 38, "guidance": True},
    ),
    "flux schnell": (
        lambda: flux_at_full_size(guidance_embeds=False),
        {"in_channels": 16, "pooled": 768, "depth": 19, "depth_single": 38, "guidance": False},
    ),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_comfyui_takes_the_published_networks_for_what_they_are(kind: str) -> None:
    make, sizes = PUBLISHED[kind]
    with torch.device("meta"):
        pipeline, network = make()
    component = "unet" if isinstance(network, UNet2DConditionModel) else "transformer"
    checkpoint = to_single_file(pipeline, {component: network.state_dict()})
    assert comfyui.taken_for(checkpoint) == sizes


def test_diffusers_reads_flux_at_its_published_width() -> None:
    with torch.device("meta"):
        pipeline, network = flux_at_full_size(guidance_embeds=True)
    state = network.state_dict()
    read = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(
        to_single_file(pipeline, {"transformer": state})
    )
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in state.items()}


def test_velocities_of_sdxl_are_told() -> None:
    made = tiny.pipeline("sdxl")
    parts = tiny.parts(made)
    plain = to_single_file(name(made), parts)
    told = to_single_file(name(made), parts, "v_prediction")
    assert told.keys() - plain.keys() == {"v_pred"}
    with pytest.raises(UserError, match="prediction_type='sample' cannot be told"):
        to_single_file(name(made), parts, "sample")


def test_what_has_no_place_is_refused_by_name() -> None:
    made = tiny.pipeline("sd1")
    parts = tiny.parts(made)
    with pytest.raises(UserError, match="PixArtSigmaPipeline has no single-file layout here"):
        to_single_file("PixArtSigmaPipeline", {})
    with pytest.raises(UserError, match="layout of StableDiffusionPipeline has no image_encoder"):
        to_single_file(name(made), parts | {"image_encoder": {}})
    for part, key in {
        "unet": "time_embedding.cond_proj.weight",
        "vae": "encoder.down_blocks.0.attentions.0.to_q.weight",
    }.items():
        with pytest.raises(UserError, match=f"{key} has no place in the single-file layout of"):
            to_single_file(name(made), parts | {part: parts[part] | {key: torch.ones(1)}})


def test_a_projection_that_the_layout_forgets_is_refused() -> None:
    made = tiny.pipeline("sd3")
    made.text_encoder.text_projection.weight.data[0, 1] = 0.01
    with pytest.raises(UserError, match="text_projection other than the identity"):
        to_single_file(name(made), tiny.parts(made))
