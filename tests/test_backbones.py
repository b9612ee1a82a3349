"""The EfficientNet-Lite backbones: right weights in the right places, frozen, differentiable."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from flashdmd.emoji.world import World
from flashdmd.models import backbones
from flashdmd.models.backbones import EfficientNetLite, Same

CLASSES = {"ambulance": 407, "fire engine": 555, "strawberry": 949, "banana": 954, "lemon": 951}


@pytest.mark.parametrize("variant", [0, 2])
def test_imagenets_classes_are_recognised_in_emoji(variant: int) -> None:
    """Lite0 names 7 of these 15 drawings, Lite2 9; luck would name one in 200."""
    network, world = EfficientNetLite(variant), World()
    hits = 0
    for i, e in enumerate(world.emoji):
        if e.name in CLASSES:
            canvas = Image.new("RGBA", (64, 64), "white")
            canvas.alpha_composite(world.pictures[i])
            big = canvas.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            image = torch.from_numpy(np.array(big)).permute(2, 0, 1)[None].float() / 127.5 - 1
            hits += CLASSES[e.name] in network.logits(image)[0].topk(5).indices
    assert hits >= 6


def test_same_padding_puts_the_odd_pixel_at_the_end() -> None:
    conv = Same(1, 1, 3, 2, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # windows start at 0 and 2; the last column and row see one line of zeros
    expected = F.pad(x, (0, 1, 0, 1)).unfold(2, 3, 2).unfold(3, 3, 2).sum((-1, -2))
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 2), (2, 5)])
def test_same_padding_is_the_sum_written_out(
    kernel: int, stride: int, size: tuple[int, int]
) -> None:
    """TensorFlow's rule, one window at a time: ceil(size / stride) of them, the start rounded."""
    conv = Same(1, 1, kernel, stride)
    x = torch.randn(1, 1, *size)
    counts = [-(-n // stride) for n in size]
    before = [max((c - 1) * stride + kernel - n, 0) // 2 for c, n in zip(counts, size, strict=True)]
    expected = torch.zeros(1, 1, *counts)
    for i in range(counts[0]):
        for j in range(counts[1]):
            for u in range(kernel):
                for v in range(kernel):
                    y, z = i * stride - before[0] + u, j * stride - before[1] + v
                    if 0 <= y < size[0] and 0 <= z < size[1]:
                        expected[0, 0, i, j] += x[0, 0, y, z] * conv.weight[0, 0, u, v]
    torch.testing.assert_close(conv(x), expected + conv.bias)


@pytest.mark.parametrize("variant", [0, 2])
def test_folding_the_batch_norms_changes_nothing(
    variant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly in float64; in float32 the maps, some of size 20, move by up to 5e-5."""
    folded = EfficientNetLite(variant)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    single = [*folded(images), folded.pooled(images)]
    with monkeypatch.context() as patch:
        patch.setattr(EfficientNetLite, "_fold", lambda self: None)
        network = EfficientNetLite(variant).double()
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    before = [*network(images.double()), network.pooled(images.double())]
    network._fold()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    after = [*network(images.double()), network.pooled(images.double())]
    for a, b, c in zip(before, after, single, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
        torch.testing.assert_close(a.float(), c, atol=1e-4, rtol=0)


def test_the_picture_gets_a_gradient_and_the_weights_none() -> None:
    network = EfficientNetLite(0).train()
    assert not network.training
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    sum(m.square().mean() for m in network(images)).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_the_maps_have_the_promised_strides_and_channels() -> None:
    network = EfficientNetLite(2)
    maps = network(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4, 2]
    assert tuple(m.shape[1] for m in maps) == network.channels


def test_pixels_are_normalised_as_the_weights_expect() -> None:
    network = EfficientNetLite(0)
    seen: list[torch.Tensor] = []
    network._conv_stem.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    black, white = -torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    network(torch.cat([black, white]))
    assert seen[0][0].mean() == pytest.approx(-127 / 128)
    assert seen[0][1].mean() == pytest.approx((255 - 127) / 128)


def test_channels_are_rounded_to_eights() -> None:
    assert [backbones.rounded(c) for c in (17.6, 26.4, 44.0, 88.0, 123.2, 211.2, 352.0)] == [
        16, 24, 48, 88, 120, 208, 352,
    ]  # fmt: skip
