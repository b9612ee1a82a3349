"""Picture files of every mode, and bytes that are no picture."""

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from flashdmd.data import catalogue, open_pictures
from flashdmd.data.catalogue import check, look
from flashdmd.data.listing import Entry, Listing
from flashdmd.data.pictures import cropped, read_rgb, upright_size
from flashdmd.errors import UserError

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **more: object) -> BytesIO:
    stream = BytesIO()
    image.save(stream, kind, **more)
    stream.seek(0)
    return stream


def colour(stream: BytesIO) -> np.ndarray:
    image = read_rgb(stream)
    assert image.mode == "RGB"
    return np.asarray(image).mean((0, 1))


@pytest.mark.parametrize(
    ("mode", "value", "kind", "seen"),
    [
        ("L", 200, "PNG", (200, 200, 200)),
        ("CMYK", (0, 255, 255, 0), "JPEG", RED),  # inverted, as Adobe has it
        ("CMYK", (0, 255, 255, 0), "TIFF", RED),
        ("RGBA", (255, 0, 0, 0), "PNG", WHITE),
        ("RGBA", (255, 0, 0, 255), "WEBP", RED),
        ("RGBA", (255, 0, 0, 51), "PNG", (255, 204, 204)),
        ("LA", (0, 0), "PNG", WHITE),
        ("I;16", 65535 // 2, "PNG", (127, 127, 127)),
        ("I", 65535 // 2, "TIFF", (127, 127, 127)),
        ("F", 0.5, "TIFF", (127, 127, 127)),
        ("F", 65535 / 2, "TIFF", (127, 127, 127)),
        ("1", 1, "PNG", WHITE),
        ("YCbCr", (76, 85, 255), "JPEG", RED),
    ],
)
def test_every_mode_becomes_rgb(mode: str, value: object, kind: str, seen: tuple[int, ...]) -> None:
    stream = saved(Image.new(mode, (8, 8), value), kind)
    assert np.abs(colour(stream) - seen).max() < 3


def test_sixteen_bits_of_colour_are_read() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32768, 0) * 4 for _ in range(4))
    assert np.abs(colour(BytesIO(png(4, 4, rows, depth=16))) - (255, 128, 0)).max() < 1


def test_a_palette_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    assert colour(saved(image)).tolist() == [10, 20, 30]
    assert colour(saved(image, transparency=0)).tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    first, then = (Image.new("RGB", (8, 8), c) for c in (RED, GREEN))
    stream = saved(first, kind, save_all=True, append_images=[then])
    assert np.abs(colour(stream) - RED).max() < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("decode", [True, False])
def test_a_turned_photograph_stands_upright(kind: str, decode: bool) -> None:
    image = Image.new("RGB", (16, 8), RED)
    image.paste(GREEN, (0, 0, 16, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    stream = saved(image, kind, exif=exif)
    assert upright_size(BytesIO(stream.getvalue()), decode) == (8, 16)
    upright = np.asarray(read_rgb(stream))
    assert upright[:, 6:, 1].mean() > 200  # green is on the right
    assert upright[:, :2, 0].mean() > 200


def swapped() -> bytes:
    """An ICC profile that calls red what sRGB calls green: sRGB's with two tags exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    assert profile.count(b"rXYZ") == profile.count(b"gXYZ") == 1
    return profile.replace(b"rXYZ", b"!XYZ").replace(b"gXYZ", b"rXYZ").replace(b"!XYZ", b"gXYZ")


@pytest.mark.parametrize(
    ("mode", "value", "seen"),
    [("RGB", RED, GREEN), ("RGBA", (*RED, 255), GREEN), ("RGBA", (*RED, 0), WHITE)],
)
def test_colours_are_moved_to_srgb(mode: str, value: object, seen: tuple[int, ...]) -> None:
    image = Image.new(mode, (8, 8), value)
    assert np.abs(colour(saved(image, icc_profile=swapped())) - seen).max() < 3


def test_a_palette_s_colours_are_moved_to_srgb() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette(RED)
    assert np.abs(colour(saved(image, icc_profile=swapped())) - GREEN).max() < 3


@pytest.mark.parametrize("profile", [b"no profile", swapped()[:200]])
def test_a_profile_that_cannot_be_read_is_none(profile: bytes) -> None:
    assert colour(saved(Image.new("RGB", (8, 8), RED), icc_profile=profile)).tolist() == list(RED)


def test_a_profile_of_another_kind_of_colour_is_none() -> None:
    stream = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", icc_profile=swapped())
    assert np.abs(colour(stream) - RED).max() < 3


def test_the_middle_is_taken_and_scaled() -> None:
    image = Image.new("RGB", (48, 16), GREEN)
    image.paste(RED, (16, 0, 32, 16))
    assert cropped(image, (16, 16))[0].min() > 200
    assert cropped(image, (8, 24)).shape == (3, 8, 24)
    assert cropped(image, (8, 24))[1, :, :6].min() > 200  # nothing is cut off: green is there


def png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """A PNG of RGB, written by hand."""

    def part(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = part(b"IHDR", head), part(b"IDAT", zlib.compress(rows)), part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def listed(*contents: bytes) -> Listing:
    entries = [Entry(f"{i:03d}", "a", place, "") for i, place in enumerate(contents)]
    return Listing("bytes", BytesIO, entries)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture"),
        (png(30_000, 30_000, b"\0"), "DecompressionBombError"),
        (png(8, 8, b"\0"), "OSError"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
    ],
)
def test_what_is_no_picture_is_broken(content: bytes, said: str) -> None:
    listing = listed(content)
    [(kind, why)] = look(listing, [0], {0}, [None]).values()
    assert kind == "broken"
    assert why.startswith(said)


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
EXIF = Image.Exif()
EXIF[0x0112] = 6
WHOLE = [
    saved(Image.effect_noise((9, 6), 80).convert("RGB"), kind, **({"exif": EXIF} if exif else {}))
    for kind in KINDS
    for exif in (False, kind not in ("GIF", "BMP"))
]


@settings(max_examples=300, deadline=None)
@given(
    whole=st.sampled_from([stream.getvalue() for stream in WHOLE]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4))),
    keep=st.floats(0, 1),
)
def test_no_bytes_end_the_check(
    whole: bytes, changes: list[tuple[float, bytes]], keep: float
) -> None:
    content = bytearray(whole)
    for place, put in changes:
        at = int(place * len(content))
        content[at : at + len(put)] = put
    listing = listed(bytes(content[: 1 + int(keep * len(content))]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # or one changed byte asks for gigabytes
        for decode in (set(), {0}):
            sizes = [None]
            broken = look(listing, [0], decode, sizes)
            assert (sizes[0] is None) == bool(broken)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is many pictures, for a test's patience."""
    monkeypatch.setattr(catalogue, "ALL_UP_TO", 100)
    monkeypatch.setattr(catalogue, "SAMPLE", 50)


WHITE_PNG = saved(Image.new("RGB", (8, 8), WHITE)).getvalue()
TORN = saved(Image.effect_noise((40, 40), 80)).getvalue()[:900]  # its head is whole


@pytest.mark.usefixtures("few")
def test_of_many_pictures_a_sample_is_decoded() -> None:
    contents = [WHITE_PNG] * 1000
    contents[7] = TORN  # not in the sample
    contents[8] = b"no picture"
    found = check(listed(*contents))
    assert (found.report.used, found.report.broken, found.report.decoded) == (999, 1, 50)
    assert "50 checked in full" in str(found.report)


@pytest.mark.usefixtures("few")
def test_a_bad_sample_has_all_decoded(caplog: pytest.LogCaptureFixture) -> None:
    contents = [WHITE_PNG] * 1000
    contents[0] = contents[7] = contents[8] = TORN  # the first alone is in the sample
    found = check(listed(*contents))
    assert (found.report.broken, found.report.decoded) == (3, 997)
    assert "of 50 pictures that were decoded 1 are broken; now all are decoded" in caplog.text
    for i in range(20):
        contents[10 * i + 1] = TORN
    with pytest.raises(UserError, match=r"2[0-9] of 1000 pictures"):
        check(listed(*contents))


def test_a_check_is_kept_and_what_was_broken_is_looked_at_again(tmp_path: Path) -> None:
    opened = []

    def stream(place: bytes) -> BytesIO:
        opened.append(place)
        return BytesIO(place)

    listing = listed(*[WHITE_PNG] * 199, b"no picture")
    listing.stream = stream
    first = check(listing, tmp_path)
    assert len(opened) == 200
    again = check(listing, tmp_path)
    assert opened[200:] == [b"no picture"]
    assert again.report == first.report
    assert np.array_equal(again.sizes, first.sizes)
    assert again.fingerprint == first.fingerprint
    listing.entries[3] = listing.entries[3]._replace(stamp="touched")
    changed = check(listing, tmp_path)
    assert len(opened) == 401
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("content", ["", "{", '{"decoded": 1, "sizes": [[8]]}', "[]", "\x00"])
def test_a_torn_check_is_made_again(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listing = listed(WHITE_PNG)
    check(listing, tmp_path)
    [kept] = tmp_path.iterdir()
    whole = json.loads(kept.read_text())
    kept.write_text(content)
    check(listing, tmp_path)
    assert json.loads(kept.read_text()) == whole
    assert f"{kept} cannot be read and is made again" in caplog.text


def test_sizes_are_upright_whichever_way_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, stream in enumerate(WHOLE):
        (tmp_path / f"{i}.png").write_bytes(stream.getvalue())
    decoded = open_pictures(tmp_path, captions=False)
    monkeypatch.setattr(catalogue, "ALL_UP_TO", 1)
    monkeypatch.setattr(catalogue, "SAMPLE", 1)
    heads = open_pictures(tmp_path, captions=False)
    assert np.array_equal(decoded.sizes, heads.sizes)
    assert [decoded.open(i).size for i in range(12)] == [decoded.size(i) for i in range(12)]
    assert decoded.size(1) == (6, 9)
