"""Small networks that remember what they were asked, and by which forward gradients came."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashdmd.algorithm import FlashDMD, Method
from flashdmd.sampler import Sampler
from flashdmd.schedule import Process, VariancePreserving

STEPS = (999, 749, 499, 249)
D = 4  # size of a latent


@dataclass(frozen=True)
class Call:
    """One forward: when, of what, under which condition, and whether autograd recorded it."""

    t: Tensor
    x_t: Tensor
    cond: dict[str, Tensor]
    differentiable: bool

    @property
    def step(self) -> int:
        (step,) = set(self.t.tolist())
        return int(step)


class Student(nn.Module):
    """x_0 = gain[t] x_t + bias[t]: each step has parameters of its own."""

    def __init__(
        self,
        gain: float = 0.5,
        bias: float | dict[int, float] = 0.1,
        steps: tuple[int, ...] = STEPS,
    ) -> None:
        super().__init__()
        biases = bias if isinstance(bias, dict) else dict.fromkeys(steps, bias)
        self.gain = nn.ParameterDict({str(t): torch.full((D,), gain) for t in steps})
        self.bias = nn.ParameterDict({str(t): torch.full((D,), biases[t]) for t in steps})
        self.calls: list[Call] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        call = Call(t, x_t, cond, torch.is_grad_enabled())
        self.calls.append(call)
        return self.gain[str(call.step)] * x_t + self.bias[str(call.step)]

    def taught(self) -> set[int]:
        """The steps whose forward received a gradient."""
        parameters = {**self.gain, **{f"{t} ": p for t, p in self.bias.items()}}
        return {int(t) for t, p in parameters.items() if p.grad is not None and p.grad.any()}


class Estimator(nn.Module):
    """x_0_hat = gain x_t + bias, at any time."""

    def __init__(self, gain: float = 0.3, bias: float = 0.0) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.tensor(gain)), nn.Parameter(torch.tensor(bias))
        self.calls: list[Call] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.calls.append(Call(t, x_t, cond, torch.is_grad_enabled()))
        return self.gain * x_t + self.bias


def has_gradient(network: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def flash(process: Process | None = None, numbers: dict | None = None, **networks) -> FlashDMD:
    """Flash-DMD of these networks; `numbers` are fields of Method."""
    process = process or Process(VariancePreserving(), "eps")
    defaults = {
        "teacher": Estimator(0.2, 1.0),
        "generator": Student(),
        "score": Estimator(),
        "discriminator": nn.Linear(D, 3),
        "decode": nn.Linear(D, D),
    }
    method = Method(**(numbers or {}))
    sampler = Sampler(process, method.student_timesteps)
    return FlashDMD(method, sampler, **(defaults | networks))
