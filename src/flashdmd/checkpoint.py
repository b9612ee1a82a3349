"""Checkpoints: a folder that is written whole or not at all. safetensors and JSON, nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.files import replace_folder
from flashdmd.optimizers import moments, restore_moments


def save(
    folder: Path,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    state: dict[str, Any],
) -> None:
    """Writes `folder`; an older one of that name stays until the new one is complete."""
    with replace_folder(folder) as beside:
        for name, network in networks.items():
            tensors = {k: v.detach().contiguous() for k, v in trained(network).items()}
            save_file(tensors, beside / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            save_file(moments(optimizer), beside / f"{name}.optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps(state))


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
            tensors, own = load_file(folder / f"{name}.safetensors"), trained(network)
            if tensors.keys() != own.keys():
                odd = sorted(tensors.keys() ^ own.keys())
                raise UserError(f"{folder}: {name} is of another network; e.g. {odd[0]}")
            with torch.no_grad():
                for k, v in own.items():
                    v.copy_(tensors[k])
        for name, optimizer in optimizers.items():
            restore_moments(optimizer, load_file(folder / f"{name}.optimizer.safetensors"))
        state: dict[str, Any] = dict(json.loads((folder / "state.json").read_text()))
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"the checkpoint {folder} cannot be read ({e}); remove it to go on from an earlier one"
        ) from e
    return state


def all_of(run: Path) -> list[Path]:
    """Every checkpoint-{step} in `run`, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def latest(run: Path) -> Path | None:
    """The newest checkpoint in `run`; None if there is none."""
    return next(reversed(all_of(run)), None)


def prune(run: Path, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints; None keeps all."""
    for folder in all_of(run)[: -keep if keep else 0]:
        shutil.rmtree(folder)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def state_of(folder: Path) -> dict[str, Any]:
    """Where a run stood: its stage and counts. Raises UserError when it cannot be read."""
    try:
        state: dict[str, Any] = dict(json.loads((folder / "state.json").read_text()))
        return {name: state[name] for name in ("stage", "updates", "before")}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"the checkpoint {folder} cannot be read ({e}); remove it to go on from an earlier one"
        ) from e


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
