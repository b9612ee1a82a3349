"""LoRA as state dicts: taken from a full fine-tuning, merged, and under the names loaders know.

An adapter names its layers as the network does, `<layer>.lora_A.weight` (r, in, ...) and
`<layer>.lora_B.weight` (out, r, ...); the layer's weight moves by `scale` B A. In files `scale` is
folded into B: a loader that takes alpha for the rank, as ComfyUI does where no alpha is given, and
one that reads alpha then agree. Names: diffusers 0.42's `load_lora_weights`; ComfyUI a125cd8
(October 2025), where a layer without a name is skipped with no more than a line in the log.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashdmd.errors import UserError

State = Mapping[str, Tensor]

# What diffusers looks for in a folder, and the name under which its header holds peft's settings.
FILE_NAME = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
ITERATIONS = 4  # of the search for singular vectors


class LoraFile(NamedTuple):
    """Tensors and header of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Extraction(NamedTuple):
    """An adapter of scale 1 and what it loses of a fine-tuning, in norms relative to the change.

    `errors` has every weight that changed; it is 1 for biases and norms, which no LoRA moves.
    """

    adapter: dict[str, Tensor]
    errors: dict[str, float]
    error: float  # of all weights together


def layers(adapter: State) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, A, B) of an adapter. Raises UserError for keys that are not plain LoRA."""
    names = {k.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for k in adapter}
    for name in sorted(names):
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if missing := [k for k in keys if k not in adapter]:
            raise UserError(
                f"the adapter has no {missing[0]}; every layer needs lora_A.weight and "
                "lora_B.weight, and nothing else (no DoRA, no lora_bias)"
            )
        yield name, adapter[keys[0]], adapter[keys[1]]


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A in float32, in the shape of the layer's weight: (out, in) or (out, in, k, k)."""
    return (b.float().flatten(1) @ a.float().flatten(1)).unflatten(1, a.shape[1:])


def rank_of(adapter: State) -> int:
    """The rank of all layers. Raises UserError when it is not one.

    Older releases of diffusers take the first layer's for the alpha of all where ranks differ.
    """
    ranks = {a.shape[0] for _, a, _ in layers(adapter)}
    if len(ranks) != 1:
        raise UserError(
            f"the adapter has layers of ranks {sorted(ranks)}; one is exported, the same for all "
            "(no rank_pattern)"
        )
    return ranks.pop()


def folded(b: Tensor, scale: float) -> Tensor:
    return (b.float() * scale).to(b.dtype).contiguous()


def to_diffusers(adapter: State, component: str, scale: float = 1.0) -> LoraFile:
    """What `load_lora_weights` reads from a folder, saved as FILE_NAME.

    `component` is the pipeline's name of the network, unet or transformer. Pipelines without that
    method (PixArt's, in diffusers 0.42) cannot load any LoRA: merge there.
    """
    tensors, rank = {}, rank_of(adapter)
    for name, a, b in layers(adapter):
        tensors[f"{component}.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{component}.{name}.lora_B.weight"] = folded(b, scale)
    names = [name for name, _, _ in layers(adapter)]
    settings = {"r": rank, "lora_alpha": rank, "target_modules": names}
    header = json.dumps({f"{component}.{k}": v for k, v in settings.items()}, sort_keys=True)
    return LoraFile(tensors, {"format": "pt", HEADER: header})


JOINT = r"""transformer_blocks\.\d+\.(
      attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out) | attn2\.(to_[qkv]|to_out\.0)
    | norm1(_context)?\.linear | ff(_context)?\.net\.(0\.proj|2)
  ) | context_embedder | norm_out\.linear | proj_out
  | time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"""
ADA = r"adaln_single\.(linear|emb\.(timestep|resolution|aspect_ratio)_embedder\.linear_[12])"

# Every layer that ComfyUI's LoRA loader finds by the name that diffusers gives it.
UNET = r"""((down_blocks|up_blocks)\.\d+|mid_block)\.(
      resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)
    | attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(
        attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))
  ) | down_blocks\.\d+\.downsamplers\.0\.conv | up_blocks\.\d+\.upsamplers\.0\.conv
  | conv_in | conv_out | (time|add|class)_embedding\.linear_[12]"""
SD3 = rf"{JOINT} | pos_embed\.proj"
SINGLE = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
FLUX = rf"{JOINT} | x_embedder | {SINGLE}"
PIXART = rf"""transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))
  | pos_embed\.proj | caption_projection\.linear_[12] | proj_out | {ADA}"""
AURA = r"""(joint|single)_transformer_blocks\.\d+\.(
      attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out) | norm1(_context)?\.linear
    | ff(_context)?\.(linear_1|linear_2|out_projection))
  | time_step_proj\.linear_[12] | context_embedder | pos_embed\.proj | proj_out
  | norm_out\.linear"""
COMFYUI = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionXLPipeline": UNET,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "AuraFlowPipeline": AURA,
    "QwenImagePipeline": ".+",  # keeps the names of diffusers
}


def to_comfyui(adapter: State, pipeline: str, scale: float = 1.0) -> LoraFile:
    """What ComfyUI's LoraLoader applies whole, for a `pipeline` of diffusers (its class).

    UNets have the names of kohya's scripts, which other programs read as well; transformers have
    those of diffusers, so that file serves both. Raises UserError for pipelines and layers that
    the loader does not know.
    """
    if pipeline not in COMFYUI:
        raise UserError(
            f"ComfyUI's LoRA loader knows no layer of a {pipeline} by the name it has in "
            f"diffusers; it does those of {', '.join(COMFYUI)}: export merged weights"
        )
    known = re.compile(COMFYUI[pipeline], re.VERBOSE)
    names = [name for name, _, _ in layers(adapter)]
    if strange := [name for name in names if not known.fullmatch(name)]:
        raise UserError(
            f"ComfyUI's LoRA loader skips {', '.join(strange[:3])} of a {pipeline} "
            f"({len(strange)} of {len(names)} layers); train other layers or export merged weights"
        )
    if COMFYUI[pipeline] != UNET:
        return to_diffusers(adapter, "transformer", scale)
    tensors, alpha = {}, float(rank_of(adapter))
    for name, a, b in layers(adapter):
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = a.contiguous()
        tensors[f"{key}.lora_up.weight"] = folded(b, scale)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return LoraFile(tensors, {"format": "pt"})


def merge(base: State, adapter: State, scale: float = 1.0) -> dict[str, Tensor]:
    """`base` with scale B A added, in float32; weights keep their dtype, the others are shared.

    Raises UserError for an adapter of another network.
    """
    merged = dict(base)
    for name, a, b in layers(adapter):
        key, delta = f"{name}.weight", product(a, b)
        if key not in base or base[key].shape != delta.shape:
            found = f"is {tuple(base[key].shape)}" if key in base else "does not exist"
            raise UserError(
                f"the adapter moves {key} of shape {tuple(delta.shape)}, which {found} in this "
                "network; give the adapter's own base"
            )
        merged[key] = (base[key].float() + scale * delta).to(base[key].dtype)
    return merged


def from_full(base: State, tuned: State, rank: int) -> Extraction:
    """The best LoRA of this rank for `tuned` - `base`; exact where the change has no higher one.

    Every linear and convolutional layer that changed gets rank `rank`, padded with zeros where the
    layer is smaller. The singular vectors are found by subspace iteration, from the same start
    every time: within 0.3 % of the optimum where the spectrum is flat (test); 3072 x 3072 takes
    1 s, the whole decomposition 8 s (rank 64, one core).
    """
    if rank < 1:
        raise UserError(f"rank={rank} must be 1 or more")
    if differing := [k for k in base.keys() | tuned.keys() if shape(base, k) != shape(tuned, k)]:
        raise UserError(
            f"the fine-tuning and its base are different networks: {min(differing)} is "
            f"{shape(base, min(differing))} in the base and {shape(tuned, min(differing))} in it"
        )
    adapter: dict[str, Tensor] = {}
    errors, lost, total = {}, 0.0, 0.0
    for key in base:
        change = tuned[key].float() - base[key].float()
        norm = float(change.norm())
        if norm == 0:
            continue
        rest = norm
        name, _, kind = key.rpartition(".")
        if kind == "weight" and change.ndim in (2, 4):
            a, b = factors(change, rank)
            adapter |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            rest = float((change - product(a, b)).norm())
        errors[key] = rest / norm
        lost, total = lost + rest**2, total + norm**2
    return Extraction(adapter, errors, math.sqrt(lost / total) if total else 0.0)


def shape(state: State, key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in, ...) and B (out, r, 1, ...) of equal norm, whose product is nearest to `change`."""
    flat, draws = change.flatten(1), torch.Generator().manual_seed(0)
    basis = torch.randn(flat.shape[1], min(2 * rank, *flat.shape), generator=draws).to(flat)
    for _ in range(ITERATIONS):
        columns, _ = torch.linalg.qr(flat @ basis)
        basis, _ = torch.linalg.qr(flat.T @ columns)
    u, s, v = torch.linalg.svd(flat @ basis, full_matrices=False)
    root = s[:rank].sqrt()
    missing = rank - len(root)
    a = pad(root[:, None] * (v[:rank] @ basis.T), (0, 0, 0, missing))
    b = pad(u[:, :rank] * root, (0, missing))
    ones = (1,) * (change.ndim - 2)
    return a.unflatten(1, change.shape[1:]), b.reshape(*b.shape, *ones)
