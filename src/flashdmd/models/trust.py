"""What a model's files must not do: be pickles, bring code, name libraries, fill the memory."""

import math
import os
import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from flashdmd.errors import UserError
from flashdmd.plain import json_object, limited, regular

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".msgpack", ".h5")
LIBRARIES = ("diffusers", "transformers")  # the only ones whose classes a pipeline is made of
DEPTHS = "layers|depth|heads|num_.*blocks"
MOST: dict[str, float] = {  # by the first pattern in its name, what a config may ask for
    DEPTHS: 1000,  # published ones: up to 128
    "pos_embed": 10_000,  # of a grid's side; SD3.5: 384
    "theta": math.inf,  # of rotary embeddings, a base and no size
    "": 2**21,  # the largest published are vocabularies and positions, about a million
}
LARGEST_JSON = 2**26  # bytes; the index of a thousand shards has a few million
LEAST_TOKENS = 3  # of a prompt: its start, a word, its end
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
            refuse_whole_numbers(folder / part)
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
        shards = read(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index} has no weight_map of names of weights to files beside it")
        for shard in shards.values():
            if Path(str(shard)).name != shard or not shard.endswith(".safetensors"):
                raise UserError(f"{index} names {shard!r}, which is no .safetensors file beside it")
    refuse_config(f"{folder}/config.json", read(folder / "config.json"))


def refuse_whole_numbers(folder: Path) -> None:
    """Raises UserError for weights that are no floats, which would be loaded as if they were.

    What a header says of anything else, or that it cannot be read, is left to who loads it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                kinds = {name: str(file.get_slice(name).get_dtype()) for name in names}
        except (SafetensorError, OSError):
            continue
        for name, kind in kinds.items():
            if name.endswith((".weight", ".bias")) and kind[0] in "IUB" and kind != "BF16":
                raise UserError(f"{path} has {name} in {kind}; accepted are floats; {ANEW}")


def read(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is no file. Raises UserError for anything else, as others
    may read something there.
    """
    try:
        if not regular(path):
            raise ValueError("it is no regular file")
        return json_object(limited(path, "the configuration", LARGEST_JSON))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be loaded: {e}") from e


def refuse_config(where: str, config: dict[str, Any]) -> None:
    """Raises UserError for a config, at any depth, that names kernels of the hub, which are
    compiled code, or whose sizes would fill the memory while the network is built, or are less
    than none, or whose weights are quantised.
    """
    if config.get("quantization_config"):
        raise UserError(
            f"{where} has a quantization_config; accepted are weights that are not quantised: a "
            "run quantises them itself where model.quantize_base says so"
        )
    for key, value in config.items():
        if key.endswith("_implementation") and "/" in str(value):
            raise UserError(f"{where} names {key}={value!r}, code of the hub; {CODE}")
        if isinstance(value, dict):
            if "_class_name" in config and key != "auto_map":  # that is code nobody asks for
                raise UserError(
                    f"{where} has an object for {key}, which no network of diffusers has"
                )
            refuse_config(where, value)
        pattern, most = next(row for row in MOST.items() if re.search(row[0], key))
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and number > most:
                raise UserError(f"{where} has {key}={value!r}; no network has more than {most}")
            if isinstance(number, int) and number < 0 and pattern == DEPTHS:
                raise UserError(f"{where} has {key}={value!r}; no network has less than none")


def check_length(what: str, tokenizer: Any, encoder: Any) -> None:
    """Raises UserError for a CLIP's tokenizer that fills prompts up to what its encoder cannot
    read. Others are told a length by their pipelines, and their own may be anything.
    """
    if not isinstance(tokenizer, CLIPTokenizer):
        return
    length, most = tokenizer.model_max_length, int(encoder.config.max_position_embeddings)
    if type(length) is not int or not LEAST_TOKENS <= length <= most:
        raise UserError(
            f"{what} has model_max_length={length!r}; accepted are {LEAST_TOKENS} to {most}, the "
            "places of its text encoder; is its tokenizer_config.json missing, or of another?"
        )


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
