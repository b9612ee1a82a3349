"""The loop around an algorithm: who learns when, clipping, seeds, timing, checkpoints. No maths."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashdmd import checkpoint, distributed, draws
from flashdmd.algorithm import FlashDMD, Loss, Rollout, Update
from flashdmd.baselines import DMD2
from flashdmd.errors import UserError
from flashdmd.sampler import Cond
from flashdmd.seeds import seed_of
from flashdmd.stopwatch import REST, Stopwatch

Gradients = dict[nn.Parameter, Tensor]


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

    def split(self, parts: int) -> "list[Batch]":
        """Equal parts, in order; one part is the batch itself."""
        if parts == 1:
            return [self]
        size = len(self.noise) // parts

        def cut(value: Any, i: int) -> Any:
            if isinstance(value, dict):
                return {name: cut(tensor, i) for name, tensor in value.items()}
            return None if value is None else value[i * size : (i + 1) * size]

        return [
            Batch(**{name: cut(value, i) for name, value in vars(self).items()})
            for i in range(parts)
        ]


@dataclass(frozen=True)
class Learner:
    """A network and the optimizer of one of its jobs; its warm-up counts its own updates."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: float
    warmup: int
    max_grad_norm: float

    def clip(self) -> float:
        """Clips the gradients; returns the norm that they had."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        return distributed.number(norm)

    def step(self, updates: int) -> None:
        """One step after `updates` earlier ones."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (updates + 1) / max(1, self.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad()


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
    skipped: dict[str, int] = field(default_factory=dict)  # in a row, by kind of update

    @property
    def bad_in_a_row(self) -> int:
        """The most updates of one kind that were skipped since it last was finite: others may be
        finite in between, as the score estimator is where a decoder overflows.
        """
        return max(self.skipped.values(), default=0)

    @property
    def in_average(self) -> int:
        """Updates of the generator that the student averages, those of earlier runs too."""
        counts = self.before, self.updates
        made = (count.get(name, 0) for count in counts for name in ("generator", "preference"))
        return self.averaged + sum(made)

    def for_next_stage(self) -> "State":
        """A stage counts its own updates; cost and lambda_adv go on from the stage before."""
        return State(
            images=self.images,
            before=dict(self.updates),
            averaged=self.averaged,
            gan_loss_weight=self.gan_loss_weight,
        )


class Bad(NamedTuple):
    """An iteration with updates that were not finite and so were skipped, enough to replay it."""

    facts: dict[str, Any]
    batch: Batch


@dataclass
class Trainer:
    algorithm: FlashDMD | DMD2
    order: tuple[tuple[Update, ...], ...]
    batches: Callable[[int, tuple[Update, ...]], Batch]
    learners: dict[str, Learner]  # by the names in algorithm.trains
    seed: int = 0
    precision: torch.dtype | None = None  # autocast of the networks; losses stay float32
    calibration: tuple[int, int] = (50, 150)  # generator updates between which lambda_adv is set
    stage: str = "distill"
    state: State = field(default_factory=State)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    student: nn.Module | None = None  # the averaged generator: what a run leaves
    ema_decay: float = 0.99
    parts: int = 1  # gradient accumulation: what a batch is worked through in
    device: str = "cpu"  # the kind that autocast is told
    bad: Bad | None = None  # the last iteration, if it skipped an update

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
    def at_boundary(self) -> bool:
        """Whether a period of the cycle has just ended."""
        return self.state.iteration % len(self.order) == 0

    def iterate(self) -> dict[str, float]:
        """One iteration; what it does depends on seed, stage and iteration number alone, not on
        how many processes make it, or in how many parts.
        """
        started = time.perf_counter()
        n = self.state.iteration
        updates = self.order[n % len(self.order)]
        shared = torch.Generator().manual_seed(seed_of(self.seed, self.stage, n))
        torch.manual_seed(seed_of(self.seed, self.stage, n, 0))
        with self.cast():  # real pictures are decoded in the precision of the student's
            batch = self.batches(n, updates)
        record: dict[str, float] = {}
        bad: dict[str, dict[str, float]] = {}  # by update: what was not finite
        parts = batch.split(self.parts)
        steps = (0, 0) if updates == ("preference",) else self.algorithm.draw_steps(shared)
        samples: list[Rollout] = []  # of each part, shared by all updates of this iteration
        for update in updates:
            told = self.update(update, samples, parts, steps)
            if odd := {k: v for k, v in told.items() if not math.isfinite(v)}:
                bad[update] = odd
                told = {f"{update}/skipped": 1.0}
                self.state.skipped[update] = self.state.skipped.get(update, 0) + 1
            else:
                self.state.skipped.pop(update, None)
            record |= told
        if "score" in updates:
            self.state.images += len(batch.noise) * distributed.ranks()
        self.state.iteration += 1
        where = {"stage": self.stage, "iteration": n, "seed": self.seed, "steps": steps}
        self.bad = Bad(where | {"not_finite": bad}, batch) if bad else None
        seconds = time.perf_counter() - started
        self.stopwatch.iteration(seconds)
        return record | {"seconds": seconds}

    def update(
        self, update: Update, samples: list[Rollout], parts: list[Batch], steps: tuple[int, int]
    ) -> dict[str, float]:
        """One update: loss and gradients part by part, optimizers, the coupling after a
        generator's. The first one of an iteration draws the `samples` that the later ones learn on.

        Where a term or a gradient is not finite, no weight and no count is changed.
        """
        names = self.algorithm.trains[update]
        taken: tuple[Gradients, Gradients] = ({}, {})
        with self.only(names):
            record = distributed.mean(self.learn(update, samples, parts, steps, taken))
            learners = {name: self.learners[name] for name in names}
            networks = {learner.network: None for learner in learners.values()}
            every = (p.grad for network in networks for p in network.parameters())
            distributed.average([grad for grad in every if grad is not None])
        if update == "generator":
            record |= self.weigh(*taken)
            record |= {"generator/t_matching": steps[0], "generator/t_adversarial": steps[1]}
        with self.stopwatch.part("optimizers"):
            record |= {f"{name}/grad_norm": learner.clip() for name, learner in learners.items()}
            if not all(map(math.isfinite, record.values())):
                for learner in learners.values():
                    learner.optimizer.zero_grad()
                return record
            if update == "generator":
                self.calibrate(record)
                record["gan_loss_weight"] = self.algorithm.gan_loss_weight
            for name, learner in learners.items():
                done = self.state.updates.get(name, 0)
                learner.step(self.state.before.get(name, 0) + done)
                self.state.updates[name] = done + 1
            if update in ("generator", "preference"):
                self.algorithm.couple()
                self.average()
        return record

    def learn(
        self,
        update: Update,
        samples: list[Rollout],
        parts: list[Batch],
        steps: tuple[int, int],
        taken: tuple[Gradients, Gradients],
    ) -> dict[str, float]:
        """Gradients of an update, part by part, each on its rows of the same draws; the means of
        its terms.
        """
        values: dict[str, float] = {}
        first, of = distributed.rank() * len(parts), distributed.ranks() * len(parts)
        draws_first = not samples and update != "preference"
        for i, part in enumerate(parts):
            again = draws.rewound(self.device) if i + 1 < len(parts) else nullcontext()
            with again, draws.part(first + i, of):
                if draws_first:
                    samples.append(self.rollout(part, steps, learns=update == "generator"))
                with self.cast():
                    loss = self.loss(update, samples[i] if samples else None, part)
                with self.stopwatch.part(REST):
                    self.backward(update, loss, taken)
            if update == "generator":  # what it leads back through is no longer needed
                samples[i] = samples[i].detach()
            for name, value in {**loss.terms, **loss.watch}.items():
                values[name] = values.get(name, 0.0) + float(value.detach()) / len(parts)
        return values

    def rollout(self, part: Batch, steps: tuple[int, int], learns: bool) -> Rollout:
        """The student's samples, with gradients where it `learns` from them."""
        with torch.set_grad_enabled(learns), self.cast():
            return self.algorithm.rollout(part.noise, part.cond, *steps)

    @torch.no_grad()
    def average(self) -> None:
        """student <- d student + (1 - d) theta; d rises to `ema_decay`, so that a short run's
        average reaches back over a ninth of it and not to the teacher that it started from. Stage 2
        and a run from another's student count on: they start from an average and refine it.
        """
        if self.student is None:
            return
        n = self.state.in_average
        decay = min(self.ema_decay, n / (n + 9))
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

    def backward(self, update: Update, loss: Loss, taken: tuple[Gradients, Gradients]) -> None:
        """Gradients of the sum; the generator's two terms each add to its own of `taken`."""
        if update != "generator":
            (torch.stack(list(loss.terms.values())).sum() / self.parts).backward()
            return
        network = self.learners["generator"].network
        # DMD2's two terms share the forward at t
        with self.stopwatch.part(REST):  # it ends what the pass leaves running
            shares = isinstance(self.algorithm, DMD2)
            (loss.terms["matching"] / self.parts).backward(retain_graph=shares)
        take_gradients(network, taken[0])
        with self.stopwatch.part(REST):
            (loss.terms["adversarial"] / self.parts).backward()
        take_gradients(network, taken[1])

    def weigh(self, matching: Gradients, adversarial: Gradients) -> dict[str, float]:
        """The gradient of the generator's loss, and the norm that each of its two terms has."""
        distributed.average([*matching.values(), *adversarial.values()])
        norms = norm_of(matching.values()), norm_of(adversarial.values())
        for p in self.learners["generator"].network.parameters():
            terms = [taken[p] for taken in (matching, adversarial) if p in taken]
            p.grad = terms[0].add_(terms[1]) if len(terms) == 2 else next(iter(terms), None)
        return {
            "generator/grad_norm_matching": norms[0],
            "generator/grad_norm_adversarial": norms[1],
        }

    def calibrate(self, record: dict[str, float]) -> None:
        """Sets lambda_adv once, from the mean gradient norms within the calibration window."""
        matching = record["generator/grad_norm_matching"]
        adversarial = record["generator/grad_norm_adversarial"]
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
        return torch.autocast(self.device, self.precision or torch.bfloat16, enabled=on)

    @contextmanager
    def only(self, names: "list[str] | tuple[str, ...]") -> Iterator[None]:
        """Inside, gradients reach the networks of these learners and no others."""
        active = {self.learners[name].network for name in names}
        for learner in self.learners.values():
            learner.network.requires_grad_(learner.network in active)
        yield

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        state = vars(self.state) | {"stage": self.stage}
        checkpoint.save(folder, self.networks(), self.optimizers(), state, about)

    def restore(self, folder: Path) -> None:
        state = checkpoint.load(folder, self.networks(), self.optimizers())
        stage = state.pop("stage")
        if state.keys() != State.__dataclass_fields__.keys():
            raise UserError(f"the checkpoint {folder} is of another version; start over")
        if stage != self.stage:
            raise UserError(
                f"the checkpoint {folder} is of stage {stage}, and this run is in {self.stage}; "
                "give another output_dir"
            )
        self.state = State(**state)
        self.take_weight()

    def networks(self) -> dict[str, nn.Module]:
        """Each trained network once, for a preference learner has the generator's; the student."""
        names = {id(learner.network): name for name, learner in reversed(self.learners.items())}
        found = {name: self.learners[name].network for name in sorted(names.values())}
        return found | ({"student": self.student} if self.student else {})

    @torch.no_grad()
    def not_finite(self) -> str:
        """The trained networks whose weights have a length that is not finite in float32; or ""."""
        lengths = {
            name: norm_of(checkpoint.trained(network).values())
            for name, network in self.networks().items()
        }
        return " and ".join(name for name, x in lengths.items() if not math.isfinite(x))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: learner.optimizer for name, learner in self.learners.items()}


def take_gradients(network: nn.Module, taken: Gradients) -> None:
    """Moves the gradients of a backward pass out, to what was taken before: the next pass starts
    from none.
    """
    for p in network.parameters():
        if p.grad is not None:
            taken[p] = taken[p].add_(p.grad) if p in taken else p.grad
            p.grad = None


def norm_of(tensors: Collection[Tensor]) -> float:
    """The length of all together; 0 of none."""
    norms = torch._foreach_norm(list(tensors)) if tensors else [torch.zeros(())]
    return distributed.number(torch.stack(list(norms)).norm())
