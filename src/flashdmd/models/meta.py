"""Networks from their configurations alone: the real classes on the meta device, no weight read.

A pipeline folder, a pipeline of the hub that is in the local cache, or one of the well-known ones
whose configurations are in known/ (figures from their config.json files; the numbers of parameters
that come out are the published ones, see test).
"""

import importlib
import inspect
import json
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, SamVisionModel

from flashdmd.errors import UserError
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.models.trust import refuse_config, refuse_foreign, refuse_unsafe
from flashdmd.models.vision import DINOS, SAMS, of_blocks
from flashdmd.plain import json_object

KNOWN = Path(__file__).parent / "known"
DENOISERS = ("unet", "transformer")
TOKENS = {  # a prompt's, as its pipeline pads them; SD3's are CLIP's 77 and T5's 256
    "UNet2DConditionModel": 77,
    "SD3Transformer2DModel": 77 + 256,
    "FluxTransformer2DModel": 512,
}
MANY_TOKENS = 300  # PixArt, Sana
WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim", "cap_feat_dim")
ATTENTION = (  # [DEF] the projections that adapters go to: those of diffusers' training scripts
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Parts:
    """The networks of a pipeline, on the meta device."""

    name: str
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]

    @property
    def factor(self) -> int:
        """Pixels to a latent place."""
        config: Any = self.vae.config
        blocks = config.get("block_out_channels") or config.encoder_block_out_channels
        return int(2 ** (len(blocks) - 1))

    @property
    def resolution(self) -> int:
        """Pixels across the pipeline's pictures; 1024 where the denoiser does not say."""
        config: Any = self.denoiser.config
        return int(config.get("sample_size") or 1024 // self.factor) * self.factor


def parts_of(name: str) -> Parts:
    """The networks of a pipeline by folder, by a well-known hub id, or by one in the local cache.

    Raises UserError for a name that is none of these, or a folder that holds no pipeline.
    """
    known = table("pipelines")
    if name in known and not (Path(name) / "model_index.json").is_file():
        return assemble(name, {k: known_part(v) for k, v in known[name].items() if k != "class"})
    folder = Path(name) if Path(name).is_dir() else cached(name)
    if folder is None:
        raise UserError(
            f"model.pretrained_model_name_or_path={name!r} is no folder, is not in the local cache "
            f"of the hub, and not among the known ones: {', '.join(known)}; give one of them"
        )
    try:
        index = json_object((folder / "model_index.json").read_bytes())
        found = {k: v for k, v in index.items() if isinstance(v, list) and wanted(k) and all(v)}
        refuse_foreign(name, found)
        return assemble(name, {k: read_part(folder / k, *v) for k, v in found.items()})
    except UserError:
        raise
    except Exception as e:  # each library refuses values in a way of its own
        raise UserError(
            f"the configurations of the pipeline in {folder} cannot be read: {e}"
        ) from e


def wanted(component: str) -> bool:
    return component in (*DENOISERS, "vae") or component.startswith("text_encoder")


def assemble(name: str, networks: dict[str, nn.Module]) -> Parts:
    denoiser = next((networks[k] for k in DENOISERS if k in networks), None)
    if denoiser is None or "vae" not in networks:
        raise UserError(f"{name} has no {' or '.join(DENOISERS)}, or no vae; it has {[*networks]}")
    texts = {k: v for k, v in networks.items() if k.startswith("text_encoder")}
    return Parts(name, denoiser, networks["vae"], texts)


def cached(name: str) -> Path | None:
    """Where the hub's cache keeps a repository; nothing is downloaded."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


@cache
def table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((KNOWN / f"{name}.json").read_text())
    return found


def known_part(name: str) -> nn.Module:
    config = dict(table("parts")[name])
    return build(config.pop("class"), config)


def read_part(folder: Path, library: str, name: str) -> nn.Module:
    config = json_object((folder / "config.json").read_bytes())
    return build(f"{library}.{name}", config)


def build(name: str, config: dict[str, Any]) -> nn.Module:
    """A network of the class `library.name` on the meta device."""
    refuse_config(name, config)
    library, _, cls = name.rpartition(".")
    made: Any = getattr(importlib.import_module(library), cls)
    with torch.device("meta"):
        if issubclass(made, ModelMixin):
            network: nn.Module = made.from_config(config)
        else:
            network = made(made.config_class.from_dict(config))
    return network.to("meta").requires_grad_(False).eval()


def backbone(
    name: str, blocks: tuple[int, ...] | None = None, checkpointing: bool = False
) -> nn.Module:
    """The discriminator's frozen backbone: by well-known hub id, by folder, or efficientnet-lite0.

    Raises UserError for one whose size is not known here.
    """
    if name == "efficientnet-lite0":
        return EfficientNetLite(0).to("meta")
    known = table("backbones")
    if name in known and not Path(name).is_dir():
        network = known_part(known[name])
    else:
        network = read_backbone(name, known)
    return of_blocks(name, network, blocks=blocks, checkpointing=checkpointing).to("meta")


def read_backbone(name: str, known: dict[str, Any]) -> nn.Module:
    """A SAM or a DINO in a folder, or in the hub's cache, without its weights."""
    folder, config = Path(name) if Path(name).is_dir() else cached(name), None
    try:
        if folder:
            refuse_unsafe(folder)
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except UserError:
        raise
    except Exception as e:  # values that a config refuses come as errors of its own kind
        raise UserError(f"{folder}/config.json cannot be used: {e}") from e
    kind = getattr(config, "model_type", None)
    if kind not in (*SAMS, *DINOS):
        raise UserError(
            f"discriminator.backbone={name!r}: its size is not known here; known are a folder of a "
            f"SAM or a DINO, efficientnet-lite0, {', '.join(known)}"
        )
    made: Any = DINOS.get(kind, SamVisionModel)
    try:
        with torch.device("meta"):
            network: nn.Module = made(getattr(config, "vision_config", config))
    except Exception as e:  # a network that cannot be: sizes of 0, of no type, of no computer
        raise UserError(f"{folder}/config.json describes no network: {e}") from e
    return network.requires_grad_(False).eval()


def add_adapter(network: nn.Module, name: str, rank: int, layers: tuple[str, ...] = ()) -> None:
    """A LoRA in float32 on the layers whose names end so; on attention's projections if none."""
    targets = list(layers or ATTENTION)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    adapted: Any = network
    adapted.add_adapter(config, name)
    for p in network.parameters():
        p.data = p.data.float() if p.requires_grad else p.data


def inputs(network: nn.Module, batch: int, side: int) -> dict[str, Any]:
    """The keyword tensors of one forward of a diffusers denoiser on latents of `side` places.

    By the names in its signature and the sizes in its configuration, so that classes that are not
    known here are fed as well. Raises UserError for one that asks for something else.
    """
    config: Any = network.config
    names = inspect.signature(network.forward).parameters
    tokens = TOKENS.get(type(network).__name__, MANY_TOKENS)
    width = next((config[k] for k in WIDTHS if config.get(k)), None)
    packed = "img_ids" in names  # FLUX: a token for 2 x 2 places
    shape = (side * side // 4, config.in_channels) if packed else (config.in_channels, side, side)
    latents = torch.empty(batch, *shape)
    known: dict[str, Any] = {"sample": latents, "hidden_states": latents}
    known["timestep"] = torch.empty(batch)
    if isinstance(width, int):
        known["encoder_hidden_states"] = torch.empty(batch, tokens, width)
        known["encoder_attention_mask"] = torch.ones(batch, tokens)
    if config.get("pooled_projection_dim"):
        known["pooled_projections"] = torch.empty(batch, config.pooled_projection_dim)
    if packed:
        known["img_ids"], known["txt_ids"] = torch.zeros(shape[0], 3), torch.zeros(tokens, 3)
    if config.get("guidance_embeds"):
        known["guidance"] = torch.empty(batch)
    if config.get("addition_embed_type") == "text_time":
        ids = 6 * config.addition_time_embed_dim  # SDXL's sizes and crops
        pooled = torch.empty(batch, config.projection_class_embeddings_input_dim - ids)
        known["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(batch, 6)}
    if getattr(network, "use_additional_conditions", False):  # PixArt-alpha's
        sizes = {"resolution": torch.empty(batch, 2), "aspect_ratio": torch.empty(batch, 1)}
        known["added_cond_kwargs"] = sizes
    needed = [n for n, p in names.items() if p.default is p.empty and n not in known]
    if needed and names[needed[0]].kind in (0, 1, 3):
        raise UserError(
            f"a {type(network).__name__} asks for {needed}, which nothing here can give"
        )
    return {k: v for k, v in known.items() if k in names}


def numbers(network: nn.Module) -> int:
    """How many parameters."""
    return sum(p.numel() for p in network.parameters())


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files, from their headers alone.

    Raises UserError for a header that is none.
    """
    total = 0
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"), path.open("rb") as f:  # the header is all of it, and true
                total += path.stat().st_size - 8 - int(struct.unpack("<Q", f.read(8))[0])
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} cannot be read as safetensors: {e}") from e
    return total
