"""KID: the squared maximum mean discrepancy of two sets of features under a cubic kernel.

Unbiased (arXiv 1801.01401), so it can be compared at any number of samples, unlike FID.
"""

import torch
from jaxtyping import Float
from torch import Tensor

DEGREE = 3
BOOTSTRAPS = 200


def kernel(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> Float[Tensor, "N M"]:
    """(a.b / D + 1)^3."""
    return (a.double() @ b.double().T / a.shape[1] + 1) ** DEGREE


def mmd2(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """The unbiased estimate from three kernel matrices: no example is compared with itself."""
    n, m = len(xx), len(yy)
    within_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return within_x + within_y - 2 * xy.mean()


def kid(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> float:
    """The estimate between two sets of features; near 0, and at times below, for equal laws."""
    return float(mmd2(kernel(x, x), kernel(y, y), kernel(x, y)))


def interval(
    x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], seed: int = 0
) -> tuple[float, float]:
    """A 95 % interval for `kid(x, y)` by subsampling the generated set `x`; `y` stays, as it is the
    same for every arm.

    Halves of `x` are drawn without replacement: duplicates, which a bootstrap would make, are
    compared with themselves and bias an unbiased statistic upward. Around the whole set's value a
    half scatters as the whole set does around the truth: (1 - 1/2) / (N/2) = 1/N. That holds where
    the two laws differ. Where they are equal the terms of order 1/N vanish, what is left falls as
    1/N^2, and the interval is up to sqrt(3) too wide: it errs on the side of no difference.
    """
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    whole = mmd2(xx, yy, xy)
    draw = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(BOOTSTRAPS):
        rows = torch.randperm(len(x), generator=draw)[: len(x) // 2]
        estimates.append(mmd2(xx[rows][:, rows], yy, xy[rows]))
    spread = torch.stack(estimates).std()
    return float(whole - 1.96 * spread), float(whole + 1.96 * spread)
