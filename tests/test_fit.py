"""The loop that trains the embedded artefacts: both optimizers against torch's own, and resume."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashdmd.emoji.fit import Fit, Losses, Optimizers, fit, kept
from flashdmd.emoji.teacher import planned
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import Interrupted, UserError


class Small(nn.Module):
    """A kernel, a hidden matrix, an embedding and vectors: one of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_embedding = nn.Linear(1, 4)
        self.kernel = nn.Conv2d(3, 4, 3, padding=1)
        self.hidden = nn.Linear(4, 6)
        self.conv_out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        states = self.kernel(x) + self.time_embedding(torch.ones(len(x), 1))[..., None, None]
        states = self.hidden(states.permute(0, 2, 3, 1)).tanh().permute(0, 3, 1, 2)
        return self.conv_out(states)


def loss_of(network: nn.Module):
    def loss(step: int) -> Losses:
        return {"far": (network(torch.randn(8, 3, 4, 4)) - 1).square().mean()}

    return loss


def plan(folder: Path, steps: int, muon_rate: float | None) -> Fit:
    return Fit(steps, 1e-2, folder, warmup=1, cooldown=0.0, muon_rate=muon_rate, ema_decay=0.5)


@pytest.mark.parametrize("muon_rate", [None, 0.02])
def test_stopping_on_the_way_changes_nothing(muon_rate: float | None, tmp_path: Path) -> None:
    once, twice = Small(), Small()
    fit(once, loss_of(once), plan(tmp_path / "once", 12, muon_rate))
    for steps in (5, 12):
        fit(twice, loss_of(twice), plan(tmp_path / "twice", steps, muon_rate))
    state = once.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in twice.state_dict().items())
    assert any(not torch.equal(v, state[k]) for k, v in Small().state_dict().items())


def test_hidden_matrices_move_as_torchs_muon_moves_them_and_the_rest_as_adamw() -> None:
    network, other = Small(), Small()
    plan_ = Fit(10, 1e-2, Path(), muon_rate=0.02, weight_decay=0.1)
    ours = Optimizers(dict(network.named_parameters()), plan_)
    assert sorted(ours.lent) == ["hidden.weight", "kernel.weight"]
    kernel = nn.Parameter(other.kernel.weight.detach().clone().flatten(1))
    muon = torch.optim.Muon(
        [kernel, other.hidden.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    rest = [p for n, p in other.named_parameters() if n not in ours.lent]
    adamw = torch.optim.AdamW(rest, lr=5e-3, weight_decay=0.1)
    for seed in range(3):
        for each in (network, other):
            torch.manual_seed(seed)
            loss_of(each)(seed)["far"].backward()
        assert other.kernel.weight.grad is not None
        kernel.grad = other.kernel.weight.grad.flatten(1)
        ours.step(0.5)
        muon.step()
        adamw.step()
        other.zero_grad()
        with torch.no_grad():
            other.kernel.weight.copy_(kernel.view_as(other.kernel.weight))
        for (name, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
            assert p.grad is None
            assert torch.allclose(p, q, atol=1e-5), name


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    plan_ = Fit(100, 1e-3, Path(), warmup=10, cooldown=0.2)
    shares = [plan_.share(step) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[80] == 1.0
    assert shares[90] == pytest.approx(0.5)
    assert shares[100] == 0.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_saved_at_once_and_the_same_call_goes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    once, twice = Small(), Small()
    fit(once, loss_of(once), plan(tmp_path / "once", 6, None))

    def stopped(step: int) -> Losses:
        if step == 3:
            os.kill(os.getpid(), number)
        return loss_of(twice)(step)

    with pytest.raises(Interrupted, match=r"after 4 steps; saved in .*twice$"):
        fit(twice, stopped, plan(tmp_path / "twice", 6, None))
    assert json.loads((tmp_path / "twice/state/state.json").read_text())["step"] == 4
    again = Small()
    fit(again, loss_of(again), plan(tmp_path / "twice", 6, None))
    assert all(torch.equal(v, once.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_stop_while_the_last_step_is_shown_is_heard(tmp_path: Path) -> None:
    def show(network: nn.Module, step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    network = Small()
    with pytest.raises(Interrupted, match="after 2 steps"):
        fit(network, loss_of(network), plan(tmp_path, 2, None), show)
    fit(network, loss_of(network), plan(tmp_path, 2, None), show)


def test_what_a_killed_save_set_aside_is_gone_on_with(tmp_path: Path) -> None:
    network = Small()
    fit(network, loss_of(network), plan(tmp_path, 2, None))
    (tmp_path / "state").rename(tmp_path / ".state.retired-1")

    def loss(step: int) -> Losses:
        assert step >= 2
        return loss_of(network)(step)

    fit(network, loss, plan(tmp_path, 3, None))


def test_steps_that_are_not_finite_are_refused_with_what_to_do(tmp_path: Path) -> None:
    network, plan_ = Small(), plan(tmp_path, 2, None)
    with pytest.raises(UserError, match=r"step 0 of the fit.*another --output"):
        fit(network, lambda _: {"far": network(torch.ones(1, 3, 4, 4)).sum() / 0}, plan_)
    assert not (tmp_path / "state").exists()


ASKED = {
    "family": "score", "start": ASSETS / "judge", "batch": 8, "rate": 1.0, "seed": 3, "tutors": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "change", "said"),
    [
        ("family", "flow", "--family is flow, .* begun with score"),
        ("start", ASSETS / "reward", "--start is .*reward, .* begun with .*judge;"),
        ("batch", 9, "--batch is 9, .* begun with 8"),
        ("rate", 0.5, r"--rate is 0.5, .* begun with 1\.0"),
        ("seed", 4, "--seed is 4, .* begun with 3"),
        ("tutors", [ASSETS / "reward"], "--tutor is .*reward, .* begun with none"),
    ],
)
def test_another_argument_in_a_used_folder_is_refused_and_more_steps_are_not(
    option: str, change: object, said: str, tmp_path: Path
) -> None:
    network = Small()
    fit(network, loss_of(network), planned(folder=tmp_path, max_train_steps=2, **ASKED))
    planned(folder=tmp_path, max_train_steps=3, **ASKED)
    with pytest.raises(UserError, match=said + ".*another --output, or delete"):
        planned(folder=tmp_path, max_train_steps=2, **(ASKED | {option: change}))
    planned(folder=tmp_path / "other", max_train_steps=2, **(ASKED | {option: change}))


def test_the_same_weights_elsewhere_are_the_same_start(tmp_path: Path) -> None:
    network = Small()
    fit(network, loss_of(network), planned(folder=tmp_path, max_train_steps=2, **ASKED))
    shutil.copytree(ASSETS / "judge", tmp_path / "moved")
    planned(folder=tmp_path, max_train_steps=2, **(ASKED | {"start": tmp_path / "moved"}))


def test_what_was_made_is_kept_until_the_key_is_another(tmp_path: Path) -> None:
    path, made = tmp_path / "sub/kept.safetensors", []

    def make() -> dict[str, Tensor]:
        made.append(torch.randn(3, 2).T)
        return {"a": made[-1]}

    for key, count in (("x", 1), ("x", 1), ("y", 2), ("y", 2), ("x", 3)):
        assert torch.equal(kept(path, key, make)["a"], made[-1])
        assert len(made) == count
    path.write_bytes(path.read_bytes()[:40])  # as a version that wrote in place could leave it
    kept(path, "x", make)
    assert len(made) == 4
