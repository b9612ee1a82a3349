"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): random changes of what a discriminator sees.

Real and fake pictures pass the same kinds of change, and the generator's gradient flows back
through them: few pictures are learned by heart, and no change leaks into what is generated. Every
number is drawn for each picture alone, on the pictures' device, from torch's generator.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from flashdmd import draws

Change = Literal["colour", "translation", "cutout"]
CHANGES: tuple[Change, ...] = get_args(Change)
SHIFT = 1 / 8  # of a side, at most
HOLE = 1 / 2  # of a side


def diff_augment(
    images: Float[Tensor, "B C H W"], policy: tuple[str, ...] = CHANGES
) -> Float[Tensor, "B C H W"]:
    """The pictures, changed by each of `policy` in turn; by none of an empty one.

    Raises ValueError for a change that there is not.
    """
    if unknown := set(policy) - set(CHANGES):
        raise ValueError(f"policy={policy}: {sorted(unknown)} are not among {CHANGES}")
    for change in policy:
        images = APPLY[change](images)
    return images


def colour(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Brightness -0.5..0.5 more, then saturation times 0..2, then contrast times 0.5..1.5."""
    images = images + uniform(images, -0.5, 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + uniform(images, 0.0, 2.0) * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + uniform(images, 0.5, 1.5) * (images - mean)


def translation(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Moved by whole pixels, up to an eighth of each side; what comes in from outside is zero."""
    for dim in (2, 3):
        size = images.shape[dim]
        reach = round(SHIFT * size)
        by = draws.integers(-reach, reach + 1, images)[:, None]
        source = torch.arange(size, device=images.device) - by  # (B, size)
        shape = [len(images), 1, 1, 1]
        shape[dim] = size
        index = source.clamp(0, size - 1).reshape(shape).expand_as(images)
        inside = ((source >= 0) & (source < size)).reshape(shape)
        images = images.gather(dim, index) * inside
    return images


def cutout(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Zero in a rectangle of half of each side, centred anywhere: at an edge a part is outside."""
    hole = torch.ones_like(images[:, :1], dtype=torch.bool)
    for dim in (2, 3):
        size = images.shape[dim]
        extent = round(HOLE * size)
        centre = draws.integers(0, size, images)[:, None, None, None]
        start = centre - extent // 2
        shape = [1, 1, 1, 1]
        shape[dim] = size
        place = torch.arange(size, device=images.device).reshape(shape)
        hole = hole & (place >= start) & (place < start + extent)
    return images * ~hole


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """(B, 1, 1, 1): a number for each picture."""
    return low + (high - low) * draws.uniform(images)[:, None, None, None]


APPLY = {"colour": colour, "translation": translation, "cutout": cutout}
