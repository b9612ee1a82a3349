"""The latent reward models that LPO's authors publish, by the names in their files.

Facts of their public code (Kwai-Kolors/LPO, MIT): a model is a folder of `unet`, `text_encoder`, of
SDXL `text_encoder_2`, each as save_pretrained leaves it, and `state_dict.pt`, a pickled dictionary
of `visual_projection`, of SD 1.5 `text_projection`, and `logit_scale`; or one file of all of it.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashdmd.errors import UserError
from flashdmd.models.latent_reward import ENCODERS, LRM, build, open_base

PARTS = ("unet", *ENCODERS[:2])
HEADS = {
    "visual_projection.weight": "network.visual.weight",
    "text_projection.weight": "network.text.weight",
    "logit_scale": "network.logit_scale",
}
UNUSED = (  # of the whole networks that they store
    "vae.", "unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.",
)  # fmt: skip
POSITIONS = ".position_ids"  # 0, 1, 2, ..., which old CLIPs stored
TELL = 3  # names in a message


def load_published(path: Path, base: str, unpickle: bool = False) -> LRM:
    """The reward in `path`, in float32, built on `base`, the pipeline that it was trained from.

    `unpickle` allows .pt and .bin files, which are then read as tensors and numbers and nothing
    else. Raises UserError for files that cannot be read or are not, weight by weight, those of a
    latent reward model on `base`.
    """
    reward = build(open_base(base), base)
    own, given, used = reward.state_dict(), read(path, unpickle), {}
    for name, tensor in given.items():
        if not name.startswith(UNUSED) and not name.endswith(POSITIONS):
            used[ours(name, own)] = tensor
    refuse_unlike(path, base, own, used)
    reward.load_state_dict(used)
    return reward.eval().requires_grad_(False)


def ours(name: str, own: dict[str, Tensor]) -> str:
    """What a weight is called here; transformers has since dropped `text_model.` of some CLIPs."""
    if name in HEADS:
        return HEADS[name]
    part, _, rest = name.partition(".")
    if part == "unet":
        return f"network.trunk.{rest}"
    if part not in PARTS:
        return name
    place = f"words.encoders.{ENCODERS.index(part)}."
    shorter = place + rest.removeprefix("text_model.")
    return shorter if shorter in own else place + rest


def refuse_unlike(path: Path, base: str, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    wrong = {
        "lacks": sorted(own.keys() - given.keys()),
        "has, and should not,": sorted(given.keys() - own.keys()),
        "has, of another shape,": sorted(
            k for k in own.keys() & given.keys() if own[k].shape != given[k].shape
        ),
    }
    told = [
        f"it {what} {len(names)} weights ({', '.join(names[:TELL])}{', ...' * (len(names) > TELL)})"
        for what, names in wrong.items()
        if names
    ]
    if told:
        raise UserError(
            f"{path} is no latent reward model on {base}: {'; '.join(told)}; give the pipeline "
            "that it was trained from (SD 1.5 or SDXL base)"
        )


def read(path: Path, unpickle: bool) -> dict[str, Tensor]:
    """Every tensor under its full published name."""
    if path.is_file():
        return flat(tensors(path, unpickle))
    state = {
        f"{part}.{name}": tensor
        for part in PARTS
        for file in files(path / part)
        for name, tensor in flat(tensors(file, unpickle)).items()
    }
    heads = [p for p in (path / "state_dict.safetensors", path / "state_dict.pt") if p.is_file()]
    if not state or not heads:
        raise UserError(
            f"{path} is no published latent reward model: a folder of unet, text_encoder and "
            "state_dict.pt or state_dict.safetensors, or one file, is"
        )
    return state | flat(tensors(heads[0], unpickle))


def files(folder: Path) -> list[Path]:
    """A component's weights: safetensors before pickles, full precision before half."""
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(folder.glob(pattern))
        if whole := [p for p in found if ".fp16." not in p.name] or found:
            return whole
    return []


def tensors(file: Path, unpickle: bool) -> dict[Any, Any]:
    """What a file holds. Raises UserError for a pickle without leave, or what cannot be read."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if unpickle:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:  # safetensors, pickle and zip raise their own kinds
        raise UserError(f"{file} cannot be read: {e}") from e
    raise UserError(
        f"{file} is a pickle; safetensors are accepted. If you trust it, allow it to be unpickled "
        "(as tensors and numbers only), or write it anew under the same name with .safetensors: "
        "torch.load(..., weights_only=True), names joined with dots, save_file"
    )


def flat(state: dict[Any, Any], before: str = "") -> dict[str, Tensor]:
    """Nested dictionaries as one, names joined with dots; numbers as tensors.

    Raises UserError for what is neither.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}.")
            continue
        try:
            found[f"{before}{name}"] = torch.as_tensor(value)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as e:
            raise UserError(f"{before}{name} is a {type(value).__name__} and no weight") from e
    return found
