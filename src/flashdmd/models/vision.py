"""Frozen vision backbones of transformers and timm: pictures in, feature maps out.

The Pixel-GAN looks through one of them: SAM's encoder in the paper (arXiv 2511.20549), DINOv2 in
SenseFlow (2506.00523). Whatever its network, a backbone takes pictures (B, 3, H, W) in [-1, 1],
normalises them as the network was trained, and returns a list of maps (B, C, h, w).
"""

import importlib
import math
import re
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoConfig,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    SamVisionModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES
from transformers.utils import logging

from flashdmd.errors import UserError
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.models.recompute import recomputed
from flashdmd.models.trust import refuse_config, refuse_unsafe
from flashdmd.plain import json_object

ACCEPTED = (
    "efficientnet-lite0, timm:NAME, or a folder or hub id of a SAM, a DINOv2, a DINOv3 or another "
    "network that transformers has as a backbone (ConvNeXt, Swin, ResNet, ...)"
)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, in 0..1
# of DINO and of SAM too, whose (123.675, 116.28, 103.53) and (58.395, 57.12, 57.375) are of 255
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CENTRED: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # [-1, 1] itself
SAMS = ("sam", "sam_vision_model")
DINOS = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
}
PYRAMIDS = set(MODEL_FOR_BACKBONE_MAPPING_NAMES) - {"timm_backbone"}  # that is timm:NAME
LEVELS = 4  # maps of a transformer, from evenly spaced blocks
HUB_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", "model*.index.json"]
logging.disable_progress_bar()


class Vision(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> the maps of a frozen network, in the images' dtype.

    Sides that are no multiples of `multiple`, the network's patch, are resized to the nearest ones
    that are; with `longer_side`, images are resized to it first, their shape kept. Weights may be
    of another dtype than the images. Frozen and in evaluation mode for good: gradients pass through
    to the images and stop at the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        maps: nn.Module,
        statistics: Statistics = IMAGENET,
        multiple: int = 1,
        longer_side: int | None = None,
    ) -> None:
        super().__init__()
        self.maps, self.multiple, self.longer_side = maps, multiple, longer_side
        mean, std = (torch.tensor(s)[:, None, None] for s in statistics)
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("std", 2 * std, persistent=False)
        self.eval()
        self.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        size = fitted(images.shape[-2], images.shape[-1], self.multiple, self.longer_side)
        pixels = images
        if size != images.shape[2:]:
            pixels = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        pixels = (pixels - self.mean) / self.std
        maps = self.maps(pixels.to(next(self.maps.parameters()).dtype))
        return [m.to(images.dtype) for m in maps]

    def train(self, mode: bool = True) -> "Vision":
        """Stays in evaluation mode."""
        return super().train(False)


def fitted(height: int, width: int, multiple: int, longer_side: int | None) -> tuple[int, int]:
    """The nearest height and width that are multiples, one at least."""
    scale = longer_side / max(height, width) if longer_side else 1.0
    return (
        max(1, round(height * scale / multiple)) * multiple,
        max(1, round(width * scale / multiple)) * multiple,
    )


class SamMaps(nn.Module):
    """SAM's image encoder at any size, without its neck: what it holds after the blocks `taken`.

    Pictures of other sizes than it was trained on see its table of absolute positions resized, and
    its blocks of global attention resize their tables of relative ones themselves; those of the
    windows have the same size everywhere.
    """

    def __init__(self, encoder: Any, taken: tuple[int, ...], checkpointing: bool) -> None:
        super().__init__()
        self.projection, self.pos_embed = encoder.patch_embed.projection, encoder.pos_embed
        self.blocks, self.taken = encoder.layers[: max(taken) + 1], taken
        self.checkpointing = checkpointing

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        x = self.projection(pixels).permute(0, 2, 3, 1)
        if self.pos_embed is not None:
            x = x + resized(self.pos_embed, x.shape[1], x.shape[2])
        states = walk(self.blocks, self.taken, x, self.checkpointing)
        return [x.permute(0, 3, 1, 2) for x in states]


def resized(
    table: Float[Tensor, "1 h w C"], height: int, width: int
) -> Float[Tensor, "1 {height} {width} C"]:
    """A table of positions for another grid, bicubic as ViTs' tables are; the same for its own."""
    planes = table.permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, (height, width), mode="bicubic")
    return planes.permute(0, 2, 3, 1).to(table.dtype)


class DinoMaps(nn.Module):
    """DINOv2 or v3 at any size: the patches' states after the blocks `taken`, as maps.

    The class token and the registers stand before the patches and are left out; v3 tells places by
    rotation, in each block.
    """

    def __init__(self, network: Any, taken: tuple[int, ...], checkpointing: bool) -> None:
        super().__init__()
        self.embeddings, self.patch = network.embeddings, int(network.config.patch_size)
        rotates = isinstance(network, DINOv3ViTModel)
        blocks = network.model.layer if rotates else network.encoder.layer
        self.rotation = network.rope_embeddings if rotates else None
        self.blocks, self.taken = blocks[: max(taken) + 1], taken
        self.checkpointing = checkpointing

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        given = {"position_embeddings": self.rotation(pixels)} if self.rotation is not None else {}
        states = walk(self.blocks, self.taken, self.embeddings(pixels), self.checkpointing, **given)
        height, width = (side // self.patch for side in pixels.shape[2:])
        return [
            x[:, -height * width :].transpose(1, 2).unflatten(2, (height, width)) for x in states
        ]


def walk(
    blocks: Iterable[nn.Module],
    taken: tuple[int, ...],
    x: Tensor,
    checkpointing: bool,
    **given: Any,
) -> list[Tensor]:
    """The states after the blocks numbered `taken`.

    Checkpointed blocks keep their input alone and run again in the backward pass. Transformers' own
    switch for this acts in training mode only, in which a frozen network never is.
    """
    states = []
    for i, block in enumerate(blocks):
        run = partial(recomputed, block) if checkpointing else block
        x = run(x, **given)
        if i in taken:
            states.append(x)
    return states


class PyramidMaps(nn.Module):
    """A network that gives maps by itself: a backbone of transformers, or a list as timm's."""

    def __init__(self, network: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.network, self.channels_last = network, channels_last

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        answer = self.network(pixels)
        maps = answer if isinstance(answer, list) else answer.feature_maps
        return [m.permute(0, 3, 1, 2) if self.channels_last else m for m in maps]


def load_backbone(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    blocks: tuple[int, ...] | None = None,
    longer_side: int | None = None,
    checkpointing: bool = False,
) -> Vision:
    """The frozen backbone of that name, its weights in `dtype`, from safetensors alone
    (timm finds its own, and reads what is no safetensors with weights_only).

    `blocks` are the transformer blocks, or the stages of a pyramid, that give the maps, from 0; by
    default the blocks of global attention of a SAM, and of others four at even distances
    (SenseFlow: 2, 5, 8, 10, 14, 19, 23 of DINOv2-L's 24). `longer_side` as in `Vision`. Nothing is
    downloaded under HF_HUB_OFFLINE=1.

    Raises UserError for what is missing, cannot be read, or is not supported.
    """
    by_timm, lite = name.startswith("timm:"), name == "efficientnet-lite0"
    if blocks is not None and (by_timm or lite):
        raise UserError(f"{name} gives the maps of all of its stages; leave blocks out")
    if by_timm:
        network = timm_network(name.removeprefix("timm:"), checkpointing)
        return timm_backbone(network, dtype, longer_side)
    if lite:
        refuse_checkpointing(name, checkpointing)
        maps: nn.Module = PyramidMaps(EfficientNetLite(0).to(dtype))
        return Vision(maps, CENTRED, longer_side=longer_side)
    folder = folder_of(name)
    config = read_json(folder / "config.json")
    refuse_config(str(folder), config)
    kind = str(config.get("model_type"))
    statistics = statistics_of(folder)
    if kind in SAMS or kind in DINOS:
        network = pretrained(DINOS.get(kind, SamVisionModel), folder, dtype)
        return of_blocks(name, network, statistics, blocks, longer_side, checkpointing)
    if kind not in PYRAMIDS:
        raise UserError(f"{name} is of model_type={kind!r}; accepted are {ACCEPTED}")
    refuse_checkpointing(name, checkpointing)
    maps = PyramidMaps(pyramid(name, folder, dtype, blocks))
    return Vision(maps, statistics, longer_side=longer_side)


def check_backbone(name: str, blocks: tuple[int, ...] | None) -> None:
    """Raises UserError for a backbone that cannot be had, by its name and its configuration alone;
    of one on the hub that is fetched.
    """
    if name == "efficientnet-lite0":
        return
    if name.startswith("timm:"):
        check_timm(name.removeprefix("timm:"))
        return
    config = configured(folder_of(name, ["config.json"]))
    kind = config.model_type
    if kind not in (*SAMS, *DINOS, *PYRAMIDS):
        raise UserError(f"{name} is of model_type={kind!r}; accepted are {ACCEPTED}")
    if blocks is not None and kind in (*SAMS, *DINOS):
        chosen(name, blocks, getattr(config, "vision_config", config).num_hidden_layers)
    elif blocks is not None:
        chosen(name, blocks, len([s for s in config.stage_names if s != "stem"]))


def configured(folder: Path) -> Any:
    """The configuration of the network in a folder."""
    refuse_config(str(folder), read_json(folder / "config.json"))
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # values that a config refuses come as errors of its own kind
        raise UserError(f"{folder}/config.json cannot be used: {e}") from e


def of_blocks(
    name: str,
    network: Any,
    statistics: Statistics = IMAGENET,
    blocks: tuple[int, ...] | None = None,
    longer_side: int | None = None,
    checkpointing: bool = False,
) -> Vision:
    """A SAM or a DINO as a backbone; `name` is what an error calls it."""
    if isinstance(network, SamVisionModel):
        encoder = network.vision_encoder
        taken = tuple(encoder.config.global_attn_indexes) if blocks is None else blocks
        maps: nn.Module = SamMaps(encoder, chosen(name, taken, len(encoder.layers)), checkpointing)
    else:
        taken = chosen(name, blocks, int(network.config.num_hidden_layers))
        maps = DinoMaps(network, taken, checkpointing)
    return Vision(maps, statistics, int(network.config.patch_size), longer_side)


def pyramid(name: str, folder: Path, dtype: torch.dtype, blocks: tuple[int, ...] | None) -> Any:
    """A backbone of transformers that answers with the maps of its stages.

    Not by AutoBackbone.from_pretrained, which takes folders for names of timm.
    """
    config = configured(folder)
    stages = [s for s in config.stage_names if s != "stem"]
    config.out_features = [stages[i] for i in chosen(name, blocks, len(stages))]
    network = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    return pretrained(network, folder, dtype, config=config)


def pretrained(network: Any, folder: Path, dtype: torch.dtype, **how: Any) -> Any:
    """The network with the folder's weights; UserError where any of them is not there."""
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise UserError(
            f"{folder} has no safetensors"
            + (", only a pickle, which may run any code when it is read" if pickled else "")
            + "; if you trust it, load it with transformers and write it anew with save_pretrained"
        )
    refuse_unsafe(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads that a backbone does not have are no news
    try:
        loaded, report = network.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **how,
        )
    except Exception as e:  # transformers and safetensors each raise their own kinds
        raise UserError(f"the backbone in {folder} cannot be loaded: {e}") from e
    finally:
        logging.set_verbosity(verbosity)
    # norms that a backbone class adds to the network it is made of start as identities
    missing = sorted(k for k in report["missing_keys"] if "hidden_states_norms" not in k)
    if missing:
        raise UserError(f"the backbone in {folder} lacks {len(missing)} weights, e.g. {missing[0]}")
    return loaded


def check_timm(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+", name):  # timm's local-dir:PATH unpickles
        raise UserError(f"timm:{name} is no name of timm's own models, the only ones accepted")
    if find_spec("timm") is None:
        raise UserError(
            f"timm:{name} needs the package timm: pip install timm; without it, {ACCEPTED}"
        )


def timm_network(name: str, checkpointing: bool) -> Any:
    """A network of timm that answers with a list of maps, with timm's weights."""
    check_timm(name)
    timm = importlib.import_module("timm")
    try:
        network = timm.create_model(name, features_only=True, pretrained=True)
    except Exception as e:  # an unknown name, no weights, no network, no maps: each its own kind
        raise UserError(f"timm:{name} cannot be loaded: {e}") from e
    if checkpointing:
        refuse_checkpointing(f"timm:{name}", not hasattr(network, "set_grad_checkpointing"))
        network.set_grad_checkpointing(True)
    return network


def timm_backbone(network: Any, dtype: torch.dtype, longer_side: int | None = None) -> Vision:
    """A network of timm with features_only, behind the one shape."""
    statistics = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    maps = PyramidMaps(network.to(dtype), channels_last=network.output_fmt == "NHWC")
    return Vision(maps, statistics, longer_side=longer_side)


def folder_of(name: str, files: list[str] = HUB_FILES) -> Path:
    """The folder of that name, or the cached one of a hub id, downloaded where it is not."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as e:  # what the hub's client raises is of these
        raise UserError(
            f"{name!r} is no folder, and not to be had from the hub ({e}); accepted are {ACCEPTED}"
        ) from e


def statistics_of(folder: Path) -> Statistics:
    """How the network's pictures were normalised; ImageNet's way where the folder does not say."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return IMAGENET
    values = read_json(path)
    if not values.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    known = dict(zip(("image_mean", "image_std"), IMAGENET, strict=True))
    mean, std = (values.get(name, own) for name, own in known.items())
    for name, given in (("image_mean", mean), ("image_std", std)):
        numbers = given if isinstance(given, list | tuple) else ()
        finite = [x for x in numbers if type(x) in (int, float) and math.isfinite(x)]
        if len(numbers) != 3 or len(finite) != 3 or (name == "image_std" and min(finite) <= 0):
            raise UserError(f"{path}: {name}={given!r} must be three numbers, of a std positive")
    return tuple(map(float, mean)), tuple(map(float, std))


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); accepted are {ACCEPTED}") from e


def chosen(name: str, blocks: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Which of `count` blocks give maps: by default the last of each of four equal parts."""
    if blocks is None:
        return tuple(sorted({round((i + 1) * count / LEVELS) - 1 for i in range(LEVELS)} - {-1}))
    if not blocks or not set(blocks) <= set(range(count)):
        raise UserError(f"blocks={blocks} must be one or more of 0..{count - 1} in {name}")
    return tuple(sorted(set(blocks)))


def refuse_checkpointing(name: str, checkpointing: bool) -> None:
    if checkpointing:
        raise UserError(
            f"{name} cannot be checkpointed; SAM, DINOv2, DINOv3 (ViT) and timm's pyramids can"
        )
