"""Who learns when, what an update leaves alone, and that a resumed run is the uninterrupted one."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import Lost
from networks import STEPS, D, Estimator
from torch import Tensor, nn

from flashdmd.algorithm import FlashDMD, Loss, Method, Rollout, Stage, Update, cycle
from flashdmd.baselines import DMD2, NUMBERS, dmd2_cycle
from flashdmd.errors import UserError
from flashdmd.sampler import Sampler
from flashdmd.schedule import Process, VariancePreserving
from flashdmd.trainer import Batch, Learner, Trainer

SAMPLER = Sampler(Process(VariancePreserving(), "eps"), STEPS)


class Net(nn.Module):
    """x_0_hat = gain x_t + bias with parameters of its own for each quarter of the times."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((4, D), 0.5))
        self.bias = nn.Parameter(torch.full((4, D), 0.1))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        quarter = (t // 250).long()
        return self.gain[quarter] * x_t + self.bias[quarter]

    def bottleneck(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self(x_t, t, cond)


def batches(n: int, updates: tuple[Update, ...]) -> Batch:
    draw = torch.Generator().manual_seed(n)
    noise, real = torch.randn(2, 16, D, generator=draw)
    return Batch(noise, {"c": noise}, real, real, {"c": noise})


def learner(network: nn.Module, warmup: int = 1) -> Learner:
    return Learner(network, torch.optim.AdamW(network.parameters(), 1e-2), 1e-2, warmup, 10.0)


def trainer(stage: Stage = "joint", method: Method | None = None, **options) -> Trainer:
    torch.manual_seed(0)
    method = method or Method(beta=5.0)
    generator, score, discriminator = Net(), Net(), nn.Linear(D, 3)
    reference = copy.deepcopy(generator).requires_grad_(False)

    def reward(z: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return z.sum(1)

    algorithm = FlashDMD(
        method, SAMPLER, Estimator(0.2, 1.0), generator, score, discriminator,
        decode=lambda x: x, reward=reward, reference=reference,
    )  # fmt: skip
    learners = {
        "generator": learner(generator),
        "score": learner(score),
        "discriminator": learner(discriminator),
        "preference": learner(generator),
    }
    if options.get("ema_decay"):
        options["student"] = copy.deepcopy(generator).requires_grad_(False)
    return Trainer(algorithm, cycle(method, stage), batches, learners, stage=stage, **options)


def averaging() -> Trainer:
    return trainer(ema_decay=0.7)


def dmd2_trainer() -> Trainer:
    torch.manual_seed(0)
    method = Method(**NUMBERS)
    generator, score, head = Net(), Net(), nn.Linear(D, 1)
    algorithm = DMD2(method, SAMPLER, Estimator(0.2, 1.0), generator, score, head)
    learners = {
        "generator": learner(generator),
        "score": learner(score),
        "discriminator": learner(head),
    }
    return Trainer(algorithm, dmd2_cycle(method, "distill"), batches, learners)


def weights(t: Trainer) -> dict[str, list[Tensor]]:
    return {
        name: [p.detach().clone() for p in network.parameters()]
        for name, network in t.networks().items()
    }


def changed(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    return {
        name
        for name in before
        if any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
    }


def test_a_preference_iteration_moves_the_generator_and_the_coupled_score_alone() -> None:
    t = trainer()
    for _ in range(2):  # ttur = 2: the distilling iterations
        t.iterate()
    before = weights(t)
    t.iterate()
    assert changed(before, weights(t)) == {"generator", "score"}
    t.algorithm.method = Method(beta=5.0, score_coupling=1.0)
    before = weights(t)
    t.iterate()
    assert changed(before, weights(t)) == {"generator"}


def test_between_its_turns_the_generator_rests() -> None:
    t = trainer("distill")
    t.iterate()
    before = weights(t)
    t.iterate()
    assert changed(before, weights(t)) == {"score", "discriminator"}


@pytest.mark.parametrize("ttur", [1, 2, 5])
def test_updates_are_counted_as_the_paper_counts_them(ttur: int) -> None:
    t = trainer("joint", Method(ttur=ttur, beta=5.0))
    for _ in range(3 * (ttur + 5)):
        t.iterate()
    assert t.state.updates == {
        "generator": 3, "score": 3 * ttur, "discriminator": 3 * ttur, "preference": 15,
    }  # fmt: skip
    assert t.state.images == 3 * ttur * 16


def test_dmd2_learns_its_score_five_times_a_generator_update() -> None:
    t = dmd2_trainer()
    for _ in range(10):
        t.iterate()
    assert t.state.updates == {"generator": 2, "score": 10, "discriminator": 10}


@pytest.mark.parametrize("make", [trainer, averaging, dmd2_trainer])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make, tmp_path: Path) -> None:
    whole, first, second = make(), make(), make()
    for _ in range(17):
        whole.iterate()
    for _ in range(8):
        first.iterate()
    first.save(tmp_path / "checkpoint-8")
    torch.randn(7)  # what happened in between does not matter
    second.restore(tmp_path / "checkpoint-8")
    for _ in range(9):
        second.iterate()
    assert not changed(weights(whole), weights(second))
    assert whole.state == second.state
    for a, b in zip(whole.optimizers().values(), second.optimizers().values(), strict=True):
        for x, y in zip(a.state.values(), b.state.values(), strict=True):
            assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_run_of_another_seed_is_another_run() -> None:
    runs = [trainer(seed=0), trainer(seed=1)]
    for t in runs:
        t.iterate()
    assert changed(*(weights(t) for t in runs))


def test_calibration_makes_the_gradient_ratio_what_was_asked() -> None:
    """With rates of zero nothing moves, so the ratio after is the ratio asked for, up to draws."""
    method = Method(gan_gradient_ratio=0.25, ttur=1)
    t = trainer("distill", method, calibration=(0, 200))
    for name, one in list(t.learners.items()):
        t.learners[name] = Learner(one.network, one.optimizer, 0.0, 1, 10.0)
    records = [t.iterate() for _ in range(600)]
    before, after = records[0], records[-1]
    assert before["gan_loss_weight"] == 0.1
    assert after["gan_loss_weight"] != 0.1
    late = records[200:]
    matching = sum(r["generator/grad_norm_matching"] for r in late)
    adversarial = sum(r["generator/grad_norm_adversarial"] for r in late)
    assert adversarial / matching == pytest.approx(0.25, rel=0.1)
    assert len({r["gan_loss_weight"] for r in late[1:]}) == 1


def test_the_log_says_at_which_steps_the_norms_were_taken() -> None:
    t = trainer("distill", Method(adversarial_timesteps=(499, 249)))
    drawn, draw = [], t.algorithm.draw_steps
    t.algorithm.draw_steps = lambda rng: drawn.append(draw(rng)) or drawn[-1]
    records = [t.iterate() for _ in range(16)]
    names = ("generator/t_matching", "generator/t_adversarial")
    assert [tuple(r[name] for name in names) for r in records[::2]] == drawn[::2]
    assert all(len(set(steps)) > 1 for steps in zip(*drawn[::2], strict=True))
    assert not any(name in r for r in records[1::2] for name in names)


def test_the_norms_of_both_terms_are_of_the_gradients_that_were_added() -> None:
    """Each step has parameters of its own, so the squares of the terms add up to the whole."""
    t = trainer("distill", Method(gan_gradient_ratio=None))
    record = t.iterate()
    terms = record["generator/grad_norm_matching"], record["generator/grad_norm_adversarial"]
    assert all(n > 0 for n in terms)
    whole = record["generator/grad_norm"]
    assert whole == pytest.approx((terms[0] ** 2 + terms[1] ** 2) ** 0.5, rel=1e-5)


def test_warm_up_counts_a_networks_own_updates() -> None:
    t = trainer("distill", Method(ttur=5))
    network = t.learners["generator"].network
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    t.learners["generator"] = Learner(network, optimizer, 1.0, 4, 10.0)
    rates = []
    for _ in range(20):
        t.iterate()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[::5] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.fault("numbers: a loss that is not finite", "one update's, times NaN or infinity")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("update", ["generator", "score", "discriminator", "preference"])
def test_an_update_that_is_not_finite_is_skipped(update: Update, value: float, lost: Lost) -> None:
    """Neither its networks nor its counts are changed, and what it was is kept."""
    stage: Stage = "rl" if update == "preference" else "distill"
    t, (name,) = trainer(stage, Method(beta=5.0, score_coupling=1.0)), FlashDMD.trains[update]
    loss = t.loss

    def poisoned(asked: Update, samples: Rollout | None, batch: Batch) -> Loss:
        terms, watch = loss(asked, samples, batch)
        spoilt = {k: v * value for k, v in terms.items()} if asked == update else terms
        return Loss(spoilt, watch)

    t.iterate()
    t.iterate()
    before, counts, moments = weights(t), dict(t.state.updates), state_of(t)
    t.loss = poisoned  # type: ignore[method-assign]
    n = t.state.iteration
    record = t.iterate()
    learned = "generator" if update == "preference" else name
    assert learned not in changed(before, weights(t))
    assert t.state.updates[name] == counts[name]
    assert all(map(torch.equal, state_of(t)[name], moments[name]))
    assert record[f"{update}/skipped"] == 1
    lost(counts[name] + 1 - t.state.updates[name], "updates")
    assert all(map(math.isfinite, record.values()))
    assert t.bad is not None
    assert (t.bad.facts["iteration"], t.bad.facts["stage"]) == (n, stage)
    assert list(t.bad.facts["not_finite"]) == [update]
    assert torch.equal(t.bad.batch.noise, batches(n, ()).noise)
    assert t.state.bad_in_a_row == 1
    for _ in range(2 * (len(t.order) if update == "generator" else 1)):
        t.iterate()
    assert t.state.skipped == {update: 3}  # the others are finite in between, and do not count
    assert t.state.bad_in_a_row == 3
    t.loss = loss  # type: ignore[method-assign]
    for _ in t.order:
        t.iterate()
    assert (t.state.bad_in_a_row, t.bad) == (0, None)
    assert changed(before, weights(t))


def state_of(t: Trainer) -> dict[str, list[Tensor]]:
    return {
        name: [v.clone() for state in one.state.values() for v in state.values()]
        for name, one in t.optimizers().items()
    }


def test_a_checkpoint_of_other_networks_is_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path / "checkpoint-1")
    other = trainer()
    other.learners["discriminator"] = learner(nn.Sequential(nn.Linear(D, 3)))
    with pytest.raises(UserError, match="discriminator is of another network"):
        other.restore(tmp_path / "checkpoint-1")


def test_milliseconds_add_up(tmp_path: Path) -> None:
    t = trainer("distill")
    for name in ("generator", "score", "discriminator"):
        t.stopwatch.attach(t.learners[name].network, name)
    for _ in range(6):
        t.iterate()
    parts = t.stopwatch.milliseconds()
    assert set(parts) == {"generator", "score", "discriminator", "optimizers", "everything else"}
    assert all(v > 0 for v in parts.values())
    assert sum(parts.values()) == pytest.approx(1000 * t.stopwatch.total / 6)


def test_the_score_estimator_is_coupled_to_the_generator_that_the_step_left() -> None:
    """Without a rate of its own psi moves by the coupling alone: once after each step of theta."""
    t = trainer("joint", Method(beta=5.0, score_coupling=0.5))
    t.learners["score"] = replace(t.learners["score"], learning_rate=0.0)
    for updates in t.order:
        psi = weights(t)["score"]
        t.iterate()
        after = weights(t)
        if not {"generator", "preference"}.isdisjoint(updates):
            pairs = zip(psi, after["generator"], strict=True)
            psi = [torch.lerp(ours, theirs, 0.5) for ours, theirs in pairs]
        assert all(map(torch.equal, after["score"], psi)), updates


@pytest.mark.parametrize("make", [trainer, dmd2_trainer])
def test_the_adversarial_gradient_is_the_generators_alone(make: Callable[[], Trainer]) -> None:
    t = make()
    t.order = (("generator",),)
    assert t.iterate()["generator/grad_norm_adversarial"] > 0
    for name, one in t.learners.items():
        assert all(p.grad is None for p in one.network.parameters()), name


@pytest.mark.parametrize(("limit", "share"), [(1.0, 0.2), (10.0, 1.0)])
def test_a_long_gradient_is_shortened_and_told_as_it_was(limit: float, share: float) -> None:
    p = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    for one, slope in zip(p, (3.0, 4.0), strict=True):
        one.grad = torch.tensor([slope])
    one = Learner(p, torch.optim.SGD(p.parameters(), 1.0), 1.0, 0, limit)
    assert one.clip() == pytest.approx(5.0)
    one.step(0)
    assert [moved.item() for moved in p] == pytest.approx([-3 * share, -4 * share])


def test_warm_up_goes_on_in_the_next_stage() -> None:
    first = trainer("distill")
    learners = {name: replace(one, warmup=10) for name, one in first.learners.items()}
    first.learners = learners
    for _ in range(4):
        first.iterate()
    method, state = first.algorithm.method, first.state.for_next_stage()
    joint = cycle(method, "joint")
    second = Trainer(first.algorithm, joint, batches, learners, stage="joint", state=state)
    for _ in joint:
        second.iterate()
    shares = {name: one.optimizer.param_groups[0]["lr"] / 1e-2 for name, one in learners.items()}
    assert shares == pytest.approx(
        {"generator": 0.3, "score": 0.6, "discriminator": 0.6, "preference": 0.5}
    )


@pytest.mark.parametrize(("before", "averaged"), [(0, 0), (9, 0), (2, 7)])
def test_the_student_averages_the_generator_over_its_updates_and_teaches_nobody(
    before: int,
    averaged: int,
) -> None:
    """By hand: the weight of the newest is 9/10, 9/11, 9/12, ... and never under 1 - ema_decay.

    Updates of the stages `before` count, and those `averaged` in the student it started from.
    """
    t, without = averaging(), trainer()
    t.state = t.state.for_next_stage()
    t.state.before, t.state.averaged = {"generator": before, "score": 99}, averaged
    expected, n = weights(t)["student"], before + averaged
    for updates in t.order * 3:
        t.iterate()
        without.iterate()
        if not {"generator", "preference"}.isdisjoint(updates):
            n += 1
            share = max(9 / (n + 9), 0.3)
            newest = weights(t)["generator"]
            expected = [a + share * (b - a) for a, b in zip(expected, newest, strict=True)]
        for ours, theirs in zip(weights(t)["student"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # with 9 before it reaches 21, from where on 1 - 0.7 holds
    assert n == t.state.in_average == 18 + before + averaged
    ours, theirs = weights(t), weights(without)
    assert not changed({k: ours[k] for k in theirs}, theirs)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_update_of_the_whole(parts: int) -> None:
    ends, logs = [], []
    for k in (1, parts):
        t = trainer(parts=k)
        logs.append([t.iterate() for _ in t.order])  # norms and losses: Adam hides the scale
        assert {"generator", "score", "discriminator", "preference"} <= t.state.updates.keys()
        ends.append(weights(t))
    for whole, split in zip(*logs, strict=True):
        for log in (whole, split):
            log.pop("latent/std", None)  # of a batch, not a mean over it
            del log["seconds"]
        assert split == pytest.approx(whole, rel=1e-4)
    for name, whole in ends[0].items():
        for p, q in zip(whole, ends[1][name], strict=True):
            torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-5)
    assert changed(weights(trainer()), ends[0]) >= {"generator", "score", "discriminator"}
