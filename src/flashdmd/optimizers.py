"""AdamW, with moments in float32 or in 8 bits, and its state as flat tensors for a checkpoint."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from flashdmd.errors import UserError

BLOCK = 256  # numbers that share a scale (bitsandbytes, arXiv 2110.02861)
SMALLEST = 4096  # what has fewer numbers keeps its moments in float32


def make_optimizer(
    params: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    eight_bit: bool = False,
) -> torch.optim.Optimizer:
    """torch's AdamW, or bitsandbytes' with moments in 8 bits, on a processor as on a GPU.

    Not torchao's: it compiles its step, for half a minute and with a compiler that must be there,
    and a learning rate that changes has to be a tensor.
    """
    how: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    if not eight_bit:
        return torch.optim.AdamW(params, **how)
    try:
        bitsandbytes: Any = import_module("bitsandbytes.optim")
    except ImportError as e:
        raise UserError(
            "train.use_8bit_adam=true needs bitsandbytes; pip install flashdmd[quant], or leave it "
            "out"
        ) from e
    optimizer: torch.optim.Optimizer = bitsandbytes.AdamW8bit(params, **how)
    return optimizer


def moment_bytes(numbers: int, eight_bit: bool) -> int:
    """What both moments of so many numbers take, with their scales or the number of the step."""
    if not eight_bit:
        return 2 * 4 * numbers + 4
    if numbers < SMALLEST:
        return 2 * 4 * numbers
    return 2 * (numbers + 4 * -(-numbers // BLOCK))


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, `{parameter number}.{name}`.

    Without the tables of bitsandbytes' 8-bit numbers: constants, which all parameters share.
    """
    return {
        f"{i}.{key}": torch.as_tensor(value)
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in flat(state).items()
        if not key.startswith("qmap")
    }


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes puts its tensors a level deeper; here all stand side by side."""
    inner = [value for value in state.values() if isinstance(value, dict)]
    outer = {key: value for key, value in state.items() if not isinstance(value, dict)}
    for values in inner:
        outer |= values
    return outer


def restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `moments` gave. Raises UserError for those of the other kind of optimizer."""
    tables = getattr(optimizer, "name2qmap", None)  # bitsandbytes': one for each moment
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    for own in state.values():
        if ("state1" in own) != (tables is not None):
            wrote, reads = ("8-bit", "float32") if tables is None else ("float32", "8-bit")
            raise UserError(
                f"the checkpoint's optimizer has {wrote} moments, the recipe wants {reads} ones; "
                f"go on with train.use_8bit_adam={str(tables is None).lower()}"
            )
        if tables is not None:
            own["step"] = int(own["step"])
            if own["state1"].dtype == torch.uint8:
                own |= {"qmap1": tables["dynamic"], "qmap2": tables["udynamic"]}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
