"""Shapes of one area, and batches that are of one shape each."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdmd.data import Drawn, PictureSource, open_data
from flashdmd.data.buckets import buckets_of, nearest, time_ids
from flashdmd.errors import UserError

SHAPES = {
    "wide": (96, 48),
    "square": (64, 64),
    "tall": (48, 96),
    "small": (16, 16),
}  # width, height


def folder(path: Path, **counts: int) -> Path:
    """Pictures whose red is how far right and green how far down, for crops to be seen."""
    path.mkdir(parents=True)
    for name, n in counts.items():
        width, height = SHAPES[name]
        right = np.linspace(0, 255, width).round().astype(np.uint8)
        down = np.linspace(0, 255, height).round().astype(np.uint8)
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[..., 0], image[..., 1] = right, down[:, None]
        for i in range(n):
            Image.fromarray(image).save(path / f"{name}{i}.png")
            (path / f"{name}{i}.txt").write_text(name)
    return path


def test_buckets_of_sdxl_are_sdxl_s() -> None:
    found = set(buckets_of(1024, 64))
    podell = {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1600)}
    assert podell | {(w, h) for h, w in podell} <= found
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert 0.9 < height * width / 1024**2 <= 1
        assert 1 / 2.5 <= width / height <= 2.5
        assert (width, height) in found


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (64, 8), (768, 16), (64, 64)])
def test_the_square_is_a_bucket(resolution: int, multiple: int) -> None:
    found = buckets_of(resolution, multiple)
    assert (resolution, resolution) in found
    assert max(h * w for h, w in found) == resolution**2
    with pytest.raises(ValueError, match="no multiple"):
        buckets_of(resolution, resolution - 1)


def test_the_nearest_bucket_keeps_most_of_a_picture() -> None:
    buckets = buckets_of(1024, 64)
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 3000, (500, 2))

    def kept(size: np.ndarray, bucket: tuple[int, int]) -> float:
        ratio = (size[0] / size[1]) / (bucket[1] / bucket[0])
        return min(ratio, 1 / ratio)

    for size, chosen in zip(sizes, nearest(sizes, buckets), strict=True):
        best = max(kept(size, bucket) for bucket in buckets)
        assert math.isclose(kept(size, buckets[chosen]), best, rel_tol=1e-5)


def draws(source: PictureSource, n: int, batch: int = 2, **more: bool) -> list[Drawn]:
    return [source.draw(np.random.default_rng(seed), batch, **more) for seed in range(n)]


def test_a_batch_is_of_one_shape_and_all_pictures_are_as_likely(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", wide=6, square=3, tall=1)
    source = open_data(path, 64, multiple=16)
    names = {"wide": (48, 80), "square": (64, 64), "tall": (80, 48)}
    counts = np.zeros(10, dtype=int)
    for drawn in draws(source, 400, 4, pictures=False):
        [name] = set(drawn.captions)
        assert drawn.shape == names[name]
        assert drawn.pictures is None
        np.add.at(counts, drawn.indices, 1)
    assert counts.sum() == 1600
    # A batch of 4 has 400 draws of a bucket: a share of 0.1 has a standard error of 0.1 x 0.3/20.
    shares = {name: sum(counts[i] for i in range(10) if source.catalogue.caption(i) == name)
              for name in names}  # fmt: skip
    for name, share in (("wide", 0.6), ("square", 0.3), ("tall", 0.1)):
        error = math.sqrt(share * (1 - share) / 400)
        assert abs(shares[name] / 1600 - share) < 4 * error


def test_captions_alone_are_drawn_of_the_same_bucket(tmp_path: Path) -> None:
    source = open_data(folder(tmp_path / "x", wide=2, square=2, tall=2), 64, multiple=16)
    for drawn, words in zip(draws(source, 30), draws(source, 30, pictures=False), strict=True):
        assert drawn.shape == words.shape
        assert drawn.captions == words.captions
        assert np.array_equal(drawn.time_ids, words.time_ids)
        assert drawn.pictures.shape == (2, 3, *drawn.shape)
    pictures, captions = source(np.random.default_rng(3), 2)
    assert np.array_equal(pictures, draws(source, 4)[3].pictures)
    assert captions == draws(source, 4)[3].captions


def test_time_ids_say_what_was_cut_off(tmp_path: Path) -> None:
    source = open_data(folder(tmp_path / "x", wide=1, square=1, small=1), 32)
    [shape] = source.buckets
    assert shape == (32, 32)
    seen = {}
    for drawn in draws(source, 20):
        for image, ids, caption in zip(drawn.pictures, drawn.time_ids, drawn.captions, strict=True):
            seen[caption] = ids.tolist()
            if caption != "wide":
                continue
            height, width, top, left, *target = ids
            assert target == [32, 32]
            scaled = width * 32 / height  # 64 pixels: 16 of them cut off on the left
            assert image[0, :, 0].mean() == pytest.approx(255 * (left + 0.5) / scaled, abs=3)
            assert top == 0
    assert seen == {
        "wide": [48, 96, 0, 16, 32, 32],
        "square": [64, 64, 0, 0, 32, 32],
        "small": [16, 16, 0, 0, 32, 32],
    }


def test_time_ids_are_of_the_scaled_picture() -> None:
    sizes = np.array([[2000, 1500], [1500, 2000], [1152, 896]])  # width, height
    ids = time_ids(sizes, (896, 1152))
    assert ids.tolist() == [
        [1500, 2000, 0, 21, 896, 1152],  # 2000 x 1500 -> 1195 x 896
        [2000, 1500, 320, 0, 896, 1152],  # 1500 x 2000 -> 1152 x 1536
        [896, 1152, 0, 0, 896, 1152],
    ]


def test_small_pictures_are_scaled_up_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_data(folder(tmp_path / "x", square=2, small=3), 32)
    assert source.report.upscaled == 3
    assert "5 of 5 pictures are used; 3 smaller than they are wanted" in caplog.text
    caplog.clear()
    assert open_data(tmp_path / "x", 16).report.upscaled == 0
    assert not caplog.records


def test_what_fails_while_training_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(tmp_path / "x", square=480, tall=40)
    source = open_data(path, 32, multiple=8)
    whole = draws(source, 100, 16)
    for i in range(9):
        (path / f"square{i}.png").unlink()
    gone = [i for i in range(520) if not (path / source.catalogue.name(i)).exists()]
    caplog.clear()
    first, again = draws(source, 100, 16), draws(source, 100, 16)
    assert any(set(gone) & set(drawn.indices.tolist()) for drawn in whole)
    for before, now, then in zip(whole, first, again, strict=True):
        kept = ~np.isin(before.indices, gone)
        assert np.array_equal(before.indices[kept], now.indices[kept])
        assert np.array_equal(before.pictures[kept], now.pictures[kept])
        assert not set(gone) & set(now.indices.tolist())
        assert now.shape == before.shape
        assert len(set(now.captions)) == 1  # of the same bucket
        assert now.captions == [source.catalogue.caption(i) for i in now.indices.tolist()]
        assert np.array_equal(now.pictures, then.pictures)
    for i in source.failed:
        assert caplog.text.count(f"{source.catalogue.name(i)} of ") == 1
    assert set(source.failed) <= set(gone)
    loud = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(source.failed) == 9
    assert [text.partition(" ")[0] for text in loud] == ["6", "8"]  # beyond 5.2, and doubled


def test_the_only_picture_of_a_bucket_may_vanish(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", square=5, tall=1)
    source = open_data(path, 32, multiple=8)
    (path / "tall0.png").unlink()
    [drawn] = {d.shape: d for d in draws(source, 60) if d.shape != (32, 32)}.values()
    assert drawn.captions == ["square", "square"]
    assert drawn.pictures.shape == (2, 3, *drawn.shape)


def test_a_disk_that_is_gone_is_said(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", square=5)
    source = open_data(path, 32)
    path.rename(tmp_path / "y")
    path.mkdir()
    (path / "lost+found").mkdir()  # of another disk
    with pytest.raises(UserError, match=r"none can be read .*FileNotFoundError.*is the disk there"):
        source(np.random.default_rng(0), 2)
    assert source(np.random.default_rng(0), 2, pictures=False)[1] == ["square", "square"]
    path.rename(tmp_path / "z")
    (tmp_path / "y").rename(path)
    assert source(np.random.default_rng(0), 2)[0].shape == (2, 3, 32, 32)


def test_what_is_left_out_is_never_drawn(tmp_path: Path) -> None:
    source = open_data(folder(tmp_path / "x", square=5, tall=1), 32, multiple=8)
    tall = next(i for i in range(6) if source.catalogue.caption(i) == "tall")
    less = replace(source, without=frozenset({tall, 0}))
    assert {i for d in draws(less, 60) for i in d.indices} == set(range(6)) - {tall, 0}
