"""What a forward and a backward pass hold, found by making them on the meta device.

The real classes run there: every tensor has its shape and dtype and no numbers, so that nothing is
computed and `memory.Live` counts what lives. Two batch sizes give the line.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from flashdmd.discriminator import Discriminator
from flashdmd.memory import Live
from flashdmd.models.meta import add_adapter, inputs
from flashdmd.models.recompute import recomputed, running

Device = Literal["cpu", "cuda"]
Line = tuple[int, int]  # bytes of any batch, and bytes more of each example
META = torch.device("meta")


@dataclass(frozen=True)
class Pass:
    """Bytes that a pass holds beyond weights and their gradients."""

    kept: Line  # between forward and backward
    peak: Line  # at most, in either

    def keeps(self, batch: int, graphs: int = 1, casts: int = 1) -> int:
        """What some graphs keep together, of which `casts` have copies of the weights."""
        return casts * self.kept[0] + graphs * batch * self.kept[1]

    def works(self, batch: int) -> int:
        """What is held beside one graph when most is."""
        return self.holds(batch) - self.keeps(batch)

    def holds(self, batch: int) -> int:
        return self.peak[0] + batch * self.peak[1]


# What autocast runs in bfloat16, and what it runs in float32 on a GPU (torch's autocast_mode.h).
NARROW = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention,
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm,
    torch.einsum,
}  # fmt: skip
WIDE = {F.layer_norm, F.group_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax}


class _Kernels(TorchFunctionMode):
    """Autocast and fused attention, neither of which there is on the meta device."""

    def __init__(self, half: bool, device: Device) -> None:
        super().__init__()
        self.half, self.wide = half, WIDE if device == "cuda" else set()
        self.made: dict[int, Tensor] = {}  # like autocast's: of weights that learn

    def __exit__(self, *error: Any) -> None:
        self.made.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.half and func in NARROW:
            args, kwargs = tree_map(self.narrow, (args, kwargs))
        elif self.half and func in self.wide:
            args, kwargs = tree_map(as_float, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def narrow(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self.made:
            self.made[id(value)] = value.to(torch.bfloat16)
        return self.made[id(value)]


def as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused kernel, which keeps a number for each query and no table of queries and keys.

    A mask that gradients go through, SAM's relative positions, has none: there the table is kept.
    """
    if attn_mask is not None and attn_mask.requires_grad:
        table = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5) + attn_mask
        return table.softmax(-1) @ value
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(times, 1) for t in (key, value))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    given = {"attn_mask": attn_mask, "scale": scale}
    out: Tensor = fused(query, key, value, dropout_p, is_causal, **given)[0]
    return out


def save_memory(network: Any) -> None:
    """Gradient checkpointing that computes again as the first time."""
    network.enable_gradient_checkpointing(recomputed)


def measure(
    forward: Callable[[], Tensor], network: nn.Module, half: bool, device: Device = "cuda"
) -> tuple[int, int]:
    """(kept, peak) bytes of one forward, and of its backward where anything learns.

    On the meta device as `device` would run it, or of numbers as they are run. Gradients of
    parameters are let go as they come: they are counted where they are owned.
    """
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in network.parameters()
        if p.requires_grad
    ]
    kernels: Any = torch.autocast("cpu", torch.bfloat16, enabled=half)
    if any(p.is_meta for p in network.parameters()):
        kernels = _Kernels(half, device)
    token = running.set(lambda: kernels)
    try:
        with Live() as live:
            with kernels:
                out = forward()
                kept = live.now
            if out.requires_grad:
                out.float().sum().backward()
    finally:
        running.reset(token)
        for hook in hooks:
            hook.remove()
    return kept, live.peak


def line_of(run: Callable[[int], tuple[int, int]]) -> Pass:
    """The pass that two runs, of one example and of two, lie on."""
    one, two = run(1), run(2)
    kept, peak = ((2 * a - b, b - a) for a, b in zip(one, two, strict=True))
    return Pass(kept, peak)


def feed(network: nn.Module, batch: int, side: int) -> Tensor:
    """One forward of a denoiser, in the dtype that it has, where it is."""
    first = next(p for p in network.parameters() if p.is_floating_point())
    with first.device:
        given = inputs(network, batch, side)
    given = tree_map(lambda v: v.to(first.dtype), given)
    out: Tensor = network(**given, return_dict=False)[0]
    return out


def adapted(
    denoiser: nn.Module, rank: int, layers: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A copy in `dtype` with a LoRA in float32 on it, if its rank is not 0."""
    network = copy.deepcopy(denoiser)
    for p in network.parameters():
        p.data = p.data.to(dtype)
    if rank:
        add_adapter(network, "student", rank, layers)
    return network


@cache
def denoiser_pass(
    denoiser: nn.Module,
    side: int,
    dtype: torch.dtype,  # of the weights; adapters are float32
    half: bool,
    device: Device,
    learns: bool = True,
    checkpointing: bool = False,
    rank: int = 0,
    layers: tuple[str, ...] = (),
) -> Pass:
    """The student's or the score estimator's pass; of one that does not learn, the teacher's."""
    network = adapted(denoiser, rank, layers, dtype)
    if learns and not rank:
        network.requires_grad_(True)
    if checkpointing:
        save_memory(network)

    def run(batch: int) -> tuple[int, int]:
        with torch.set_grad_enabled(learns):
            return measure(lambda: feed(network, batch, side), network, half, device)

    return line_of(run)


@cache
def decoder_pass(
    vae: nn.Module, side: int, half: bool, device: Device, checkpointing: bool = False
) -> Pass:
    """From latents to pictures and back to the latents, through a frozen decoder in float32."""
    decoder: Any = copy.deepcopy(vae)
    if checkpointing:
        save_memory(decoder)
    channels = int(decoder.config.get("latent_channels") or decoder.config.z_dim)

    def run(batch: int) -> tuple[int, int]:
        latents = torch.empty(batch, channels, side, side, requires_grad=True, device="meta")
        return measure(lambda: decoder.decode(latents, return_dict=False)[0], decoder, half, device)

    return line_of(run)


@cache
def heads_of(backbone: nn.Module, size: int, width: int) -> Discriminator:
    """The discriminator of pictures of `size` pixels, on the meta device."""
    with META:
        return Discriminator(copy.deepcopy(backbone), size, width)


@cache
def discriminator_pass(
    backbone: nn.Module, size: int, width: int, half: bool, device: Device, learns: bool
) -> Pass:
    """Of heads that learn from pictures, or of pictures that learn from the heads."""
    heads = heads_of(backbone, size, width).requires_grad_(learns)

    def run(batch: int) -> tuple[int, int]:
        images = torch.empty(batch, 3, size, size, requires_grad=not learns, device="meta")
        return measure(lambda: heads(images), heads, half, device)

    return line_of(run)
