"""The discriminator: what is frozen, what learns, and that no head is dead at any size."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from flashdmd import losses
from flashdmd.discriminator import Discriminator, FeatureHead, Head, group_norm

SIZE = 32


class Pyramid(nn.Module):
    """Feature maps of strides 2, 4 and 8, with a normalisation that differs between its modes."""

    def __init__(self):
        super().__init__()
        channels = (3, 8, 16, 24)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.SiLU())
            for i, o in pairwise(channels)
        )

    def forward(self, images):
        levels = [images]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return levels[1:]


def discriminator():
    return Discriminator(Pyramid(), SIZE, width=16)


def test_each_level_has_one_logit_of_its_own():
    judge, images = discriminator(), torch.randn(5, 3, SIZE, SIZE)
    before = judge(images)
    assert before.shape == (5, 3)
    for k, head in enumerate(judge.heads):
        with torch.no_grad():
            head.logit.bias += 1
        after = judge(images)
        expected = before.clone()
        expected[:, k] += 1
        torch.testing.assert_close(after, expected)
        before = after


def test_the_logits_of_an_image_do_not_depend_on_the_batch():
    judge, images = discriminator().train(), torch.randn(5, 3, SIZE, SIZE)
    singly = torch.cat([judge(image[None]) for image in images])
    torch.testing.assert_close(judge(images), singly, atol=1e-5, rtol=1e-4)


def test_gradients_pass_through_the_backbone_and_stop_at_its_weights():
    judge = discriminator().train()
    images = torch.randn(2, 3, SIZE, SIZE, requires_grad=True)
    losses.hinge_generator(judge(images)).backward()
    assert images.grad.abs().sum((1, 2, 3)).min() > 0
    assert all(p.grad is None for p in judge.backbone.parameters())
    assert all(p.grad is not None for p in judge.heads.parameters())
    for head in judge.heads:
        assert any(p.grad.any() for p in head.body.parameters())


def test_no_graph_of_the_backbone_is_kept_for_images_that_need_no_gradient():
    judge = discriminator()
    assert not any(level.requires_grad for level in judge.backbone(torch.randn(2, 3, SIZE, SIZE)))


@pytest.mark.parametrize("mode", [True, False])
def test_training_mode_is_the_heads_alone(mode):
    judge = discriminator().train(mode)
    assert all(m.training == mode for m in judge.heads.modules())
    assert not any(m.training for m in judge.backbone.modules())
    buffers = [b.clone() for b in judge.backbone.buffers()]
    judge(3 + torch.randn(8, 3, SIZE, SIZE))
    assert all(torch.equal(a, b) for a, b in zip(buffers, judge.backbone.buffers(), strict=True))


def test_switching_gradients_on_and_off_leaves_the_backbone_frozen():
    judge = discriminator()
    for on in (True, False, True):
        assert judge.requires_grad_(on) is judge
        assert all(p.requires_grad == on for p in judge.heads.parameters())
        assert not any(p.requires_grad for p in judge.backbone.parameters())


def test_it_learns_to_tell_stripes_from_noise():
    judge = discriminator().train()
    optimizer = torch.optim.Adam((p for p in judge.parameters() if p.requires_grad), 3e-3)
    rows = torch.sin(torch.arange(SIZE) * torch.pi / 2)[:, None]
    for _ in range(25):
        real, fake = rows + 0.3 * torch.randn(8, 3, SIZE, SIZE), torch.randn(8, 3, SIZE, SIZE)
        optimizer.zero_grad()
        losses.hinge_discriminator(judge(real), judge(fake)).backward()
        optimizer.step()
    assert judge(rows + 0.3 * torch.randn(8, 3, SIZE, SIZE)).min() > 0
    assert judge(torch.randn(8, 3, SIZE, SIZE)).max() < 0


@pytest.mark.parametrize(("size", "strided"), [(64, 3), (32, 3), (16, 2), (7, 1), (4, 0), (1, 0)])
def test_large_maps_get_the_papers_head_and_small_ones_a_shorter_one(size, strided):
    head = Head(24, size, width=64)
    convolutions = [(m.kernel_size, m.stride) for m in head.body if isinstance(m, nn.Conv2d)]
    assert convolutions == [((4, 4), (2, 2))] * strided + [((3, 3), (1, 1))]
    logits = head(torch.randn(6, 24, size, size))
    assert logits.shape == (6, 1)
    assert logits.std() > 1e-3


def test_on_sams_maps_the_head_is_the_papers():
    """ADM's appendix B: 256 channels throughout, 32 groups, 64 -> 32 -> 16 -> 8 -> average."""
    head = Head(768, 64, width=256)
    norms = [m for m in head.body if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in norms] == [(32, 256)] * 4
    assert [type(m) for m in head.body] == [nn.Conv2d, nn.GroupNorm, nn.SiLU] * 4
    assert (head.logit.in_features, head.logit.out_features) == (256, 1)
    assert head.body(torch.randn(1, 768, 64, 64)).shape == (1, 256, 8, 8)


def test_the_shorter_side_settles_the_heads():
    wide, tall = Discriminator(Pyramid(), (32, 64), 16), Discriminator(Pyramid(), (64, 32), 16)
    square = Discriminator(Pyramid(), 32, 16)
    for judge in (wide, tall):
        assert [len(h.body) for h in judge.heads] == [len(h.body) for h in square.heads]
    assert len(Discriminator(Pyramid(), 64, 16).heads[0].body) > len(square.heads[0].body)


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (64, 16), (48, 40), (16, 16), (17, 33)])
def test_images_of_other_sizes_are_judged_by_the_same_heads(size):
    judge = Discriminator(Pyramid(), SIZE, width=16)
    images = torch.randn(4, 3, *size, requires_grad=True)
    logits = judge(images)
    assert logits.shape == (4, 3)
    assert logits.std(0).min() > 1e-3
    logits.sum().backward()
    assert images.grad.abs().sum((1, 2, 3)).min() > 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 32])
@pytest.mark.parametrize("channels", [32, 160])
def test_dmd2s_head_ends_in_one_pixel_that_still_says_something(size, channels):
    head = FeatureHead(channels, size)
    features = torch.randn(6, channels, size, size)
    body = head.body(features)
    assert body.shape == (6, 1, 1, 1)
    assert torch.equal(head(features), body[:, :, 0, 0])
    assert body.std() > 1e-3  # one group a channel would make each of these the same


def test_dmd2s_head_at_sdxls_size_is_dmd2s():
    convolutions = [m for m in FeatureHead(64, 32).body if isinstance(m, nn.Conv2d)]
    shapes = [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in convolutions]
    assert shapes == [(4, 2, 1)] * 3 + [(4, 4, 0), (1, 1, 0)]
    assert convolutions[-1].out_channels == 1


@pytest.mark.parametrize(
    ("channels", "groups"), [(1280, 32), (256, 32), (160, 32), (128, 32), (64, 16), (36, 9), (6, 1)]
)
def test_groups_of_a_normalisation_have_four_channels_or_more(channels, groups):
    assert group_norm(channels).num_groups == groups
