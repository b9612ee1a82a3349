"""What a model's files must not do: be pickles, bring code, name libraries, fill the memory."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from flashdmd.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".msgpack", ".h5")
LIBRARIES = ("diffusers", "transformers")  # the only ones whose classes a pipeline is made of
MOST: dict[str, float] = {  # by the first pattern in its name, what a config may ask for
    "layers|depth|heads|num_.*blocks": 1000,  # published ones: up to 128
    "pos_embed": 10_000,  # of a grid's side; SD3.5: 384
    "theta": math.inf,  # of rotary embeddings, a base and no size
    "": 2**21,  # the largest published are vocabularies and positions, about a million
}
CODE = "flashdmd has no option that runs code from a model's files"
ANEW = (
    "safetensors are accepted: if you trust it, load it elsewhere and write it anew with "
    "save_pretrained, or with save_file of safetensors"
)


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def trusted(name: str, index: dict[str, Any], given: dict[str, Any], **which: Any) -> Path:
    """The folder of a pipeline, its own or in the hub's cache, after a look at every part that is
    to be read from it, all but those that are `given`; `which` is a hub id's revision and variant.

    Raises UserError for what cannot be had, for pickles, and for code.
    """
    refuse_foreign(name, index)
    folder = Path(name)
    if not folder.is_dir():
        local = {"local_files_only": offline(), "use_safetensors": True}
        try:
            folder = Path(DiffusionPipeline.download(name, **local, **which, **given))
        except Exception as e:  # the hub's client and diffusers each raise their own kinds
            raise UserError(f"the pipeline {name} cannot be had from the hub: {e}") from e
    for part, entry in sorted(index.items()):
        if isinstance(entry, list | tuple) and part not in given:
            refuse_unsafe(folder / part)
    return folder


def refuse_pickled_file(path: Path) -> None:
    """Raises UserError for a file of weights that is none of safetensors."""
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file, and may be a pickle; {ANEW}")


def refuse_unsafe(folder: Path) -> None:
    """Raises UserError for the folder of one network that holds pickles and no safetensors, or
    whose config asks for code or for more than there can be.

    An adapter_config.json makes transformers read adapter_model.bin even where safetensors are
    asked for.
    """
    found = sorted(p for p in folder.glob("*") if p.suffix in PICKLES)
    if found and not any(folder.glob("*.safetensors")):
        raise UserError(f"{found[0]} is a pickle, which may run any code when it is read; {ANEW}")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter_config.json, an adapter inside a model, which may be a "
            "pickle; merge it into the weights, or give it as model.teacher_lora"
        )
    for index in folder.glob("*.safetensors.index*.json"):
        for shard in dict(read(index).get("weight_map") or {}).values():
            if Path(str(shard)).name != shard or not shard.endswith(".safetensors"):
                raise UserError(f"{index} names {shard!r}, which is no .safetensors file beside it")
    refuse_config(f"{folder}/config.json", read(folder / "config.json"))


def read(path: Path) -> dict[str, Any]:
    """The object in a file; {} for what is none, which is told where it is loaded."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def refuse_config(where: str, config: dict[str, Any]) -> None:
    """Raises UserError for a config, at any depth, that names kernels of the hub, which are
    compiled code, or whose sizes would fill the memory while the network is built.
    """
    for key, value in config.items():
        if key.endswith("_implementation") and "/" in str(value):
            raise UserError(f"{where} names {key}={value!r}, code of the hub; {CODE}")
        if isinstance(value, dict):
            refuse_config(where, value)
        most = next(limit for pattern, limit in MOST.items() if re.search(pattern, key))
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and number > most:
                raise UserError(f"{where} has {key}={value!r}; no network has more than {most}")


def refuse_foreign(name: str, entries: dict[str, Any]) -> None:
    """Raises UserError for a pipeline index with a part of other code than that of LIBRARIES."""
    for part, entry in entries.items():
        if not isinstance(entry, list | tuple) or part in ("safety_checker", "_ignore_files"):
            continue  # a safety checker is never loaded
        library, kind = (*entry, None, None)[:2]
        if library not in (*LIBRARIES, None) or (library is None) != (kind is None):
            raise UserError(
                f"{name}: model_index.json says that {part} is a {kind} of {library}; accepted are "
                f"classes of {' and '.join(LIBRARIES)}; {CODE}"
            )
