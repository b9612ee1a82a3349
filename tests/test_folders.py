"""Folders of pictures as people have them, broken ones among them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdmd.data import open_folder, read_picture
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
    with pytest.raises(UserError, match=r"1 of 1 pictures .* no caption \(a\.png.*data\.prompts"):
        open_folder(tmp_path, 16)


def test_a_broken_picture_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_captions(tmp_path, 200)
    whole = (tmp_path / "007.png").read_bytes()
    (tmp_path / "007.png").write_bytes(whole[: len(whole) // 2])
    source = open_folder(tmp_path, 16)
    _, captions = source(np.random.default_rng(0), 600)
    assert "number 7" not in captions
    assert len(captions) == 600
    assert [p.name for p in source.broken] == ["007.png"]
    assert caplog.text.count("007.png is left out") == 1


def test_more_than_one_in_a_hundred_broken_is_an_error(tmp_path: Path) -> None:
    with_captions(tmp_path, 100)
    for i in (3, 4):
        (tmp_path / f"{i:03d}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 100 pictures .*003\.png.*004\.png"):
        drawn(tmp_path, 900)


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("L", 200, (200, 200, 200)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535 // 2, (127, 127, 127)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour: object, seen: object, tmp_path: Path) -> None:
    path = picture(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), mode, colour)
    image = read_picture(path, 8)
    assert image.dtype == np.uint8
    assert np.abs(image.mean((1, 2)) - seen).max() < 3


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "a.png", transparency=0)
    assert (read_picture(tmp_path / "a.png", 8) == 255).all()


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), RED)
    image.paste(GREEN, (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_picture(tmp_path / "a.png", 8)
    assert upright[1, :, 6:].mean() > 200  # green is on the right
    assert upright[0, :, :2].mean() > 200


def test_the_middle_is_taken(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 16), GREEN)
    image.paste(RED, (16, 0, 32, 16))
    image.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 16)[0].min() > 200


def test_what_is_no_folder_of_pictures_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_data_dir=.*nowhere' is not a folder"):
        open_folder(tmp_path / "nowhere", 16)
    (tmp_path / "a.gif").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no pictures.*\.png"):
        open_folder(tmp_path, 16)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object"),
        ('{"text": "a"}', 'line 1: not an object with a "file_name"'),
        ('{"file_name": "a.png"}', 'with a "text" or "caption" or "prompt"'),
        ('{"file_name": "a.png", "text": " "}', '"text" must be a text that is not empty'),
        ('{"file_name": "b.png", "text": "a"}', "no picture 'b.png'"),
        ('{"file_name": "../a.png", "text": "a"}', "no picture '../a.png'"),
    ],
)
def test_a_bad_line_of_metadata_is_named(line: str, said: str, tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "a.png")
    (tmp_path / "in/metadata.jsonl").write_text(line)
    with pytest.raises(UserError) as e:
        open_folder(tmp_path / "in", 16)
    assert said in str(e.value)


def test_an_absolute_path_is_refused(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": str(path), "text": "a"}))
    with pytest.raises(UserError, match="no picture"):
        open_folder(tmp_path, 16)


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    with_captions(tmp_path, 1)
    (tmp_path / "000.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"caption .*000\.txt is not UTF-8"):
        open_folder(tmp_path, 16)
