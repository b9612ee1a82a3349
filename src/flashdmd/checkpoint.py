"""Checkpoints: a folder that is written whole or not at all. safetensors and JSON, nothing else.

Its manifest tells the bytes and the SHA-256 of every other file; only a folder that is as its
manifest says is gone on from.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from flashdmd import distributed
from flashdmd.errors import UserError
from flashdmd.files import remove_folder, replace_folder
from flashdmd.models.trust import refuse_unsafe
from flashdmd.optimizers import moments, restore_moments
from flashdmd.plain import json_object

FORMAT = 1
UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, RuntimeError)
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME = re.compile(r"checkpoint-[0-9]+")
INDEX = f"{WEIGHTS}.index.json"
MANIFEST, STATE, SHARDS = "manifest.json", "state.json", "shards"

log = logging.getLogger(__name__)


def save(
    folder: Path,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    state: dict[str, Any],
    about: dict[str, Any] | None = None,
) -> None:
    """Writes `folder`; an older one of that name stays until the new one is complete, and a damaged
    one is set aside as {name}.damaged.

    `about` is what the run can do without: recipe, versions, metrics.
    """
    parts: dict[str, dict[str, Tensor]] = {name: trained(one) for name, one in networks.items()}
    parts |= {f"{name}.optimizer": moments(optimizer) for name, optimizer in optimizers.items()}
    shared = {name for name, tensors in parts.items() if distributed.shards(tensors)}
    with new_folder(folder) as beside:
        if shared:
            every = {
                f"{name}/{k}": v.detach() for name in sorted(shared) for k, v in parts[name].items()
            }
            distributed.save_shards(every, beside / SHARDS)
            distributed.barrier()
        if distributed.first():
            for name in parts.keys() - shared:
                tensors = {k: v.detach().contiguous() for k, v in parts[name].items()}
                save_file(tensors, beside / f"{name}.safetensors")
            (beside / STATE).write_text(json.dumps(state | {"about": about or {}}), "utf-8")
            write_manifest(beside)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """What `replace_folder` of the first process yields, in all of them."""
    if not distributed.first():
        yield Path(distributed.told(""))
    else:
        if folder.exists() and damage(folder):
            folder.rename(free_name(folder))
        with replace_folder(folder) as beside:
            distributed.told(str(beside))
            yield beside
    distributed.barrier()


def write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        hashes = list(pool.map(lambda path: sha256(contents(path)), paths))
    told = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    written = json.dumps({"format": FORMAT, "files": told}, indent=1)
    (folder / MANIFEST).write_text(written + "\n", "utf-8")


@dataclass(frozen=True)
class Contents:
    """What a file holds, as far as its times tell; it may have been renamed."""

    inode: int
    size: int
    changed: int  # nanoseconds
    path: Path = field(compare=False)


def contents(path: Path) -> Contents:
    told = path.stat()
    return Contents(told.st_ino, told.st_size, told.st_mtime_ns, path)


@lru_cache(maxsize=1024)  # that a checkpoint is whole is asked again at every later one
def sha256(file: Contents) -> str:
    with file.path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text("utf-8")))
        if manifest["format"] != FORMAT:
            return f"its {MANIFEST} is of format {manifest['format']!r}, known here is {FORMAT}"
        told = {str(k): (int(v["bytes"]), v["sha256"]) for k, v in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"its {MANIFEST} cannot be read ({e!r})"
    if STATE not in told:
        return f"its {MANIFEST} does not tell of {STATE}"
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: damage_of(folder / item[0], *item[1]), told.items())
        return next((wrong for wrong in found if wrong), None)


def damage_of(path: Path, size: int, hashed: str) -> str | None:
    try:
        file = contents(path)
        if file.size != size:
            return f"{path.name} has {file.size} bytes, {size} were written"
        if sha256(file) != hashed:
            return f"{path.name} is not what was written (SHA-256)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as e:
        return f"{path.name} cannot be read ({e.strerror or e})"
    return None


def free_name(folder: Path) -> Path:
    """{name}.damaged, or with -2, -3, ..."""
    first = folder.with_name(f"{folder.name}.damaged")
    name, n = first, 1
    while name.exists():
        n += 1
        name = first.with_name(f"{first.name}-{n}")
    return name


def load(
    folder: Path,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
) -> dict[str, Any]:
    """Fills networks and optimizers in place; returns the rest of the state.

    Raises UserError when a file is missing, broken, or of other networks.
    """
    try:
        parts = Parts(folder)
        for name, network in networks.items():
            parts.weights(name, network)
        found = {name: parts.moments(name, one) for name, one in optimizers.items()}
        parts.read_shards()
        for name, optimizer in optimizers.items():
            restore_moments(optimizer, found[name])
        state: dict[str, Any] = json_object((folder / STATE).read_bytes())
    except (*UNREADABLE, CheckpointException) as e:
        if isinstance(e, UserError):
            raise
        raise unreadable(folder, e) from e
    state.pop("about", None)
    return state


def unreadable(folder: Path, e: BaseException) -> UserError:
    return UserError(
        f"the checkpoint {folder} cannot be read ({e}); move it away to go on from an earlier one"
    )


def load_weights(folder: Path, name: str, network: nn.Module) -> None:
    """Fills one network. Raises UserError for another network's weights."""
    parts = Parts(folder)
    parts.weights(name, network)
    parts.read_shards()


class Parts:
    """What `save` wrote, of a run that was whole or sharded, for one that is either."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shards = folder / SHARDS
        self.shapes = distributed.shapes_of_shards(shards) if shards.is_dir() else {}
        self.wanted: dict[str, Tensor] = {}  # to be filled from shards, all at once

    def names(self, name: str) -> dict[str, torch.Size]:
        """Of the tensors of a part that is in shards."""
        start = f"{name}/"
        found = {k: shape for k, shape in self.shapes.items() if k.startswith(start)}
        return {k.removeprefix(start): shape for k, shape in found.items()}

    def weights(self, name: str, network: nn.Module) -> None:
        """Fills a network. Raises UserError when they are another network's."""
        own, shapes, tensors = trained(network), self.names(name), {}
        if not shapes:
            tensors = load_file(self.folder / f"{name}.safetensors")
            shapes = {k: v.shape for k, v in tensors.items()}
        wanted = {k: v.shape for k, v in own.items()}
        if odd := sorted(shapes.items() ^ wanted.items()):
            raise UserError(f"{self.folder}: {name} is of another network; e.g. {odd[0][0]}")
        with torch.no_grad():
            for k, v in tensors.items():
                distributed.fill(own[k], v)
        if not tensors:
            self.wanted |= {f"{name}/{k}": v.detach() for k, v in own.items()}

    def moments(self, name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What `moments` gave of an optimizer, each as whole or sharded as its parameter is."""
        params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        part, file = f"{name}.optimizer", self.folder / f"{name}.optimizer.safetensors"
        tensors = load_file(file) if file.is_file() else {}
        shapes = self.names(part) or {k: v.shape for k, v in tensors.items()}
        for k, shape in shapes.items():
            p = params[int(k.partition(".")[0])]
            if k in tensors and not distributed.shards({k: p}):
                continue
            value = torch.zeros_like(p) if shape == p.shape else torch.zeros(shape)
            if k in tensors:
                distributed.fill(value, tensors[k])
            else:
                self.wanted[f"{part}/{k}"] = value
            tensors[k] = value
        return tensors

    def read_shards(self) -> None:
        if self.wanted:
            distributed.load_shards(self.wanted, self.folder / SHARDS)


def all_of(run: Path) -> list[Path]:
    """Every checkpoint-{step} in `run`, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def latest(run: Path) -> Path | None:
    """The newest checkpoint in `run` that is whole; None if there is none at all.

    A damaged one is named in the log and passed over. Raises UserError when all are damaged.
    """
    damaged = {}
    for folder in reversed(all_of(run)):
        damaged[folder.name] = damage(folder)
        if damaged[folder.name] is None:
            return folder
        log.warning("%s is damaged and passed over: %s", folder, damaged[folder.name])
    if damaged:
        named = "".join(f"  {name}: {reason}\n" for name, reason in damaged.items())
        raise UserError(
            f"every checkpoint in {run} is damaged:\n{named}put one that is whole in its place, "
            f"move these away to start over beside them, or give another output_dir"
        )
    return None


def prune(run: Path, keep: int | None, worth: Callable[[Path], float | None] | None = None) -> None:
    """Removes checkpoints but the newest `keep` and the one of most `worth`; None keeps all.

    Damaged ones are neither counted nor removed.
    """
    if keep is None:
        return
    whole = [folder for folder in all_of(run) if damage(folder) is None]
    best: Path | None = None
    if worth:
        worths = {folder: w for folder in whole if (w := worth(folder)) is not None}
        best = max(worths, key=lambda folder: worths[folder], default=None)
    for folder in whole[:-keep]:
        if folder != best:
            remove_folder(folder)


def state_of(folder: Path) -> dict[str, Any]:
    """Where a run stood: stage, iteration, counts, and what was saved `about` it.

    Raises UserError when it cannot be read.
    """
    try:
        state: dict[str, Any] = json_object((folder / STATE).read_bytes())
    except (OSError, ValueError, TypeError) as e:
        raise unreadable(folder, e) from e
    if odd := {"stage", "iteration", "updates", "before", "about"} - state.keys():
        raise unreadable(folder, ValueError(f"its {STATE} has no {' and no '.join(sorted(odd))}"))
    return state


def load_network(network: nn.Module, pipeline: Path, component: str) -> None:
    """Fills a diffusers network from a component of a pipeline folder."""
    path = pipeline / component / WEIGHTS
    refuse_unsafe(path.parent)
    try:
        weights, own = weights_at(path), network.state_dict()
        if distributed.shards(own):
            if odd := sorted(weights.keys() ^ own.keys()):
                raise RuntimeError(f"layers differ, e.g. {odd[0]}")
            for name, whole in weights.items():
                distributed.fill(own[name], whole)
        else:
            network.load_state_dict(weights)
    except (*UNREADABLE, KeyError, AttributeError) as e:
        raise UserError(
            f"{path} cannot be read as this network's weights ({e}); give a student of this "
            "teacher as safetensors, as `flashdmd train` writes it"
        ) from e


def weights_at(path: Path) -> dict[str, Tensor]:
    """A diffusers network's, of one file or of those that an index names: beyond 10 GB, as SDXL's
    in float32, save_pretrained writes several.
    """
    if not (index := path.with_name(INDEX)).is_file():
        return load_file(path)
    names = set(json_object(index.read_bytes())["weight_map"].values())
    return {k: v for name in sorted(names) for k, v in load_file(path.with_name(name)).items()}


def trained(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that belong to a checkpoint: all but those of a frozen backbone."""
    return {k: p for k, p in network.named_parameters() if not k.startswith("backbone.")}
