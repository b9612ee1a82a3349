"""Checkpoints: a folder that is written whole or not at all. safetensors and JSON, nothing else.

Its manifest tells the bytes and the SHA-256 of every other file; only a folder that is as its
manifest says is gone on from.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.files import remove_folder, replace_folder
from flashdmd.optimizers import moments, restore_moments

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"

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
    if folder.exists() and damage(folder):
        folder.rename(free_name(folder))
    with replace_folder(folder) as beside:
        for name, network in networks.items():
            tensors = {k: v.detach().contiguous() for k, v in trained(network).items()}
            save_file(tensors, beside / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            save_file(moments(optimizer), beside / f"{name}.optimizer.safetensors")
        (beside / STATE).write_text(json.dumps(state | {"about": about or {}}), "utf-8")
        write_manifest(beside)


def write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        hashes = list(pool.map(lambda path: sha256(contents(path)), paths))
    told = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
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
        for name, network in networks.items():
            load_weights(network, folder / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            restore_moments(optimizer, load_file(folder / f"{name}.optimizer.safetensors"))
        state: dict[str, Any] = dict(json.loads((folder / STATE).read_text("utf-8")))
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise unreadable(folder, e) from e
    state.pop("about", None)
    return state


def unreadable(folder: Path, e: Exception) -> UserError:
    return UserError(
        f"the checkpoint {folder} cannot be read ({e}); move it away to go on from an earlier one"
    )


def load_weights(network: nn.Module, path: Path) -> None:
    """Fills a network with what `save` wrote of it. Raises UserError for another network's."""
    tensors, own = load_file(path), trained(network)
    shapes, wanted = ({k: v.shape for k, v in of.items()} for of in (tensors, own))
    if odd := sorted(shapes.items() ^ wanted.items()):
        raise UserError(f"{path.parent}: {path.stem} is of another network; e.g. {odd[0][0]}")
    with torch.no_grad():
        for k, v in own.items():
            v.copy_(tensors[k])


def all_of(run: Path) -> list[Path]:
    """Every checkpoint-{step} in `run`, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
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
        state: dict[str, Any] = dict(json.loads((folder / STATE).read_text("utf-8")))
        wanted = ("stage", "iteration", "updates", "before", "about")
        return {name: state[name] for name in wanted}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise unreadable(folder, e) from e


def load_network(network: nn.Module, pipeline: Path, component: str) -> None:
    """Fills a diffusers network from a component of a pipeline folder."""
    path = pipeline / component / "diffusion_pytorch_model.safetensors"
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as e:
        raise UserError(
            f"{path} cannot be read as this network's weights ({e}); give a student of this "
            "teacher as safetensors, as `flashdmd train` writes it"
        ) from e


def trained(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that belong to a checkpoint: all but those of a frozen backbone."""
    return {k: p for k, p in network.named_parameters() if not k.startswith("backbone.")}
