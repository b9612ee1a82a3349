"""The loop around an algorithm: who learns when, clipping, seeds, timing, checkpoints. No maths."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdmd import checkpoint
from flashdmd.algorithm import FlashDMD, Loss, Rollout, Update
from flashdmd.baselines import DMD2
from flashdmd.errors import UserError
from flashdmd.sampler import Cond
from flashdmd.seeds import seed_of
from flashdmd.stopwatch import REST, Stopwatch


@dataclass(frozen=True)
class Batch:
    """What one iteration consumes; a function of (seed, iteration) alone.

    What its updates have no use for is not made.
    """

    noise: Tensor  # (B, C, H, W) at the first step
    cond: Cond
    real: Tensor | None = None  # pictures for the discriminator
    real_latents: Tensor | None = None  # for a GAN in latent space
    reward_cond: Cond = field(default_factory=dict)


@dataclass(frozen=True)
class Learner:
    """A network and the optimizer of one of its jobs; its warm-up counts its own updates."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: float
    warmup: int
    max_grad_norm: float

    def step(self, updates: int) -> float:
        """One step after `updates` earlier ones; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (updates + 1) / max(1, self.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


@dataclass
class State:
    """Where a run stands: with networks and optimizers, all that a resumed run needs."""

    iteration: int = 0  # of the current stage's cycle
    updates: dict[str, int] = field(default_factory=dict)  # by learner
    images: int = 0  # cost: batch x iterations in which the score estimator learned
    before: dict[str, int] = field(default_factory=dict)  # updates of the stages before
    averaged: int = 0  # updates in the average that the run started from: another run's student
    gan_loss_weight: float | None = None  # lambda_adv; None: the method's, until it is calibrated
    norms: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sums: matching, adversarial

    def for_next_stage(self) -> "State":
        """A stage counts its own updates; cost and lambda_adv go on from the stage before."""
        return State(
            images=self.images,
            before=dict(self.updates),
            averaged=self.averaged,
            gan_loss_weight=self.gan_loss_weight,
        )


@dataclass
class Trainer:
    algorithm: FlashDMD | DMD2
    order: tuple[tuple[Update, ...], ...]
    batches: Callable[[int, tuple[Update, ...]], Batch]
    learners: dict[str, Learner]  # by the names in algorithm.trains
    seed: int = 0
    rank: int = 0
    precision: torch.dtype | None = None  # autocast of the networks; losses stay float32
    calibration: tuple[int, int] = (50, 150)  # generator updates between which lambda_adv is set
    stage: str = "distill"
    state: State = field(default_factory=State)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    student: nn.Module | None = None  # the averaged generator: what a run leaves
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        self.take_weight()

    def take_weight(self) -> None:
        """lambda_adv as the state has it, which a new run takes from the method."""
        if self.state.gan_loss_weight is None:
            self.state.gan_loss_weight = self.algorithm.gan_loss_weight
        self.algorithm.gan_loss_weight = self.state.gan_loss_weight

    @property
    def generator_updates(self) -> int:
        return self.state.updates.get("generator", 0)

    @property
    def averaged(self) -> int:
        """Updates of the generator that the student averages, those of earlier runs too."""
        counts = self.state.before, self.state.updates
        made = (count.get(name, 0) for count in counts for name in ("generator", "preference"))
        return self.state.averaged + sum(made)

    @property
    def at_boundary(self) -> bool:
        """Whether a period of the cycle has just ended."""
        return self.state.iteration % len(self.order) == 0

    def iterate(self) -> dict[str, float]:
        """One iteration; what it does depends on seed, rank, stage and iteration number alone."""
        started = time.perf_counter()
        n = self.state.iteration
        updates = self.order[n % len(self.order)]
        shared = torch.Generator().manual_seed(seed_of(self.seed, self.stage, n))
        torch.manual_seed(seed_of(self.seed, self.stage, n, self.rank))
        with self.cast():  # real pictures are decoded in the precision of the student's
            batch = self.batches(n, updates)
        record: dict[str, float] = {}
        samples = self.rollout(updates, batch, shared)
        for update in updates:
            record |= self.update(update, samples, batch)
        if "score" in updates:
            self.state.images += len(batch.noise)
        self.state.iteration += 1
        if bad := {k: v for k, v in record.items() if not math.isfinite(v)}:
            raise FloatingPointError(f"iteration {n} of stage {self.stage}: {bad}")
        seconds = time.perf_counter() - started
        self.stopwatch.iteration(seconds)
        return record | {"seconds": seconds}

    def rollout(
        self, updates: tuple[Update, ...], batch: Batch, shared: torch.Generator
    ) -> Rollout | None:
        """The samples that all updates of this iteration share, with gradients where needed."""
        if updates == ("preference",):
            return None
        t, t_hat = self.algorithm.draw_steps(shared)
        learns = "generator" in updates
        with (
            torch.set_grad_enabled(learns),
            self.only(["generator"] if learns else []),
            self.cast(),
        ):
            return self.algorithm.rollout(batch.noise, batch.cond, t, t_hat)

    def update(self, update: Update, samples: Rollout | None, batch: Batch) -> dict[str, float]:
        """One update: loss, gradients, optimizers, and the coupling after a generator's."""
        names = self.algorithm.trains[update]
        with self.only(names):
            with self.cast():
                loss = self.loss(update, samples, batch)
            with self.stopwatch.part(REST):
                record = self.backward(update, loss)
        if update == "generator" and samples:
            record |= {"generator/t_matching": samples.t, "generator/t_adversarial": samples.t_hat}
        for name in names:
            done = self.state.updates.get(name, 0)
            with self.stopwatch.part("optimizers"):
                before = self.state.before.get(name, 0)
                record[f"{name}/grad_norm"] = self.learners[name].step(before + done)
            self.state.updates[name] = done + 1
        if update in ("generator", "preference"):
            with self.stopwatch.part("optimizers"):
                self.algorithm.couple()
                self.average()
        values = {**loss.terms, **loss.watch}
        return record | {name: float(value.detach()) for name, value in values.items()}

    @torch.no_grad()
    def average(self) -> None:
        """student <- d student + (1 - d) theta; d rises to `ema_decay`, so that a short run's
        average reaches back over a ninth of it and not to the teacher that it started from. Stage 2
        and a run from another's student count on: they start from an average and refine it.
        """
        if self.student is None:
            return
        decay = min(self.ema_decay, self.averaged / (self.averaged + 9))
        theta = self.algorithm.generator.parameters()
        torch._foreach_lerp_(list(self.student.parameters()), list(theta), 1 - decay)

    def loss(self, update: Update, samples: Rollout | None, batch: Batch) -> Loss:
        algorithm = self.algorithm
        if update == "preference":
            assert isinstance(algorithm, FlashDMD)
            return algorithm.preference_loss(batch.noise, batch.cond, batch.reward_cond)
        assert samples is not None
        if update == "generator":
            return algorithm.generator_loss(samples, batch.cond)
        if isinstance(algorithm, DMD2):
            assert batch.real_latents is not None
            return algorithm.score_loss(samples, batch.cond, batch.real_latents)
        if update == "score":
            return algorithm.score_loss(samples, batch.cond)
        assert batch.real is not None
        return algorithm.discriminator_loss(samples, batch.real)

    def backward(self, update: Update, loss: Loss) -> dict[str, float]:
        """Gradients of the sum; for the generator also the norm that each of its two terms has."""
        if update != "generator":
            torch.stack(list(loss.terms.values())).sum().backward()
            return {}
        network = self.learners["generator"].network
        # DMD2's two terms share the forward at t
        with self.stopwatch.part(REST):  # it ends what the pass leaves running
            loss.terms["matching"].backward(retain_graph=isinstance(self.algorithm, DMD2))
        matching = take_gradients(network)
        with self.stopwatch.part(REST):
            loss.terms["adversarial"].backward()
        adversarial = take_gradients(network)
        norms = norm_of(matching), norm_of(adversarial)
        for p in network.parameters():
            terms = [taken[p] for taken in (matching, adversarial) if p in taken]
            p.grad = terms[0].add_(terms[1]) if len(terms) == 2 else next(iter(terms), None)
        self.calibrate(*norms)
        return {
            "generator/grad_norm_matching": norms[0],
            "generator/grad_norm_adversarial": norms[1],
            "gan_loss_weight": self.algorithm.gan_loss_weight,
        }

    def calibrate(self, matching: float, adversarial: float) -> None:
        """Sets lambda_adv once, from the mean gradient norms within the calibration window."""
        ratio, (first, last) = self.algorithm.method.gan_gradient_ratio, self.calibration
        if ratio is None or not first <= self.generator_updates < last:
            return
        sums = [self.state.norms[0] + matching, self.state.norms[1] + adversarial]
        self.state.norms = sums
        if self.generator_updates + 1 == last and min(sums) > 0:  # else there is nothing to weigh
            self.algorithm.gan_loss_weight *= ratio * sums[0] / sums[1]
            self.state.gan_loss_weight = self.algorithm.gan_loss_weight

    def cast(self) -> Any:
        on = self.precision is not None
        return torch.autocast("cpu", self.precision or torch.bfloat16, enabled=on)

    @contextmanager
    def only(self, names: "list[str] | tuple[str, ...]") -> Iterator[None]:
        """Inside, gradients reach the networks of these learners and no others."""
        active = {self.learners[name].network for name in names}
        for learner in self.learners.values():
            learner.network.requires_grad_(learner.network in active)
        yield

    def save(self, folder: Path) -> None:
        state = vars(self.state) | {"stage": self.stage}
        checkpoint.save(folder, self.networks(), self.optimizers(), state)

    def restore(self, folder: Path) -> None:
        state = checkpoint.load(folder, self.networks(), self.optimizers())
        assert state.pop("stage") == self.stage
        if state.keys() != State.__dataclass_fields__.keys():
            raise UserError(f"the checkpoint {folder} is of another version; start over")
        self.state = State(**state)
        self.take_weight()

    def networks(self) -> dict[str, nn.Module]:
        """Each trained network once, for a preference learner has the generator's; the student."""
        names = {id(learner.network): name for name, learner in reversed(self.learners.items())}
        found = {name: self.learners[name].network for name in sorted(names.values())}
        return found | ({"student": self.student} if self.student else {})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: learner.optimizer for name, learner in self.learners.items()}


def take_gradients(network: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The gradients of a backward pass, moved out: the next pass starts from none."""
    taken = {p: p.grad for p in network.parameters() if p.grad is not None}
    for p in taken:
        p.grad = None
    return taken


def norm_of(gradients: dict[nn.Parameter, Tensor]) -> float:
    """The length of all gradients together; 0 of none."""
    norms = torch._foreach_norm(list(gradients.values())) if gradients else [torch.zeros(())]
    return float(torch.stack(list(norms)).norm())
