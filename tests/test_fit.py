"""The loop that trains the embedded artefacts: both optimizers against torch's own, and resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashdmd.emoji.fit import Fit, Losses, Optimizers, fit


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
