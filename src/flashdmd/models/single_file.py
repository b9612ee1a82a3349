"""A pipeline's networks as one state dict in the layout that its authors first published.

ComfyUI's checkpoint loader and diffusers' `from_single_file` read it. ComfyUI builds the networks
from what it finds (a125cd8, October 2025, comfy/model_detection.py and supported_models.py), so it
takes the published sizes only:

- SD 1.x: 320 channels (input_blocks.0.0), a context of 768, proj_in a convolution; eps alone, v
  needs its ModelSamplingDiscrete node. SD 2.x: 320, 1024, proj_in linear; v is guessed from the
  spread of a norm's bias.
- SDXL: 320, 2048, label_emb of 2816 inputs, transformers of depth 0, 0, 2, 2, 10, 10; v where a
  tensor `v_pred` is there. Its VAE has 128 channels and three downsamplings, as that of all four.
- SD3: joint_blocks, and as many heads of 64 as blocks (x_embedder has 64 x depth outputs); the
  latents have 16 channels.
- FLUX: double_blocks with img_attn.norm.key_norm.scale, 3072 units, 24 heads; guidance_in makes it
  dev, without it is schnell.

diffusers' own inverse of FLUX also takes 3072 units for granted. Every weight has a place or is
refused by name.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flashdmd.errors import UserError

State = Mapping[str, Tensor]
Places = dict[str, str]  # a layer (or a group of layers) in diffusers -> the same in the layout

ENDS = ("weight", "bias")


def rename(state: State, places: Places, of: str) -> dict[str, Tensor]:
    """Every key under the longest part of it that has a place."""
    renamed = {}
    for key, tensor in state.items():
        head = key
        while head and head not in places:
            head = head.rpartition(".")[0]
        if not head:
            raise UserError(
                f"{key} has no place in the single-file layout of {of}; export the diffusers folder"
            )
        renamed[places[head] + key[len(head) :]] = tensor
    return renamed


def fuse(state: State, parts: tuple[str, ...], into: str, within: str = "") -> dict[str, Tensor]:
    """The layers `parts` of every block as one layer, their rows below one another."""
    fused = dict(state)
    for key in state:
        block, found, kind = key.rpartition(f".{parts[0]}.")
        if found and key.startswith(within):
            rows = [fused.pop(f"{block}.{part}.{kind}") for part in parts]
            fused[f"{block}.{into}.{kind}"] = torch.cat(rows)
    return fused


def swap(state: State, layer: str) -> dict[str, Tensor]:
    """The halves of a modulation: (scale, shift) in diffusers, (shift, scale) in the layout."""
    keys = [f"{layer}.{end}" for end in ENDS]
    return dict(state) | {k: torch.cat(state[k].chunk(2)[::-1]) for k in keys}


def count(state: State, group: str) -> int:
    """How many members the list of layers `group` has."""
    return len({k[len(group) + 1 :].split(".")[0] for k in state if k.startswith(f"{group}.")})


def each(block: str, into: str, inside: Places) -> Places:
    return {f"{block}.{k}": f"{into}.{v}" for k, v in inside.items()}


UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet(state: State) -> dict[str, Tensor]:
    """LDM numbers the blocks of a side through; what follows a resnet in its block comes behind it.

    On the way down a downsampling is a block of its own, on the way up an upsampling is part of the
    last resnet's.
    """
    places, n = dict(UNET), 0
    for i in range(count(state, "down_blocks")):
        block = f"down_blocks.{i}"
        for j in range(count(state, f"{block}.resnets")):
            n += 1
            places |= each(f"{block}.resnets.{j}", f"input_blocks.{n}.0", RESNET)
            places[f"{block}.attentions.{j}"] = f"input_blocks.{n}.1"
        if count(state, f"{block}.downsamplers"):
            n += 1
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    for j in range(2):
        places |= each(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", RESNET)
    n = 0
    for i in range(count(state, "up_blocks")):
        block = f"up_blocks.{i}"
        for j in range(count(state, f"{block}.resnets")):
            places |= each(f"{block}.resnets.{j}", f"output_blocks.{n}.0", RESNET)
            places[f"{block}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        behind = 2 if count(state, f"{block}.attentions") else 1
        places[f"{block}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{behind}.conv"
    return rename(state, places, "Stable Diffusion's UNet")


VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae(state: State) -> dict[str, Tensor]:
    """The autoencoder: attention by 1 x 1 convolutions, the decoder's blocks counted from below."""
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, way, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        places |= {f"{side}.{c}": f"{side}.{c}" for c in ("conv_in", "conv_out")}
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        blocks = count(state, f"{side}.{way}_blocks")
        for i in range(blocks):
            block, into = f"{side}.{way}_blocks.{i}", f"{side}.{way}.{i}"
            if way == "up":
                into = f"{side}.up.{blocks - 1 - i}"
            for j in range(count(state, f"{block}.resnets")):
                places[f"{block}.resnets.{j}"] = f"{into}.block.{j}"
                places[f"{block}.resnets.{j}.conv_shortcut"] = f"{into}.block.{j}.nin_shortcut"
            places[f"{block}.{sampler}rs.0.conv"] = f"{into}.{sampler}.conv"
        for j in range(2):
            places[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        places |= each(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
    renamed = rename(state, places, "the autoencoder")
    flat = [k for k, v in renamed.items() if ".attn_1." in k and v.ndim == 2]
    return renamed | {k: renamed[k][:, :, None, None] for k in flat}


SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_qkv": "x_block.attn.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_qkv": "x_block.attn2.qkv",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.add_qkv_proj": "context_block.attn.qkv",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def sd3(state: State) -> dict[str, Tensor]:
    """The MMDiT; the last block reads its prompt by a (shift, scale) alone, as the final layer."""
    places, blocks = dict(SD3), count(state, "transformer_blocks")
    for i in range(blocks):
        places |= each(f"transformer_blocks.{i}", f"joint_blocks.{i}", SD3_BLOCK)
    fused = fuse(fuse(state, QKV, "to_qkv"), ADDED_QKV, "add_qkv_proj")
    renamed = rename(fused, places, "Stable Diffusion 3's transformer")
    renamed = swap(renamed, f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1")
    return swap(renamed, "final_layer.adaLN_modulation.1")


FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "attn.to_qkv": "img_attn.qkv",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
    "attn.add_qkv_proj": "txt_attn.qkv",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "linear1": "linear1",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}


def flux(state: State) -> dict[str, Tensor]:
    """Double blocks for prompt and image apart, then single blocks for both together."""
    places = dict(FLUX)
    for i in range(count(state, "transformer_blocks")):
        places |= each(f"transformer_blocks.{i}", f"double_blocks.{i}", FLUX_DOUBLE)
    for i in range(count(state, "single_transformer_blocks")):
        places |= each(f"single_transformer_blocks.{i}", f"single_blocks.{i}", FLUX_SINGLE)
    together = (*(f"attn.{part}" for part in QKV), "proj_mlp")
    fused = fuse(state, together, "linear1", within="single_")
    fused = fuse(fuse(fused, QKV, "to_qkv"), ADDED_QKV, "add_qkv_proj")
    return swap(rename(fused, places, "FLUX's transformer"), "final_layer.adaLN_modulation.1")


def text_model(state: State) -> dict[str, Tensor]:
    """A CLIP text encoder as transformers before 5.6 wrote both of its classes."""
    inside = ("text_model.", "text_projection.")
    return {k if k.startswith(inside) else f"text_model.{k}": v for k, v in state.items()}


def clip(state: State) -> dict[str, Tensor]:
    """OpenAI's CLIP, read without its projection (SD 1.x, SDXL), or SD3's and FLUX's, the same.

    Raises UserError for a projection that does something: diffusers reads the identity in its place
    and ComfyUI leaves it out.
    """
    encoder = text_model(state)
    projection = encoder.pop("text_projection.weight", None)
    if projection is not None and not torch.equal(
        projection, torch.eye(*projection.shape).to(projection)
    ):
        raise UserError(
            "the first text encoder has a text_projection other than the identity, for which the "
            "single-file layout has no place; export the diffusers folder"
        )
    return encoder


OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.in_proj.weight": "attn.in_proj_weight",
    "self_attn.in_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip(state: State) -> dict[str, Tensor]:
    """OpenCLIP's names and its transposed projection (the second encoder of SDXL, that of SD 2).

    Where transformers has one layer less than was published (SD 2, which never used the last one),
    ComfyUI says that it is missing and does not use it either.
    """
    encoder, places = text_model(state), dict(OPEN_CLIP)
    inside = "text_model.encoder.layers"
    for i in range(count(encoder, inside)):
        places |= each(f"{inside}.{i}", f"transformer.resblocks.{i}", OPEN_CLIP_LAYER)
    fused = fuse(encoder, ("q_proj", "k_proj", "v_proj"), "in_proj")
    renamed = rename(fused, places, "OpenCLIP's text encoder")
    if "text_projection" in renamed:
        renamed["text_projection"] = renamed["text_projection"].T.contiguous()
    return renamed


def t5(state: State) -> dict[str, Tensor]:
    """Its names stay; diffusers wants the embedding under both of them, the file two tensors."""
    return dict(state) | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}


Layout = dict[str, tuple[str, Callable[[State], dict[str, Tensor]]]]
NETWORK, LDM_VAE, ENCODERS = "model.diffusion_model.", "first_stage_model.", "text_encoders."
SD1_LAYOUT: Layout = {
    "unet": (NETWORK, unet),
    "vae": (LDM_VAE, vae),
    "text_encoder": ("cond_stage_model.transformer.", clip),
}
SD2_LAYOUT = SD1_LAYOUT | {"text_encoder": ("cond_stage_model.model.", open_clip)}
LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": SD1_LAYOUT,
    "StableDiffusionXLPipeline": {
        "unet": (NETWORK, unet),
        "vae": (LDM_VAE, vae),
        "text_encoder": ("conditioner.embedders.0.transformer.", clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", open_clip),
    },
    "StableDiffusion3Pipeline": {
        "transformer": (NETWORK, sd3),
        "vae": (LDM_VAE, vae),
        "text_encoder": (f"{ENCODERS}clip_l.transformer.", clip),
        "text_encoder_2": (f"{ENCODERS}clip_g.transformer.", text_model),
        "text_encoder_3": (f"{ENCODERS}t5xxl.transformer.", t5),
    },
    "FluxPipeline": {
        "transformer": (NETWORK, flux),
        "vae": ("vae.", vae),
        "text_encoder": (f"{ENCODERS}clip_l.transformer.", clip),
        "text_encoder_2": (f"{ENCODERS}t5xxl.transformer.", t5),
    },
}


def to_single_file(
    pipeline: str, parts: Mapping[str, State], prediction_type: str = "epsilon"
) -> dict[str, Tensor]:
    """The checkpoint of a `pipeline` of diffusers (its class) from its networks' state dicts.

    `parts` are named as the pipeline names them; text encoders that it does not have are left out.
    `prediction_type` is the scheduler's, of the UNets. Raises UserError for pipelines, networks and
    weights that the layout does not have, and for what no loader takes a UNet to predict.
    """
    if pipeline not in LAYOUTS:
        raise UserError(
            f"{pipeline} has no single-file layout here; {', '.join(LAYOUTS)} have: export the "
            "diffusers folder"
        )
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"prediction_type={prediction_type!r} cannot be told in a single file; epsilon and "
            "v_prediction can: export the diffusers folder"
        )
    layout, checkpoint = LAYOUTS[pipeline], dict[str, Tensor]()
    if pipeline == "StableDiffusionPipeline" and has_linear_projections(parts["unet"]):
        layout = SD2_LAYOUT
    for name, state in parts.items():
        if name not in layout:
            raise UserError(f"the single-file layout of {pipeline} has no {name}")
        prefix, convert = layout[name]
        checkpoint |= {prefix + k: v for k, v in convert(state).items()}
    if pipeline == "StableDiffusionXLPipeline" and prediction_type == "v_prediction":
        checkpoint["v_pred"] = torch.zeros(0)
    return checkpoint


def has_linear_projections(state: State) -> bool:
    """Whether this is the UNet of Stable Diffusion 2.x, not 1.x: how ComfyUI tells them apart."""
    return any(k.endswith(".proj_in.weight") and v.ndim == 2 for k, v in state.items())
