"""What ComfyUI (a125cd8, October 2025) does with a file, in our own words.

With a LoRA: the names it looks for and the rows of the checkpoint's weights that each of them moves
(facts of comfy/lora.py, of the *_to_diffusers maps in comfy/utils.py and of
comfy/weight_adapter/lora.py). With a checkpoint: what it takes the network to be from its keys and
shapes (facts of comfy/model_detection.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRANSFORMER_BLOCK = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


@dataclass
class Target:
    weight: str  # of the checkpoint, without its prefix and without ".weight"
    start: int = 0  # rows of it
    rows: int | None = None
    swapped: bool = False  # whether the halves change places


def names(pipeline: Any) -> dict[str, Target]:
    """The names of all layers that are looked for in a LoRA, in front of .lora_up.weight etc."""
    kind = type(pipeline).__name__
    if hasattr(pipeline, "unet"):
        found = {k.replace(".", "_"): v for k, v in unet(pipeline.unet.config)}
        return {f"lora_unet_{k}": v for k, v in found.items()}
    config = pipeline.transformer.config
    return {f"transformer.{k}": v for k, v in {
        "StableDiffusion3Pipeline": sd3,
        "FluxPipeline": flux,
        "PixArtSigmaPipeline": pixart,
        "AuraFlowPipeline": aura,
    }[kind](config)}  # fmt: skip


def unet(config: Any) -> Iterator[tuple[str, Target]]:
    """By the number of resnets a level has (n) and the depth of its transformers."""
    n, levels = config.layers_per_block, len(config.block_out_channels)
    depth = config.transformer_layers_per_block
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    attends = ["CrossAttn" in kind for kind in config.down_block_types]

    def attention(name: str, place: str, depth: int) -> Iterator[tuple[str, Target]]:
        for layer in ("proj_in", "proj_out"):
            yield f"{name}.{layer}", Target(f"{place}.{layer}")
        for d in range(depth):
            for layer in TRANSFORMER_BLOCK:
                inside = f"transformer_blocks.{d}.{layer}"
                yield f"{name}.{inside}", Target(f"{place}.{inside}")

    def resnet(name: str, place: str) -> Iterator[tuple[str, Target]]:
        for layer, there in RESNET.items():
            yield f"{name}.{layer}", Target(f"{place}.{there}")

    for x in range(levels):
        for i in range(n):
            place = f"input_blocks.{1 + (n + 1) * x + i}"
            yield from resnet(f"down_blocks.{x}.resnets.{i}", f"{place}.0")
            if attends[x]:
                yield from attention(f"down_blocks.{x}.attentions.{i}", f"{place}.1", depths[x])
        down = Target(f"input_blocks.{(n + 1) * (x + 1)}.0.op")
        yield f"down_blocks.{x}.downsamplers.0.conv", down
        up = levels - 1 - x
        for i in range(n + 1):
            place = f"output_blocks.{(n + 1) * x + i}"
            yield from resnet(f"up_blocks.{x}.resnets.{i}", f"{place}.0")
            if attends[up]:
                yield from attention(f"up_blocks.{x}.attentions.{i}", f"{place}.1", depths[up])
        last = f"output_blocks.{(n + 1) * x + n}.{1 + attends[up]}.conv"
        yield f"up_blocks.{x}.upsamplers.0.conv", Target(last)
    yield from attention("mid_block.attentions.0", "middle_block.1", depths[-1])
    yield from resnet("mid_block.resnets.0", "middle_block.0")
    yield from resnet("mid_block.resnets.1", "middle_block.2")
    for name, place in {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        yield name, Target(place)


def thirds(block: str, layers: tuple[str, ...], place: str, width: int) -> Iterator[Any]:
    for i, layer in enumerate(layers):
        yield f"{block}.attn{layer}", Target(place, i * width, width)


def sd3(config: Any) -> Iterator[tuple[str, Target]]:
    width = 64 * config.num_layers  # ComfyUI's depth is the width / 64
    for i in range(config.num_layers):
        block, there = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        sides = {"x_block": "", "context_block": "_context"}
        yield from thirds(block, (".to_q", ".to_k", ".to_v"), f"{there}.x_block.attn.qkv", width)
        second = tuple(f"2.to_{x}" for x in "qkv")
        yield from thirds(block, second, f"{there}.x_block.attn2.qkv", width)
        added = tuple(f".add_{x}_proj" for x in "qkv")
        yield from thirds(block, added, f"{there}.context_block.attn.qkv", width)
        yield f"{block}.attn.to_out.0", Target(f"{there}.x_block.attn.proj")
        yield f"{block}.attn2.to_out.0", Target(f"{there}.x_block.attn2.proj")
        yield f"{block}.attn.to_add_out", Target(f"{there}.context_block.attn.proj")
        for side, end in sides.items():
            last = i == config.num_layers - 1 and side == "context_block"
            modulation = Target(f"{there}.{side}.adaLN_modulation.1", swapped=last)
            yield f"{block}.norm1{end}.linear", modulation
            yield f"{block}.ff{end}.net.0.proj", Target(f"{there}.{side}.mlp.fc1")
            yield f"{block}.ff{end}.net.2", Target(f"{there}.{side}.mlp.fc2")
    for part, place in (("timestep", "t_embedder"), ("text", "y_embedder")):
        for j in range(2):
            name = f"time_text_embed.{part}_embedder.linear_{j + 1}"
            yield name, Target(f"{place}.mlp.{2 * j}")
    yield "pos_embed.proj", Target("x_embedder.proj")
    yield "context_embedder", Target("context_embedder")
    yield "norm_out.linear", Target("final_layer.adaLN_modulation.1", swapped=True)
    yield "proj_out", Target("final_layer.linear")


def flux(config: Any) -> Iterator[tuple[str, Target]]:
    width = config.num_attention_heads * config.attention_head_dim
    q_k_v = (".to_q", ".to_k", ".to_v")
    for i in range(config.num_layers):
        block, there = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from thirds(block, q_k_v, f"{there}.img_attn.qkv", width)
        added = tuple(f".add_{x}_proj" for x in "qkv")
        yield from thirds(block, added, f"{there}.txt_attn.qkv", width)
        yield f"{block}.attn.to_out.0", Target(f"{there}.img_attn.proj")
        yield f"{block}.attn.to_add_out", Target(f"{there}.txt_attn.proj")
        for side, end in (("img", ""), ("txt", "_context")):
            yield f"{block}.norm1{end}.linear", Target(f"{there}.{side}_mod.lin")
            yield f"{block}.ff{end}.net.0.proj", Target(f"{there}.{side}_mlp.0")
            yield f"{block}.ff{end}.net.2", Target(f"{there}.{side}_mlp.2")
    for i in range(config.num_single_layers):
        block, there = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield from thirds(block, q_k_v, f"{there}.linear1", width)
        yield f"{block}.proj_mlp", Target(f"{there}.linear1", 3 * width, 4 * width)
        yield f"{block}.proj_out", Target(f"{there}.linear2")
        yield f"{block}.norm.linear", Target(f"{there}.modulation.lin")
    for part, place in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for j, end in enumerate(("in_layer", "out_layer")):
            name = f"time_text_embed.{part}_embedder.linear_{j + 1}"
            yield name, Target(f"{place}_in.{end}")
    yield "x_embedder", Target("img_in")
    yield "context_embedder", Target("txt_in")
    yield "norm_out.linear", Target("final_layer.adaLN_modulation.1", swapped=True)
    yield "proj_out", Target("final_layer.linear")


def pixart(config: Any) -> Iterator[tuple[str, Target]]:
    """Places are not followed here: there is no single file of PixArt to compare with."""
    for i in range(config.num_layers):
        for layer in TRANSFORMER_BLOCK:
            yield f"transformer_blocks.{i}.{layer}", Target("")
    embedders = [f"adaln_single.emb.{x}_embedder" for x in ("timestep", "resolution")]
    for name in (*embedders, "adaln_single.emb.aspect_ratio_embedder", "caption_projection"):
        for j in (1, 2):
            yield f"{name}.linear_{j}", Target("")
    for name in ("pos_embed.proj", "proj_out", "adaln_single.linear"):
        yield name, Target("")


def aura(config: Any) -> Iterator[tuple[str, Target]]:
    own = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "norm1.linear"]
    own += ["ff.linear_1", "ff.linear_2", "ff.out_projection"]
    context = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
    context += ["norm1_context.linear", "ff_context.linear_1", "ff_context.linear_2"]
    context += ["ff_context.out_projection"]
    for i in range(config.num_mmdit_layers):
        for name in own + context:
            yield f"joint_transformer_blocks.{i}.{name}", Target("")
    for i in range(config.num_single_dit_layers):
        for name in own:
            yield f"single_transformer_blocks.{i}.{name}", Target("")
    for name in ("time_step_proj.linear_1", "time_step_proj.linear_2", "context_embedder"):
        yield name, Target("")
    for name in ("pos_embed.proj", "proj_out", "norm_out.linear"):
        yield name, Target("")


def apply(lora: dict[str, Tensor], checkpoint: dict[str, Tensor], pipeline: Any) -> set[str]:
    """Moves the weights in place; the keys of the LoRA that no name finds come back.

    A weight moves by up @ down x alpha / rank, alpha being the rank where there is none.
    """
    left = set(lora)
    for name, target in names(pipeline).items():
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
            if f"{name}.{up}.weight" not in lora:
                continue
            b, a = lora[f"{name}.{up}.weight"], lora[f"{name}.{down}.weight"]
            scale = 1.0
            if f"{name}.alpha" in lora:
                scale = lora[f"{name}.alpha"].item() / a.shape[0]
            weight = checkpoint[f"model.diffusion_model.{target.weight}.weight"]
            rows = weight.shape[0] if target.rows is None else target.rows
            part = weight.narrow(0, target.start, rows)
            change = torch.mm(b.flatten(1), a.flatten(1)).reshape(part.shape)
            if target.swapped:
                change = torch.cat(change.chunk(2)[::-1])
            part += scale * change
            left -= {f"{name}.{up}.weight", f"{name}.{down}.weight", f"{name}.alpha"}
    return left


NETWORK = "model.diffusion_model."


def taken_for(checkpoint: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes that the network is built with."""
    sizes = {k.removeprefix(NETWORK): v.shape for k, v in checkpoint.items() if NETWORK in k}
    if "joint_blocks.0.context_block.attn.qkv.weight" in sizes:
        width, channels, patch, _ = sizes["x_embedder.proj.weight"]
        return {
            "depth": width // 64,
            "blocks": numbered(sizes, "joint_blocks"),
            "in_channels": channels,
            "patch_size": patch,
            "out_channels": sizes["final_layer.linear.weight"][0] // patch**2,
            "context": tuple(sizes["context_embedder.weight"]),
            "pooled": sizes["y_embedder.mlp.0.weight"][1],
            "pos_embed_max_size": round(sizes["pos_embed"][1] ** 0.5),
            "qk_norm": "joint_blocks.0.context_block.attn.ln_q.weight" in sizes,
            "self_attention": sum(k.endswith(".x_block.attn2.qkv.weight") for k in sizes),
        }
    if "double_blocks.0.img_attn.norm.key_norm.scale" in sizes:
        return {
            "in_channels": sizes["img_in.weight"][1] // 4,
            "pooled": sizes["vector_in.in_layer.weight"][1],
            "depth": numbered(sizes, "double_blocks"),
            "depth_single": numbered(sizes, "single_blocks"),
            "guidance": "guidance_in.in_layer.weight" in sizes,
        }
    return unet_taken_for(sizes)


def numbered(sizes: dict[str, torch.Size], group: str) -> int:
    n = 0
    while any(k.startswith(f"{group}.{n}.") for k in sizes):
        n += 1
    return n


def unet_taken_for(sizes: dict[str, torch.Size]) -> dict[str, Any]:
    """Level by level; a block with an `op` ends one."""
    channels = sizes["input_blocks.0.0.weight"][0]
    blocks = numbered(sizes, "input_blocks")
    down, up, resnets, widths = [], [], [0], [0]

    def transformers(block: str) -> int:
        return numbered(sizes, f"{block}.1.transformer_blocks")

    for i in range(blocks):
        here, opposite = f"input_blocks.{i}", f"output_blocks.{blocks - 1 - i}"
        if f"{here}.0.op.weight" in sizes:
            resnets, widths = [*resnets, 0], [*widths, 0]
            up.append(transformers(opposite))
            continue
        if f"{here}.0.in_layers.0.weight" in sizes:
            resnets[-1] += 1
            widths[-1] = sizes[f"{here}.0.out_layers.3.weight"][0] // channels
            down.append(transformers(here))
        if f"{opposite}.0.in_layers.0.weight" in sizes:
            up.append(transformers(opposite))
    first = next(k for k in sizes if k.endswith("1.transformer_blocks.0.attn2.to_k.weight"))
    projection = sizes[first.replace("transformer_blocks.0.attn2.to_k", "proj_in")]
    label = sizes.get("label_emb.0.0.weight")
    return {
        "model_channels": channels,
        "in_channels": sizes["input_blocks.0.0.weight"][1],
        "out_channels": sizes["out.2.weight"][0],
        "num_res_blocks": resnets,
        "channel_mult": widths,
        "transformer_depth": down,
        "transformer_depth_output": up,
        "transformer_depth_middle": transformers("middle_block"),
        "context_dim": sizes[first][1],
        "linear": len(projection) == 2,
        "adm_in_channels": label and label[1],
    }
