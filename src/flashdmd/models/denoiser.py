"""A pipeline's network as x_0_hat = f(x_t, t, cond): the teacher's, or one that learns.

Full fine-tuning learns on copies of the network. With LoRA there is one frozen network, and who
speaks is a matter of which adapter is on: none (the teacher), the student's, the score estimator's.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashdmd import distributed
from flashdmd.errors import UserError
from flashdmd.models.families import Family
from flashdmd.models.recompute import Context, recomputed, running
from flashdmd.sampler import Cond
from flashdmd.schedule import Process

FEW_PLACES = 256


def attention(x_t: Float[Tensor, "B C H W"], learning: bool) -> AbstractContextManager[None]:
    """The plain kernel where gradients are wanted of few places on a processor.

    The fused one's backward pass is slow there: forward and backward of the embedded UNet take 275
    ms with it and 238 with the plain one, forward alone 77 and 91 (batch 32).
    """
    few = x_t.shape[-2] * x_t.shape[-1] <= FEW_PLACES
    if few and x_t.device.type == "cpu" and learning:
        plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return plain
    return nullcontext()


class NetworkDenoiser(nn.Module):
    """A pipeline's network as x_0_hat = f(x_t, t, cond). Outputs are float32."""

    def __init__(self, network: nn.Module, family: Family, process: Process) -> None:
        super().__init__()
        self.network, self.family, self.process = network, family, process

    def forward(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        cond: Cond,
        middle_only: bool = False,
    ) -> Float[Tensor, "B D h w"]:
        """x_0_hat; or the features of the network's middle, without running what lies behind it."""
        if middle_only:
            return self._middle(x_t, t, cond)
        return self.process.to_x0(self.output(x_t, t, cond), x_t, t)

    def output(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], cond: Cond
    ) -> Float[Tensor, "B C H W"]:
        """What the network predicts, in the kind of `process`."""
        dtype = self.dtype
        told = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        enter = self.context(x_t, told)
        token = running.set(enter)
        try:
            with enter():
                return self.family.output(self.network, x_t.to(dtype), t, told).float()
        finally:
            running.reset(token)

    def context(self, x_t: Tensor, cond: Cond) -> Context:
        """Makes what a forward runs in; and again when it is recomputed for its gradient."""
        family, learning = self.family.context(self.network, x_t, cond), torch.is_grad_enabled()

        @contextmanager
        def enter() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(self.selected())
                stack.enter_context(family())
                stack.enter_context(attention(x_t, learning))
                yield

        return enter

    def selected(self) -> AbstractContextManager[None]:
        """Inside, the network speaks as this denoiser."""
        return nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not quantised, and so of what the network is fed."""
        floats = (p.dtype for p in self.network.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    def merged(self) -> nn.Module:
        """The network alone, what was learned in its weights.

        Of a sharded one a whole copy to be written, on the processor of the first process; the
        others, who have to call as well, get one without weights.
        """
        if not distributed.shards(dict(self.network.named_parameters())):
            return self.network
        weights = distributed.whole(self.network.state_dict())
        kind: Any = distributed.plain(self.network)
        with torch.device("meta"):
            network: nn.Module = kind.from_config(self.network.config)
        if weights:
            network.load_state_dict(weights, assign=True)
        return network

    def twin(self, name: str) -> "NetworkDenoiser":
        """Another of the same weights that learns on its own, in float32; starts without gradients.

        No network here has dropout; train mode would change nothing.
        """
        other = copy.deepcopy(self).float()
        return other.requires_grad_(False).eval()

    def outline(self) -> "NetworkDenoiser":
        """A twin without weights, which take memory only when it is dealt out."""
        network = distributed.outline(self.network)
        return NetworkDenoiser(network, self.family, self.process).eval()

    def dealt(self, other: nn.Module) -> "NetworkDenoiser":
        """This outline dealt out over the processes, with the weights of another."""
        distributed.deal(self.network)
        self.take(other)
        return self

    @torch.no_grad()
    def take(self, other: nn.Module) -> None:
        """The weights of another of the same shape."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            distributed.fill(mine, theirs)

    def bottleneck(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], cond: Cond
    ) -> Float[Tensor, "B D h w"]:
        features: Tensor = self(x_t, t, cond, middle_only=True)
        return features

    def _middle(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        def stop(_: nn.Module, __: Any, answer: Any) -> None:
            raise _Reached(answer)

        hook = self.family.middle(self.network).register_forward_hook(stop)
        try:
            self.output(x_t, t, cond)
        except _Reached as reached:
            return self.family.feature(reached.answer, x_t, self.network).float()
        finally:
            hook.remove()
        raise AssertionError("the network has a middle and did not come by it")


class _Reached(Exception):  # noqa: N818 - it is no error
    """The middle of the network has answered."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


@dataclass(frozen=True)
class Adapter:
    """The numbers of a LoRA: W + (alpha / rank) B A in every layer of these names."""

    rank: int
    alpha: float
    layers: tuple[str, ...]


class AdapterDenoiser(NetworkDenoiser):
    """The shared, frozen network with adapter `name` on; without a name, with none: the teacher.

    Its parameters are the adapter's alone, in float32, by the names of the layers they belong to.
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        process: Process,
        adapter: Adapter,
        name: str | None = None,
        layers: list[BaseTunerLayer] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.shared = (network,)  # a tuple: no submodule, so not among the parameters
        self.family, self.process, self.adapter, self.name = family, process, adapter, name
        self.layers = [] if layers is None else layers  # one list for all who share the network
        self.own: dict[str, nn.Parameter] = {}
        if name is not None:
            add_adapter(network, adapter, name)
            self.layers[:] = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
            for layer in self.layers:  # peft leaves on what was added last
                layer._active_adapter = []
            self.own = dict(adapter_weights(network, name))
        network.requires_grad_(False)

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        return self.shared[0]

    @property
    def dtype(self) -> torch.dtype:
        adapters = {id(p) for layer in self.layers for p in adapter_parameters(layer)}
        floats = (
            p.dtype
            for p in self.network.parameters()
            if p.is_floating_point() and id(p) not in adapters
        )
        return next(floats, torch.float32)

    @contextmanager
    def selected(self) -> Iterator[None]:
        before = [layer._active_adapter for layer in self.layers]
        for layer in self.layers:
            # not layer.set_adapter: that switches gradients of the parameters on and off as well
            layer._active_adapter = [self.name] if self.name else []
        try:
            yield
        finally:
            for layer, name in zip(self.layers, before, strict=True):
                layer._active_adapter = name

    def merged(self) -> nn.Module:
        """In float32 and without layers of peft."""
        assert self.name is not None
        network = copy.deepcopy(self.network).float()
        for path, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge(adapter_names=[self.name])
                network.set_submodule(path, layer.get_base_layer())
        return network

    def twin(self, name: str) -> "AdapterDenoiser":
        """Another adapter on the same network, of the same weights; starts without gradients."""
        learning = {
            p for layer in self.layers for p in adapter_parameters(layer) if p.requires_grad
        }
        other = AdapterDenoiser(
            self.network, self.family, self.process, self.adapter, name, self.layers
        )
        for p in learning:
            p.requires_grad_(True)
        if self.name is not None:
            other.take(self)
        return other

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.own.items())

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: p.detach() for name, p in self.own.items()}

    def __deepcopy__(self, _: dict[int, Any]) -> "AdapterDenoiser":
        raise TypeError("an adapter shares its network; `twin` makes another")


def add_adapter(network: nn.Module, adapter: Adapter, name: str) -> None:
    """Puts an adapter that changes nothing yet on the layers that `adapter` names.

    Raises UserError when the network has none of them.
    """
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=list(adapter.layers),
        init_lora_weights="gaussian",  # A is drawn, B is zero
    )
    try:
        with warnings.catch_warnings():  # several adapters on one network are what is wanted
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, network, name)
    except ValueError as e:
        linear = {
            n.rpartition(".")[2] for n, m in network.named_modules() if isinstance(m, nn.Linear)
        }
        raise UserError(
            f"lora.lora_layers={list(adapter.layers)}: the network has no such layers; its linear "
            f"ones are called {', '.join(sorted(linear))}"
        ) from e


def adapter_weights(network: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(layer.lora_A.weight, parameter) of an adapter, as float32."""
    for path, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            for part in ("lora_A", "lora_B"):
                parts = getattr(module, part)
                if name in parts:
                    parts[name].float()
                    yield f"{path}.{part}.weight", parts[name].weight


def adapter_parameters(layer: BaseTunerLayer) -> Iterator[nn.Parameter]:
    for part in ("lora_A", "lora_B"):
        yield from getattr(layer, part).parameters()


def save_memory(network: Any) -> None:
    """Gradient checkpointing of a network or an autoencoder: less is kept, more computed again.

    Raises UserError for a class that cannot.
    """
    try:
        network.enable_gradient_checkpointing(recomputed)
    except ValueError as e:
        raise UserError(f"train.gradient_checkpointing: {e}; set it to false") from e
