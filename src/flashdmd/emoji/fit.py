"""The loop that trains the embedded artefacts: resumable, logged, with an averaged copy.

Step n draws everything from (seed, n), so a fit that was stopped goes on as if it had not been.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from flashdmd.errors import Interrupted, UserError
from flashdmd.files import cut_torn_line, digest, mend, replace_file, replace_folder, stoppable
from flashdmd.seeds import seed_of

Losses = dict[str, Tensor]
OF = " of "  # between the digest of weights and their folder, which may move
OUTER = re.compile(r"embed|places|conv_(in|out)|painter\.out|network\.proj_out|norm_out|heads")


@dataclass(frozen=True)
class Fit:
    """How long and how fast. The learning rate warms up, stays, and falls to 0 over `cooldown`.

    With a `muon_rate` the hidden matrices and kernels learn by Muon, everything else by AdamW.
    `arguments` are what else decides the fit, by the option that a person gives; a folder is
    named by `weights_of`.
    """

    max_train_steps: int
    learning_rate: float
    folder: Path
    seed: int = 0
    warmup: int = 200
    cooldown: float = 0.25  # share of the steps
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    checkpoint_s: float = 120.0
    muon_rate: float | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)

    @property
    def decided_by(self) -> dict[str, str]:
        return {k: str(v) for k, v in {**self.arguments, "--seed": self.seed}.items()}

    def check(self) -> None:
        """Raises UserError when the state in `folder` is of a fit with other arguments."""
        mend(self.folder / "state")
        notes = self.folder / "state/state.json"
        if not notes.exists():
            return
        before = json.loads(notes.read_text()).get("arguments", {})
        for name, now in self.decided_by.items():
            was = before.get(name, "unknown")
            if was.split(OF)[0] != now.split(OF)[0]:
                raise UserError(
                    f"{name} is {now}, but the fit in {self.folder} was begun with {was}; give "
                    f"that one, or another --output, or delete {self.folder}"
                )

    def share(self, step: int) -> float:
        """Of the full learning rate, in 0..1."""
        falling = (self.max_train_steps - step) / max(1, self.cooldown * self.max_train_steps)
        rising = (step + 1) / max(1, min(self.warmup, self.max_train_steps // 10))
        return min(1.0, rising, falling)


class Optimizers:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the others.

    Muon (Jordan et al. 2024) makes each update's singular values equal, so directions that few
    examples ask for, such as rare names, are learned as fast as common ones. torch's takes
    matrices only: kernels are lent to it as matrices that share their memory.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], plan: Fit) -> None:
        self.parameters = parameters
        self.lent = {
            name: p.detach().flatten(1)
            for name, p in parameters.items()
            if plan.muon_rate and p.ndim > 1 and not OUTER.search(name)
        }
        rest = [p for name, p in parameters.items() if name not in self.lent]
        decay = plan.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=plan.learning_rate, weight_decay=decay, fused=True)
        ]
        if plan.muon_rate and self.lent:
            muon = torch.optim.Muon(
                self.lent.values(),
                lr=plan.muon_rate,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self.parts.append(muon)
        self.rates = [part.defaults["lr"] for part in self.parts]

    def step(self, share: float) -> None:
        """One update at `share` of the full learning rate; gradients are spent."""
        for name, matrix in self.lent.items():
            gradient = self.parameters[name].grad
            matrix.grad = None if gradient is None else gradient.flatten(1)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()
            part.zero_grad()
        for name in self.lent:
            self.parameters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything remembered between updates, as `what.parameter`."""
        return {
            f"{what}.{name}": value
            for name, (part, p) in self._owners().items()
            for what, value in part.state[p].items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `state` gave; what had had no gradient yet has no state either."""
        for name, (part, p) in self._owners().items():
            kinds = ("momentum_buffer",) if name in self.lent else ("step", "exp_avg", "exp_avg_sq")
            if f"{kinds[0]}.{name}" in tensors:
                part.state[p] = {what: tensors[f"{what}.{name}"] for what in kinds}

    def _owners(self) -> dict[str, tuple[torch.optim.Optimizer, Tensor]]:
        return {
            name: (self.parts[1], self.lent[name]) if name in self.lent else (self.parts[0], p)
            for name, p in self.parameters.items()
        }


def fit(
    network: nn.Module,
    loss: Callable[[int], Losses],
    plan: Fit,
    show: Callable[[nn.Module, int], None] | None = None,
    show_every: int = 1000,
) -> nn.Module:
    """Trains `network` in place to `plan.max_train_steps`; returns its averaged copy.

    `loss(step)` gives named terms whose sum is minimised. `show(averaged, step)` may look at the
    averaged weights; they are swapped in while it does. State lives in `plan.folder/state`.
    Raises Interrupted when asked to stop, with the state saved.
    """
    parameters = {k: p for k, p in network.named_parameters() if p.requires_grad}
    optimizer = Optimizers(parameters, plan)
    average = {k: p.detach().clone() for k, p in parameters.items()}
    start = _resume(plan, parameters, average, optimizer)
    log = plan.folder / "metrics.jsonl"
    cut_torn_line(log)
    saved = time.monotonic()
    bar = tqdm(range(start, plan.max_train_steps), initial=start, total=plan.max_train_steps)
    recent: dict[str, float] = {}
    with stoppable() as asked_to_stop:
        for step in bar:
            values = _update(step, loss, plan, parameters, average, optimizer)
            recent = {k: 0.98 * recent.get(k, v) + 0.02 * v for k, v in values.items()}
            if step % 50 == 49:
                bar.set_postfix({k: f"{v:.4f}" for k, v in recent.items()})
                facts = {"step": step + 1, "rate": plan.share(step)}
                with log.open("a") as f:
                    f.write(json.dumps(facts | recent) + "\n")
            last = step + 1 == plan.max_train_steps
            stop = asked_to_stop()
            if last or stop or time.monotonic() - saved > plan.checkpoint_s:
                _save(plan, step + 1, parameters, average, optimizer)
                saved = time.monotonic()
            if not stop and show is not None and (last or (step + 1) % show_every == 0):
                with swapped(parameters, average):
                    show(network, step + 1)
            if stop or (last and asked_to_stop()):
                raise Interrupted(f"stopped after {step + 1} steps; saved in {plan.folder}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(average[name])
    return network


def _update(
    step: int,
    loss: Callable[[int], Losses],
    plan: Fit,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: Optimizers,
) -> dict[str, float]:
    torch.manual_seed(seed_of(plan.seed, step))
    with sdpa_kernel(SDPBackend.MATH):  # at 64 tokens a fifth faster a step than the fused one
        terms = loss(step)
        torch.stack(list(terms.values())).sum().backward()
    norm = nn.utils.clip_grad_norm_(parameters.values(), plan.max_grad_norm)
    optimizer.step(plan.share(step))
    decay = min(plan.ema_decay, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
    values = {k: v.item() for k, v in terms.items()} | {"grad_norm": norm.item()}
    if not math.isfinite(sum(values.values())):
        raise UserError(
            f"step {step} of the fit in {plan.folder} is not finite: {values}; begin anew in "
            "another --output, with another --seed or, of a teacher, a lower --rate"
        )
    return values


def weights_of(*folders: Path) -> str:
    """A digest of the weights in folders of networks or pipelines, and the folders; or none."""
    depths = ("*.safetensors", "*/*.safetensors")
    files = [f for folder in folders for depth in depths for f in sorted(folder.glob(depth))]
    said = digest(*(f.read_bytes() for f in files)) + OF + ", ".join(map(str, folders))
    return said if folders else "none"


def kept(path: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gave once, from `path`; made anew where that was under another `key`."""
    try:
        with safe_open(path, "pt") as stored:
            if stored.metadata() == {"key": key}:
                return load_file(path)
    except (FileNotFoundError, SafetensorError):
        pass
    made = {k: v.contiguous() for k, v in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as beside:
        save_file(made, beside, {"key": key})
    return made


def fused(network: nn.Module) -> nn.Module:
    """`network`, compiled where there is a C++ compiler to do it with; parameters are shared.

    A training step of the embedded MMDiT, two thirds of it elementwise, takes 0.80 s then instead
    of 1.24 (batch 128, one core, interleaved); one of the UNet, mostly convolutions, as long.
    """
    compiled = torch.compile(network) if shutil.which("g++") else network
    assert isinstance(compiled, nn.Module)
    return compiled


@contextmanager
def swapped(parameters: dict[str, nn.Parameter], average: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold the averaged values."""
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(average[name])
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])


def _save(
    plan: Fit,
    step: int,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: Optimizers,
) -> None:
    tensors = optimizer.state()
    for name, p in parameters.items():
        tensors |= {f"now.{name}": p.detach(), f"average.{name}": average[name]}
    with replace_folder(plan.folder / "state") as beside:
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside / "state.safetensors")
        notes = {"step": step, "arguments": plan.decided_by}
        (beside / "state.json").write_text(json.dumps(notes))


def _resume(
    plan: Fit,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: Optimizers,
) -> int:
    plan.check()
    state = plan.folder / "state"
    plan.folder.mkdir(parents=True, exist_ok=True)
    if not state.exists():
        return 0
    step = json.loads((state / "state.json").read_text())["step"]
    tensors = load_file(state / "state.safetensors")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"now.{name}"])
            average[name] = tensors[f"average.{name}"]
    optimizer.load(tensors)
    return int(step)
