"""Optimizers with moments in float32 and in 8 bits: the same steps, a quarter of the memory."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flashdmd.errors import UserError
from flashdmd.memory import held
from flashdmd.optimizers import make_optimizer, moment_bytes, moments, restore_moments

INPUTS = 96  # a layer of 96 x 96 has more than 4096 numbers, its bias has fewer


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.SiLU(), nn.Linear(INPUTS, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for n in steps:
        rng = torch.Generator().manual_seed(n)
        x = torch.randn(16, INPUTS, generator=rng)
        (net(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=[False, True], ids=["float32", "8-bit"])
def eight_bit(request: pytest.FixtureRequest) -> bool:
    if request.param:
        pytest.importorskip("bitsandbytes")
    return bool(request.param)


def test_a_run_goes_on_bitwise_from_its_saved_moments(tmp_path: Path, eight_bit: bool) -> None:
    net = network()
    optimizer = make_optimizer(net.parameters(), 1e-2, eight_bit=eight_bit)
    train(net, optimizer, range(3))
    save_file(moments(optimizer), tmp_path / "moments.safetensors")

    other = copy.deepcopy(net)
    resumed = make_optimizer(other.parameters(), 1e-2, eight_bit=eight_bit)
    restore_moments(resumed, load_file(tmp_path / "moments.safetensors"))
    for one, two in ((net, optimizer), (other, resumed)):
        train(one, two, range(3, 6))

    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    mine, theirs = moments(optimizer), moments(resumed)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)

    fresh = copy.deepcopy(net)  # what forgets its moments comes to another place
    train(fresh, make_optimizer(fresh.parameters(), 1e-2, eight_bit=eight_bit), range(6, 7))
    train(net, optimizer, range(6, 7))
    assert not torch.equal(net[0].weight, fresh[0].weight)


def test_moments_take_the_memory_that_is_foretold(eight_bit: bool) -> None:
    net = network()
    optimizer = make_optimizer(net.parameters(), 1e-2, eight_bit=eight_bit)
    train(net, optimizer, range(1))
    foretold = sum(moment_bytes(p.numel(), eight_bit) for p in net.parameters())
    tables = 2 * 256 * 4 if eight_bit else 0  # what 8 bits stand for, once for all parameters
    assert held(optimizer) == foretold + tables


def test_eight_bits_take_a_quarter_and_steps_hardly_differ() -> None:
    pytest.importorskip("bitsandbytes")
    exact, rough = network(), network()
    rough.load_state_dict(exact.state_dict())
    start = copy.deepcopy(exact)
    for net, eight in ((exact, False), (rough, True)):
        train(net, make_optimizer(net.parameters(), 1e-3, eight_bit=eight), range(20))
    way = (exact[0].weight - start[0].weight).norm()
    assert (rough[0].weight - exact[0].weight).norm() < 0.1 * way  # a step of 8 bits errs by 1/256
    assert not torch.equal(rough[0].weight, exact[0].weight)
    assert moment_bytes(10**6, True) < 0.26 * moment_bytes(10**6, False)


def test_moments_of_the_other_kind_are_refused_by_name() -> None:
    pytest.importorskip("bitsandbytes")
    net = network()
    for eight in (False, True):
        saved = make_optimizer(net.parameters(), 1e-2, eight_bit=eight)
        train(net, saved, range(1))
        other = make_optimizer(net.parameters(), 1e-2, eight_bit=not eight)
        with pytest.raises(UserError, match=f"train.use_8bit_adam={str(eight).lower()}"):
            restore_moments(other, moments(saved))


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"flashdmd\[quant\]"):
        make_optimizer(network().parameters(), 1e-2, eight_bit=True)
