"""What a piece of work holds at its peak, against sums that can be made by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashdmd.memory import Live, held, peak_memory

KB = 1024


def make(kilobytes: int) -> torch.Tensor:
    return torch.zeros(kilobytes, KB // 4)


def test_a_peak_is_what_lives_at_one_time_and_not_all_that_was_made() -> None:
    def work() -> None:
        for _ in range(5):
            a = make(8)
            b = a + 1  # 16 KB
            del a
            c = b * 2  # 16 KB again
            del b, c

    assert peak_memory(work) == 16 * KB


def test_views_and_what_is_written_in_place_hold_nothing_of_their_own() -> None:
    def work() -> None:
        a = make(4)
        views = a.t(), a[:2], a.reshape(-1)
        a.add_(views[0].t())

    assert peak_memory(work) == 4 * KB


def test_tensors_from_outside_count_only_when_they_are_named() -> None:
    outside = make(16)

    def work() -> None:
        outside.mul_(2)
        assert (outside + 1).sum() == outside.numel()

    assert peak_memory(work, [outside]) == 16 * KB + peak_memory(work)
    assert 16 * KB <= peak_memory(work) < 17 * KB


def test_gradients_and_what_a_graph_keeps_are_counted() -> None:
    layer = nn.Linear(256, 256, bias=False)  # 256 KB
    x = torch.randn(64, 256, requires_grad=True)  # 64 KB

    with Live() as live:
        y = layer(x).sigmoid().sum()
        assert (
            live.now == 64 * KB + 4
        )  # y, and the sigmoid's output, which nothing but its graph has
        y.backward()
        assert live.now == (64 + 256) * KB + 4  # y, and the gradients of x and of the weight
        del y
        layer.weight.grad = x.grad = None
        assert live.now == 0


def test_fake_tensors_are_counted_as_real_ones() -> None:
    def work(n: int) -> int:
        layer = nn.Linear(n, n)
        with Live() as live:
            layer(torch.randn(8, n)).relu().sum().backward()
        return live.peak

    with FakeTensorMode():
        fake, huge = work(64), work(100_000)
    assert fake == work(64)
    assert huge > 4e10


def test_held_is_parameters_buffers_and_moments_each_once() -> None:
    network = nn.Sequential(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256))
    weights = 256 * KB + 2 * KB + 2 * KB + 8  # its statistics and their count are buffers
    assert held(network) == held(network, network, network[0].weight) == weights
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(4, 256)).sum().backward()
    optimizer.step()
    assert held(optimizer) == 2 * (256 + 2) * KB + 3 * 4  # two moments, and each one's step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_the_same() -> None:
    def work() -> None:
        a = torch.zeros(8 * KB, KB // 4, device="cuda")
        del a

    assert peak_memory(work) == 8 * KB * KB
