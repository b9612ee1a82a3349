"""Hugging Face data sets on disk, written by `datasets` itself."""

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdmd.data import open_data, open_pictures
from flashdmd.errors import UserError

datasets = pytest.importorskip("datasets")  # an extra
datasets.disable_progress_bars()


def picture(i: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (12, 8), (i % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def table(n: int = 3, broken: int = 0, mute: int = 0, **columns: str):
    """Pictures of red i and captions "i"."""
    image, text = columns.get("image", "image"), columns.get("text", "text")
    images = [{"bytes": picture(i) if i >= broken else b"no picture"} for i in range(n)]
    texts = [f"{i}" if i < n - mute else None for i in range(n)]
    features = datasets.Features({image: datasets.Image(), text: datasets.Value("string")})
    return datasets.Dataset.from_dict({image: images, text: texts}, features=features)


def agrees(folder: Path, n: int = 3, **more: object) -> None:
    catalogue = open_pictures(folder, **more)
    assert len(catalogue) == n
    for i in reversed(range(n)):
        assert np.asarray(catalogue.open(i))[0, 0, 0] == int(catalogue.caption(i)) == i
        assert catalogue.size(i) == (12, 8)


def test_a_saved_data_set(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path)
    agrees(tmp_path)


def test_of_splits_train_is_taken(tmp_path: Path) -> None:
    datasets.DatasetDict(test=table(5), train=table()).save_to_disk(tmp_path)
    agrees(tmp_path)
    datasets.DatasetDict(test=table(5), dev=table()).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match=r"holds the splits test, dev and none is called train"):
        open_pictures(tmp_path / "other")
    agrees(tmp_path / "other/dev")


def test_parquet_files(tmp_path: Path) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    (folder / "data").mkdir(parents=True)
    table().to_parquet(folder / "data/train-00000-of-00001.parquet")
    table(5).to_parquet(folder / "data/test-00000-of-00001.parquet")
    agrees(folder, cache=cache)
    assert list(cache.rglob("*.arrow"))
    (folder / "data/train-00000-of-00001.parquet").rename(folder / "data/a-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"holds the splits a, test"):
        open_pictures(folder, cache=cache)


def test_files_of_no_split_are_joined(tmp_path: Path) -> None:
    for name, rows in (("x", range(2)), ("y", range(2, 5))):
        table(5).select(rows).to_parquet(tmp_path / f"{name}.parquet")
    agrees(tmp_path, 5, cache=tmp_path / "cache")


def test_arrow_files(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path, num_shards=3)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).unlink()
    agrees(tmp_path)


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"the data set in .* cannot be read"):
        open_pictures(tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize(("image", "text"), [("img", "caption"), ("jpg", "prompt"), ("x", "y")])
def test_columns_are_guessed(image: str, text: str, tmp_path: Path) -> None:
    table(image=image, text=text).add_column("number", [1, 2, 3]).save_to_disk(tmp_path)
    agrees(tmp_path)


def test_columns_are_given_or_named(tmp_path: Path) -> None:
    one, other = table(image="x", text="y"), table(image="u", text="v")
    datasets.concatenate_datasets([one, other], axis=1).save_to_disk(tmp_path)
    with pytest.raises(
        UserError,
        match=r"no clear column of images; the columns are x \(Image\), y \(Value\), u \(Image\)"
        r".*data\.image_column",
    ):
        open_pictures(tmp_path)
    with pytest.raises(UserError, match=r"no clear column of captions.*data\.caption_column"):
        open_pictures(tmp_path, image_column="u")
    with pytest.raises(UserError, match=r"'w' is no column of captions; the columns are x"):
        open_pictures(tmp_path, image_column="u", caption_column="w")
    with pytest.raises(UserError, match=r"'y' is no column of images"):
        open_pictures(tmp_path, image_column="y", caption_column="y")
    agrees(tmp_path, image_column="u", caption_column="y")
    assert open_pictures(tmp_path, False, image_column="u").caption(0) == ""


def test_bytes_and_lists_of_captions(tmp_path: Path) -> None:
    images = [picture(i) for i in range(3)]
    texts = [[f"{i}", "another"] for i in range(3)]
    datasets.Dataset.from_dict({"image": images, "caption": texts}).save_to_disk(tmp_path)
    agrees(tmp_path)


def test_broken_rows_and_missing_captions_are_counted(tmp_path: Path) -> None:
    table(400, broken=2, mute=2).save_to_disk(tmp_path / "few")
    report = open_data(tmp_path / "few", 8).report
    assert (report.total, report.used, report.broken, report.without_caption) == (400, 396, 2, 2)
    table(400, broken=3, mute=2).save_to_disk(tmp_path / "many")
    with pytest.raises(
        UserError,
        match=r"5 of 400 .*2 without caption \(row 398: its text is empty.*3 broken \(row 0: not",
    ):
        open_pictures(tmp_path / "many")
    assert open_pictures(tmp_path / "many", captions=False).report.used == 397


def test_an_empty_picture_is_broken(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [None] + [{"bytes": picture(1)}] * 199, "text": ["a"] * 200}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    assert open_pictures(tmp_path).report.broken == 1


def test_paths_lead_nowhere_outside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out.png").write_bytes(picture(7))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "in.png").write_bytes(picture(1))
    paths = ["../out.png", str(tmp_path / "out.png"), *["in.png"] * 198]
    images = [{"bytes": None, "path": path} for path in paths]
    rows = {"image": images, "text": ["1"] * 200}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(folder / "x.parquet")
    with pytest.raises(UserError, match="holds tables and pictures, and only one of these"):
        open_pictures(folder, cache=tmp_path / "cache")
    (folder / "in.png").rename(folder / "in")
    images = [{"bytes": None, "path": path.removesuffix("in.png") or "in"} for path in paths]
    rows = {"image": images, "text": ["1"] * 200}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "x.parquet")
    catalogue = open_pictures(folder, cache=tmp_path / "cache")
    assert (catalogue.report.used, catalogue.report.refused) == (198, 2)
    assert "2 refused (row 0: Refused: ../out.png is outside" in caplog.text


def test_a_changed_data_set_is_another(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "a")
    first = open_pictures(tmp_path / "a").fingerprint
    assert open_pictures(tmp_path / "a").fingerprint == first
    table(4).save_to_disk(tmp_path / "a")
    assert open_pictures(tmp_path / "a").fingerprint != first


def test_without_datasets_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table().save_to_disk(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install flashdmd\[data\]"):
        open_pictures(tmp_path)
