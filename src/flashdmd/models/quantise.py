"""A frozen base in 8 or 4 bits, for adapters in full precision to be trained on top of it."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdmd.errors import UserError

Kind = Literal["none", "int8", "nf4"]
BLOCK, NESTED = 64, 256  # nf4: numbers to a scale, and scales to a scale of theirs (QLoRA)


def quantise_base(network: nn.Module, kind: Kind) -> None:
    """Quantises the weight of every linear layer in place; adapters are added afterwards.

    int8: torchao, a scale to each row. nf4: bitsandbytes, two numbers to a byte and a scale to each
    64, in 8 bits itself. Both run on a processor as on a GPU. Adapters on top must be made float32:
    peft gives them the base's dtype. Raises UserError when the package is not installed.
    """
    make = {"none": None, "int8": to_int8, "nf4": to_nf4}[kind]
    if make is None:
        return
    try:
        for owner in list(network.modules()):
            for name, child in list(owner.named_children()):
                if type(child) is nn.Linear:
                    setattr(owner, name, make(child))
    except ImportError as e:
        raise UserError(
            f"model.quantize_base={kind} needs {e.name}; pip install flashdmd[quant], or set "
            "model.quantize_base=none"
        ) from e
    if kind == "nf4":
        told: Any = network
        told.is_loaded_in_4bit = True  # what peft goes by


def quantised_bytes(linear: nn.Linear, kind: Kind) -> int:
    """What the weight of a layer takes when it is quantised, with its scales."""
    rows, numbers = linear.out_features, linear.weight.numel()
    if kind == "int8":
        return numbers + rows * (4 + 1)  # a scale in float32 and a zero of 8 bits
    blocks = -(-numbers // BLOCK)
    tables = 4 * (16 + 256 + 1)  # what each code stands for, and the mean of the scales
    return -(-numbers // 2) + blocks + 4 * -(-blocks // NESTED) + tables


class _Pass(torch.autograd.Function):
    """x W^T + b of a frozen W, which the graph keeps in 8 bits and unpacks again on the way back.

    torchao's own forward leaves an unpacked copy of every weight in the graph, which is twice what
    is saved by quantising (see test).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.weight.dequantize(grad.dtype), None, None


class Int8Linear(nn.Linear):
    """A linear layer of a frozen weight in 8 bits, in the precision of autocast where it is on."""

    def forward(self, x: Tensor) -> Tensor:
        kind, bias = x.device.type, self.bias
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        linear: Callable[..., Tensor] = _Pass.apply
        return linear(x, self.weight, bias if bias is None else bias.to(x.dtype))


def to_int8(linear: nn.Linear) -> nn.Module:
    torchao: Any = import_module("torchao.quantization")
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    made = Int8Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made


def to_nf4(linear: nn.Linear) -> nn.Module:
    bitsandbytes: Any = import_module("bitsandbytes.nn")
    weight = linear.weight.detach()
    made: nn.Linear = bitsandbytes.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    packed = bitsandbytes.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    made.weight, made.bias = packed.to(weight.device), linear.bias  # it is packed on its way
    return made
