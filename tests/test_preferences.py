"""Preference data: real pictures in every form it comes in, its filter, its batches."""

import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashdmd.errors import UserError
from flashdmd.preferences import (
    GAPS,
    Batch,
    Preferences,
    divided,
    drawn,
    filtered,
    open_preferences,
    picture,
)

datasets = pytest.importorskip("datasets")
ROWS = [  # caption, level of each picture, label_0 (None: no label), pairs of its prompt
    ("a dog", 200, 40, 1.0, 2),
    ("a dog", 60, 90, 0.0, 2),
    ("a cat", 120, 121, 0.5, 1),
    ("a hen", 10, 250, None, 1),
    ("a fox", 30, 220, 0.0, 4),
]


@pytest.fixture
def readers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def png(level: int, size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "png")
    return file.getvalue()


def pick_a_pic() -> dict[str, list[Any]]:
    """The columns that Pick-a-Pic has and are used, and one that is not."""
    return {
        "caption": [row[0] for row in ROWS],
        "jpg_0": [png(row[1]) for row in ROWS],
        "jpg_1": [png(row[2]) for row in ROWS],
        "label_0": [row[3] for row in ROWS],
        "label_1": [None if row[3] is None else 1 - row[3] for row in ROWS],
        "has_label": [row[3] is not None for row in ROWS],
        "num_example_per_prompt": [row[4] for row in ROWS],
        "best_image_uid": ["x"] * len(ROWS),
    }


def lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def as_lines(folder: Path) -> list[dict[str, Any]]:
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for i, (caption, *levels, label, count) in enumerate(ROWS):
        names = [f"pictures/{i}-{side}.png" for side in (0, 1)]
        for name, level in zip(names, levels, strict=True):
            (folder / name).write_bytes(png(level))
        row = {"image_0": names[0], "image_1": names[1], "caption": caption, "label_0": label}
        rows.append({**row, "num_example_per_prompt": count})
    return rows


def write(form: str, folder: Path) -> Path:
    table = datasets.Dataset.from_dict(pick_a_pic())
    if form == "jsonl":
        return lines(folder, as_lines(folder))
    if form == "disk":
        table.save_to_disk(folder / "disk")
    elif form == "splits":
        other = table.select([0])
        datasets.DatasetDict({"train": table, "validation": other}).save_to_disk(folder / "disk")
    else:
        (folder / "disk").mkdir()
        if form == "pictures":
            for side in ("jpg_0", "jpg_1"):
                table = table.cast_column(side, datasets.Image())
        table.select([0, 1]).to_parquet(folder / "disk/train-00000-of-00002.parquet")
        table.select([2, 3, 4]).to_parquet(folder / "disk/train-00001-of-00002.parquet")
        table.select([0]).to_parquet(folder / "disk/validation_unique-00000-of-00001.parquet")
    return folder / "disk"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", ["jsonl", "disk", "splits", "parquet", "pictures"])
def test_every_form_holds_the_same_pairs(
    form: str, tmp_path: Path, readers: ThreadPoolExecutor
) -> None:
    pairs, counts = open_preferences(write(form, tmp_path))
    assert pairs.captions == ["a dog", "a dog", "a cat", "a fox"]
    assert pairs.labels.tolist() == [1, 0, 0.5, 0]
    assert pairs.rows.tolist() == [0, 1, 2, 4]
    assert counts == {"rows": 5, "without a label": 1}
    batch = pairs.read([0, 1, 2, 3], 4, readers, lambda: 0)
    assert batch.win[:, 0, 0, 0].tolist() == [200, 90, 120, 220]
    assert batch.lose[:, 0, 0, 0].tolist() == [40, 60, 121, 30]
    assert batch.ties.tolist() == [0, 0, 1, 0]
    expected = torch.tensor([1 / 2, 1 / 2, 1, 1 / 4]) / 2.25
    torch.testing.assert_close(batch.weights, expected)


def test_a_split_is_found_by_the_names_of_its_files(tmp_path: Path) -> None:
    folder = write("parquet", tmp_path)
    assert len(open_preferences(folder, "validation_unique")[0]) == 1
    with pytest.raises(UserError, match="no data set of preferences with a split test"):
        open_preferences(folder, "test")
    with pytest.raises(UserError, match="has no split test; it has train, validation"):
        open_preferences(write("splits", tmp_path / "other"), "test")


def test_counts_of_a_prompt_are_made_where_they_are_not_given(tmp_path: Path) -> None:
    rows = as_lines(tmp_path)
    for row in rows:
        del row["num_example_per_prompt"]
    pairs, _ = open_preferences(lines(tmp_path, rows))
    assert pairs.per_prompt.tolist() == [2, 2, 1, 1]


def test_a_label_that_is_said_not_to_be_one_is_none(tmp_path: Path) -> None:
    rows = as_lines(tmp_path)
    rows[0]["has_label"] = False
    for row in rows[1:]:
        row["has_label"] = True
    pairs, counts = open_preferences(lines(tmp_path, rows))
    assert pairs.rows.tolist() == [1, 2, 4]
    assert counts["without a label"] == 2


def test_a_picture_is_resized_and_not_cropped() -> None:
    wide = np.zeros((8, 32, 3), np.uint8)
    wide[:, 16:] = (255, 128, 0)
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "png")
    square = picture(file.getvalue(), 8)
    assert square.shape == (3, 8, 8)
    assert square[:, :, 0].max() == 0
    assert square[:, 4, -1].tolist() == [255, 128, 0]


def test_each_epoch_has_every_pair_once_in_an_order_of_its_own() -> None:
    """Batches run over the ends of epochs; batch n does not need the ones before it."""
    seen = [i for n in range(10) for i in drawn(n, 7, 10, seed=3)]
    epochs = [seen[at : at + 10] for at in range(0, 70, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert drawn(4, 7, 10, seed=3) == seen[28:35]
    assert drawn(4, 7, 10, seed=4) != seen[28:35]


def fake(gaps: dict[str, list[float]], labels: list[float]) -> Preferences:
    n = len(labels)
    return Preferences(
        [f"prompt {i}" for i in range(n)],
        np.array(labels),
        np.ones(n),
        {name: np.array(values) for name, values in gaps.items()},
        lambda row: (png(10), png(20)),
        np.arange(n),
    )


def test_the_filter_keeps_what_the_scores_agree_with_and_counts() -> None:
    """By hand, at the bounds: aesthetic > -0.5, clip > 0, vqa > 0; ties |.| < 0.2, 0.03, 0.07."""
    nan = float("nan")
    pairs = fake(
        {
            "aesthetic_gap": [-0.49, -0.5, 1.0, 1.0, nan, 0.19, -0.19, 0.2, 0.1, 0.1],
            "clipscore_gap": [0.01, 0.01, 0.0, 0.01, 0.01, 0.02, -0.02, 0.0, -0.03, 0.0],
            "vqascore_gap": [0.01, 0.01, 0.01, 0.0, 0.01, 0.06, -0.06, 0.0, 0.0, 0.07],
        },
        [1, 1, 0, 0, 1, 0.5, 0.5, 0.5, 0.5, 0.5],
    )
    kept, counts = filtered(pairs, GAPS)
    assert kept.rows.tolist() == [0, 5, 6]
    assert kept.captions == ["prompt 0", "prompt 5", "prompt 6"]
    assert counts == {
        "pairs": 10,
        "ties": 5,
        "refused by aesthetic_gap": 3,
        "refused by clipscore_gap": 2,
        "refused by vqascore_gap": 2,
        "kept": 3,
        "kept ties": 2,
    }


def test_without_gaps_all_are_kept_and_with_some_of_them_none() -> None:
    plain = fake({}, [1, 0.5])
    kept, counts = filtered(plain, GAPS)
    assert len(kept) == 2
    assert counts == {"pairs": 2, "ties": 1, "kept": 2, "kept ties": 1}
    with pytest.raises(UserError, match="none of clipscore_gap, vqascore_gap"):
        filtered(fake({"aesthetic_gap": [1.0]}, [1]), GAPS)
    with pytest.raises(UserError, match=r"no pair is left by the filter .*'pairs': 1"):
        filtered(fake({"aesthetic_gap": [-1.0]}, [1]), {"aesthetic_gap": (-0.5, 0.2)})


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_gaps_come_from_a_file_with_a_line_for_each_row(form: str, tmp_path: Path) -> None:
    source = lines(tmp_path, as_lines(tmp_path))
    values = {name: [0.1, 0.2, 0.3, 0.4, 0.5] for name in GAPS}
    values["different_flag"] = [1, 1, 0, 1, 1]
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    file = tmp_path / f"gaps.{form}"

    def put(rows: list[dict[str, float]]) -> None:
        if form == "jsonl":
            file.write_text("\n".join(json.dumps(row) for row in rows))
            return
        head = ["", "note", *rows[0]]
        body = [[i, "text", *row.values()] for i, row in enumerate(rows)]
        file.write_text("\n".join(",".join(map(str, row)) for row in [head, *body]))

    put(rows)
    pairs, _ = open_preferences(source, gaps=file)
    assert pairs.gaps["vqascore_gap"].tolist() == [0.1, 0.2, 0.3, 0.5]
    put(rows[:4])
    with pytest.raises(UserError, match="has 5 rows and there are 4 of aesthetic_gap"):
        open_preferences(source, gaps=file)
    put([rows[2], *rows[1:]])
    with pytest.raises(UserError, match="different_flag says otherwise than label_0 in 1 rows"):
        open_preferences(source, gaps=file)


def test_gaps_may_be_columns_of_the_data(tmp_path: Path) -> None:
    columns = {**pick_a_pic(), **{name: [0.1, 0.2, 0.3, 0.4, 0.5] for name in GAPS}}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "disk")
    pairs, _ = open_preferences(tmp_path / "disk")
    assert list(pairs.gaps) == list(GAPS)
    assert pairs.gaps["clipscore_gap"].tolist() == [0.1, 0.2, 0.3, 0.5]


def test_prompts_are_held_out_as_a_whole_and_always_the_same() -> None:
    captions = [f"prompt {i % 400}" for i in range(1000)]
    pairs = Preferences(captions, np.ones(1000), np.ones(1000), {}, lambda row: (b"", b""),
                        np.arange(1000))  # fmt: skip
    learn, held = divided(pairs, 0.2)
    assert not set(learn.captions) & set(held.captions)
    assert sorted([*learn.rows, *held.rows]) == list(range(1000))
    assert 50 <= len(set(held.captions)) <= 110  # four deviations of 400 draws of 0.2
    again, _ = divided(pairs.take(np.arange(1000) % 2 == 0), 0.2)
    assert set(again.captions) <= set(learn.captions)
    assert len(divided(pairs, 0.0)[1]) == 0


def many(n: int, broken: set[int]) -> Preferences:
    def pictures(row: int) -> tuple[bytes, bytes]:
        return png(row % 200), (b"no picture" if row in broken else png(250))

    return Preferences(["x"] * n, np.zeros(n), np.ones(n), {}, pictures, np.arange(n))


def test_a_pair_that_cannot_be_read_is_replaced_the_same_way_each_time(
    readers: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    def batches(pairs: Preferences) -> list[Batch]:
        return [pairs.batch(n, 50, 4, 0, readers) for n in range(4)]

    first, whole = batches(many(200, {17})), batches(many(200, set()))
    assert "pair 17 is left out" in caplog.text
    shown = torch.cat([batch.lose[:, 0, 0, 0] for batch in first]).tolist()
    assert 17 not in shown
    differ = [
        (i, j)
        for i in range(4)
        for j in range(50)
        if not (first[i].lose[j] == whole[i].lose[j]).all()
    ]
    assert len(differ) == 1
    alone = many(200, {17}).batch(differ[0][0], 50, 4, 0, readers)
    assert torch.equal(alone.lose, first[differ[0][0]].lose)


def test_more_than_one_in_a_hundred_that_cannot_be_read_is_an_error(
    readers: ThreadPoolExecutor,
) -> None:
    pairs = many(200, {3, 4, 5})
    with pytest.raises(UserError, match=r"the pictures of 3 of 200 pairs .* more than one in"):
        list(map(lambda n: pairs.batch(n, 50, 4, 0, readers), range(4)))


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    rows = as_lines(tmp_path)

    def refused(match: str, *changes: dict[str, Any]) -> None:
        path = lines(
            tmp_path, [{**row, **change} for row, change in zip(rows, changes, strict=False)]
        )
        with pytest.raises(UserError, match=match):
            open_preferences(path)

    refused("label_0 is not 1, 0 or 0.5 in 1 rows, the first of which is 1", {}, {"label_0": 0.7})
    refused("do not add up to 1 in 1 rows", {"label_1": 1.0}, {"label_1": 1})
    refused("caption is not a text in 1 rows", {"caption": None})
    refused(r"line 1: image_0 and image_1 must be .* 'gone\.png'", {"image_0": "gone.png"})
    refused("line 1: image_0 and image_1 must be", {"image_0": "../pairs.jsonl"})
    refused("none of the 1 rows of .* has a label", {"label_0": None})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no pairs"):
        open_preferences(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="holds no data set of preferences"):
        open_preferences(tmp_path / "pictures")
    datasets.Dataset.from_dict({"caption": ["a"], "label_0": [1.0]}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match="neither jpg_0 and jpg_1 nor image_0 and image_1"):
        open_preferences(tmp_path / "d")
    file = tmp_path / "gaps.csv"
    good = lines(tmp_path, rows)
    for text, match in (
        ("aesthetic_gap\nhigh\n", "cannot be read as a table of numbers"),
        ("score\n1\n", "has none of the columns aesthetic_gap"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=match):
            open_preferences(good, gaps=file)


def test_a_folder_without_the_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = write("disk", tmp_path), write("jsonl", tmp_path / "plain")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"need the datasets library \(pip install datasets\)"):
        open_preferences(folder)
    open_preferences(plain)
