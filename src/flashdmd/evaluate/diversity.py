"""Diversity: how far apart the pictures of one prompt are, as LPIPS measures distance.

The maps of the judge's backbone, unit length in every position; squared differences averaged over
positions and summed over maps. Without LPIPS' learned weights, so the number is not LPIPS.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_maps(maps: list[Tensor]) -> list[Tensor]:
    """Each position's features at length 1, divided so that squared distances average positions."""
    return [(F.normalize(m, dim=1) / (m.shape[2] * m.shape[3]) ** 0.5).flatten(1) for m in maps]


def pairwise(maps: list[Tensor]) -> float:
    """Mean distance of two different pictures of a set."""
    n = len(maps[0])
    total = torch.zeros(n, n)
    for m in unit_maps(maps):
        squares = m.square().sum(1)
        total += (squares[:, None] + squares[None] - 2 * m @ m.T).clamp_min(0)
    return float(total.sum() / (n * (n - 1)))
