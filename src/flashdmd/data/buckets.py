"""Sizes of one area and many shapes, and which picture goes to which."""

import numpy as np
from jaxtyping import Int

WIDEST = 2.5  # longer side to shorter; beyond it the ends of a picture are cut off

Shape = tuple[int, int]  # height, width in pixels


def buckets_of(resolution: int, multiple: int) -> tuple[Shape, ...]:
    """Shapes whose sides are multiples of `multiple`, as large as fit resolution^2 pixels.

    At 1024 and 64 these are SDXL's 1024 x 1024, 896 x 1152, 832 x 1216, 768 x 1344, 640 x 1600 and
    some between (Podell et al. 2023, appendix I), each upright too.
    """
    if resolution % multiple:
        raise ValueError(f"a resolution of {resolution} is no multiple of {multiple}")
    found = set()
    for short in range(multiple, resolution + 1, multiple):
        long = resolution**2 // short // multiple * multiple
        if long <= WIDEST * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def nearest(sizes: Int[np.ndarray, "n 2"], buckets: tuple[Shape, ...]) -> Int[np.ndarray, "n"]:
    """Of each (width, height) the bucket of which most is kept: whose log ratio is nearest."""
    ratios = np.log([width / height for height, width in buckets], dtype=np.float32)
    own = np.log(sizes[:, 0] / sizes[:, 1]).astype(np.float32)
    return np.abs(own[:, None] - ratios).argmin(1)


def time_ids(sizes: Int[np.ndarray, "n 2"], bucket: Shape) -> Int[np.ndarray, "n 6"]:
    """SDXL's micro-conditions of pictures of (width, height) that are scaled and cut to a bucket.

    (original height, original width, crop top, crop left, target height, target width), the crop in
    pixels of the scaled picture.
    """
    original = sizes[:, ::-1]  # height, width
    scale = (np.array(bucket) / original).max(1, keepdims=True)
    crop = np.rint((original * scale - bucket) / 2).astype(np.int64)
    return np.concatenate([original, crop, np.broadcast_to(bucket, original.shape)], 1)
