"""DiffAugment: each change against what it is said to be, drawn for each picture alone."""

import pytest
import torch

from flashdmd.augment import CHANGES, colour, cutout, diff_augment, translation

H, W = 32, 48


def pictures(n: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, H, W) * 2 - 1


def distinct(rows: torch.Tensor) -> int:
    return len({tuple(row) for row in rows.flatten(1).tolist()})


def test_an_empty_policy_changes_and_draws_nothing() -> None:
    images, state = pictures(2), torch.get_rng_state()
    assert diff_augment(images, ()) is images
    assert torch.equal(torch.get_rng_state(), state)


def test_a_change_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'blur'.*colour.*translation.*cutout"):
        diff_augment(pictures(1), ("cutout", "blur"))


def test_a_policy_is_its_changes_in_turn() -> None:
    images = pictures(4)
    torch.manual_seed(5)
    expected = translation(colour(images))
    torch.manual_seed(5)
    assert torch.equal(diff_augment(images, ("colour", "translation")), expected)


def test_pictures_are_moved_by_whole_pixels_and_zero_comes_in() -> None:
    rows, columns = torch.arange(1.0, H + 1), torch.arange(1.0, W + 1)
    image = (rows[:, None] * 100 + columns).expand(400, 3, H, W)
    moved = translation(image)
    shifts = []
    for picture in moved:
        inside = picture[0] > 0
        y, x = (int(v) for v in inside.nonzero()[0])
        down = y - int(picture[0, y, x] / 100) + 1
        right = x - round(float(picture[0, y, x]) % 100) + 1
        expected = torch.zeros(H, W)
        target = slice(max(down, 0), H + min(down, 0)), slice(max(right, 0), W + min(right, 0))
        source = slice(max(-down, 0), H - max(down, 0)), slice(max(-right, 0), W - max(right, 0))
        expected[target] = image[0, 0][source]
        assert all(torch.equal(channel, expected) for channel in picture)
        shifts.append((down, right))
    down, right = torch.tensor(shifts).T
    assert set(down.tolist()) == set(range(-H // 8, H // 8 + 1))
    assert set(right.tolist()) == set(range(-W // 8, W // 8 + 1))


def test_a_rectangle_of_half_of_each_side_is_cut_out() -> None:
    kept = cutout(torch.ones(400, 3, H, W))
    assert torch.equal(kept[:, :1].expand_as(kept), kept)
    holes = 1 - kept[:, 0]
    tall, wide = holes.amax(2).sum(1), holes.amax(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), tall * wide)  # a rectangle, whole
    assert (tall.max(), wide.max()) == (H // 2, W // 2)
    assert (tall.min(), wide.min()) == (H // 4, W // 4)  # centred on an edge
    whole = (tall == H // 2) & (wide == W // 2)
    assert 0.15 < whole.float().mean() < 0.4  # (17/32) (25/48) = 0.28 of the centres
    assert distinct(holes) > 200


def test_what_is_kept_of_a_picture_is_kept_unchanged() -> None:
    images = pictures()
    kept = cutout(images)
    assert torch.equal(kept[kept != 0], images[kept != 0])


def test_colours_are_moved_as_published() -> None:
    """brightness: the mean; saturation: what differs from grey; contrast: what from the mean."""
    images = pictures(500)
    changed = colour(images)
    mean = images.mean((1, 2, 3), keepdim=True)
    moved = changed.mean((1, 2, 3), keepdim=True)
    brightness = (moved - mean).flatten()
    assert -0.5 < brightness.min() < -0.47
    assert 0.47 < brightness.max() < 0.5
    grey, new_grey = (x.mean(1, keepdim=True) for x in (images, changed))
    contrast = (new_grey - moved).square().mean((1, 2, 3)).sqrt()
    contrast /= (grey - mean).square().mean((1, 2, 3)).sqrt()
    assert 0.5 < contrast.min() < 0.53
    assert 1.47 < contrast.max() < 1.5
    hue = (changed - new_grey).square().mean((1, 2, 3)).sqrt()
    saturation = hue / (images - grey).square().mean((1, 2, 3)).sqrt() / contrast
    assert 0 < saturation.min() < 0.05
    assert 1.95 < saturation.max() < 2
    c, s = (v[:, None, None, None] for v in (contrast, saturation))
    expected = moved + c * (grey - mean) + c * s * (images - grey)
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", CHANGES)
def test_the_gradient_is_that_of_what_was_drawn(change: str) -> None:
    images = pictures(3).double()[:, :, :8, :16].requires_grad_()

    def drawn_again(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return diff_augment(x, (change,))

    assert not torch.equal(drawn_again(images), images)
    assert torch.autograd.gradcheck(drawn_again, images)


@pytest.mark.parametrize("change", CHANGES)
def test_each_picture_draws_for_itself(change: str) -> None:
    same = pictures(1).expand(16, -1, -1, -1)
    assert distinct(diff_augment(same, (change,))) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_and_precision_stay(dtype: torch.dtype) -> None:
    images = pictures(2).to(dtype)
    changed = diff_augment(images)
    assert (changed.shape, changed.dtype) == (images.shape, dtype)
