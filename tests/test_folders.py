"""Folders of pictures as people have them, broken ones among them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdmd.data import open_folder
from flashdmd.errors import UserError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def picture(path: Path, mode: str = "RGB", colour: object = RED, size: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), colour).save(path)
    return path


def with_captions(folder: Path, n: int) -> Path:
    for i in range(n):
        picture(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"number\n{i} ")
    return folder


def drawn(folder: Path, n: int = 60, **more: bool) -> tuple[np.ndarray, list[str]]:
    return open_folder(folder, 16, **more)(np.random.default_rng(0), n)


def test_captions_stand_beside(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "deep/b.JPG", colour=GREEN)
    (tmp_path / "a.txt").write_text("a red\nthing\n")
    (tmp_path / "deep/b.txt").write_text("a green thing")
    pictures, captions = drawn(tmp_path)
    assert pictures.shape == (60, 3, 16, 16)
    for image, caption in zip(pictures, captions, strict=True):
        channel = {"a red thing": 0, "a green thing": 1}[caption]
        assert image.mean((1, 2)).argmax() == channel
    assert len(set(captions)) == 2


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_stand_in_metadata(key: str, tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "unlisted.png")
    lines = [json.dumps({"file_name": "in/a.png", key: " red "}), ""]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert set(drawn(tmp_path)[1]) == {"red"}


def test_the_same_draw_gives_the_same_pictures(tmp_path: Path) -> None:
    with_captions(tmp_path, 5)
    first, again = drawn(tmp_path), drawn(tmp_path)
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1]


def test_prompts_of_ones_own_make_captions_needless(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert set(drawn(tmp_path, captions=False)[1]) == {""}
    with pytest.raises(
        UserError, match=r"1 of 1 pictures .* without caption \(a\.png.*data\.prompts"
    ):
        open_folder(tmp_path, 16)


def test_a_broken_picture_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_captions(tmp_path, 200)
    whole = (tmp_path / "007.png").read_bytes()
    (tmp_path / "007.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "008.txt").unlink()
    source = open_folder(tmp_path, 16)
    _, captions = source(np.random.default_rng(0), 4000)
    assert {f"number {i}" for i in range(200)} - set(captions) == {"number 7", "number 8"}
    report = source.report
    assert (report.total, report.used, report.broken, report.without_caption) == (200, 198, 1, 1)
    assert "198 of 200 pictures are used; 1 broken; 1 without caption\n" in caplog.text
    assert "1 without caption (008.png: no .txt" in caplog.text
    assert "1 broken (007.png: OSError" in caplog.text


def test_more_than_one_in_a_hundred_broken_is_an_error(tmp_path: Path) -> None:
    with_captions(tmp_path, 100)
    for i in (3, 4):
        (tmp_path / f"{i:03d}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 100 pictures .*003\.png: not a.*004\.png.*repair"):
        open_folder(tmp_path, 16)
    picture(tmp_path / "004.png")
    assert open_folder(tmp_path, 16).report.broken == 1


def test_broken_pictures_and_missing_captions_count_together(tmp_path: Path) -> None:
    with_captions(tmp_path, 100)
    (tmp_path / "003.png").write_bytes(b"no picture")
    (tmp_path / "004.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"2 of 100 .*1 without caption \(004\.png.*1 broken \(003"):
        open_folder(tmp_path, 16)


def test_a_format_that_is_not_read_is_not_dropped_silently(tmp_path: Path) -> None:
    with_captions(tmp_path, 100)
    for name in ("a.heic", "b.avif"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"2 of 102 .*without a picture.*a\.heic.*convert"):
        open_folder(tmp_path, 16)
    (tmp_path / "b.avif").unlink()
    assert open_folder(tmp_path, 16).report.without_picture == 1


def test_names_that_differ_in_the_ending_share_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.bmp", colour=GREEN)
    (tmp_path / "a.jpeg").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "a.txt").write_text("a thing")
    source = open_folder(tmp_path, 16)
    report = source.report
    assert (report.total, report.used, report.duplicates, report.copies) == (3, 2, 2, 1)
    assert "1 given twice; 2 names met again" in str(report)
    assert {source.catalogue.name(i) for i in range(2)} == {"a.bmp", "a.jpeg"}


def test_the_same_file_twice_in_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    lines = [{"file_name": "a.png", "text": t} for t in ("red", "crimson", "red")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_folder(tmp_path, 16)
    assert [source.catalogue.caption(i) for i in range(2)] == ["red", "crimson"]
    report = source.report
    assert (report.total, report.used, report.duplicates, report.copies) == (3, 2, 2, 1)


def test_captions_stand_in_a_table(tmp_path: Path) -> None:
    picture(tmp_path / "train/a.png")
    picture(tmp_path / "train/b.png")
    picture(tmp_path / "test/c.png")
    (tmp_path / "train/metadata.csv").write_text('file_name,text\na.png,"red, a"\nb.png,"a\nb"\n')
    (tmp_path / "test/metadata.jsonl").write_text('{"file_name": "./c.png", "text": "c"}')
    catalogue = open_folder(tmp_path, 16).catalogue
    found = {catalogue.name(i): catalogue.caption(i) for i in range(3)}
    assert found == {"train/a.png": "red, a", "train/b.png": "a b", "test/c.png": "c"}


def test_what_metadata_does_not_name_is_counted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    assert "1 not named in the metadata" in str(open_folder(tmp_path, 16).report)


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    with_captions(tmp_path, 1)
    (tmp_path / "._000.png").write_bytes(b"what another system leaves there")
    picture(tmp_path / ".thumbnails/000.png")
    assert open_folder(tmp_path, 16).report.total == 1


def test_links_to_folders_are_followed_and_rings_are_not(tmp_path: Path) -> None:
    with_captions(tmp_path / "elsewhere", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/ring").symlink_to(tmp_path / "data")
    assert open_folder(tmp_path / "data", 16).report.used == 2


def test_what_is_no_folder_of_pictures_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_data_dir=.*nowhere' is not a folder"):
        open_folder(tmp_path / "nowhere", 16)
    (tmp_path / "a.md").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no pictures.*png"):
        open_folder(tmp_path, 16)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object"),
        ('{"text": "a"}', 'line 1: not an object with a "file_name"'),
        ('{"file_name": "a.png"}', 'with a "text" or "caption" or "prompt"'),
        ('{"file_name": "a.png", "text": " "}', '"text" must be a text that is not empty'),
        ('{"file_name": "b.png", "text": "a"}', "b.png: No such file or directory"),
        ('{"file_name": "../a.png", "text": "a"}', "1 refused (../a.png"),
    ],
)
def test_a_bad_line_of_metadata_is_named(line: str, said: str, tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "a.png")
    (tmp_path / "in/metadata.jsonl").write_text(line)
    with pytest.raises(UserError) as e:
        open_folder(tmp_path / "in", 16)
    assert said in str(e.value)


def test_paths_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    with_captions(tmp_path / "in", 200)
    names = [f"{i:03d}.png" for i in range(200)]
    for outside in (str(path), "../a.png", "x/../../a.png", "..\\a.png", "a\0.png"):
        lines = [json.dumps({"file_name": n, "text": "a"}) for n in (outside, *names)]
        (tmp_path / "in/metadata.jsonl").write_text("\n".join(lines))
        report = open_folder(tmp_path / "in", 16).report
        assert (report.total, report.used, report.refused) == (201, 200, 1)


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    with_captions(tmp_path, 1)
    (tmp_path / "000.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"caption .*000\.txt is not UTF-8"):
        open_folder(tmp_path, 16)
