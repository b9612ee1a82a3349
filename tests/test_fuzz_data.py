"""Prompts, folders of pictures and tars of every kind: what is used is whole, or a clear error."""

import io
import json
import logging
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import (
    ODD,
    TEXTS,
    VALUES,
    answered,
    files_in,
    fuzz,
    patient,
    spoilt_bytes,
    spoilt_json,
    texts_of,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flashdmd.data import listing, open_data, read_prompts
from flashdmd.errors import UserError
from flashdmd.preferences import open_preferences

NAMES = st.sampled_from(
    [
        "a",
        "b",
        "a.b",
        "line\nbreak",
        "tab\t",
        "\u00e9",
        "\udcff",
        "-x",
        "x" * 200,
        ".hidden",
        "sub/a",
    ]
)
ENDINGS = st.sampled_from(
    [".png", ".PNG", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".txt", ".svg", ".npy", "", ".tar"]
)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of warnings, all meant."""
    log = logging.getLogger("flashdmd.data")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def fresh(base: Path) -> Path:
    folder = base / "given"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def encoded(kind: str, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 5).save(stream, kind)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(
        ">I", zlib.crc32(name + content)
    )  # fmt: skip


def png_of(width: int, height: int, *chunks: bytes, kind: int = 2, depth: int = 8) -> bytes:
    """A PNG whose head says what it likes."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + body + chunk(b"IEND", b"")
    )


WHOLE = [encoded(k) for k in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")] + [
    encoded("PNG", mode=m) for m in ("1", "L", "P", "LA", "RGBA", "I;16")
]
SIDES = st.sampled_from([0, 1, 7, 2**15, 2**20, 2**31 - 1, 2**32 - 1])
CHUNKS = st.builds(
    chunk,
    st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL"]),
    st.binary(max_size=30) | st.just(b"a\0\0" + zlib.compress(b"0" * 10**6)),
)
PICTURES = (
    st.sampled_from(WHOLE)
    | st.sampled_from(WHOLE).flatmap(spoilt_bytes)
    | st.builds(png_of, SIDES, SIDES, CHUNKS, kind=st.integers(0, 7), depth=st.integers(0, 17))
    | ODD
)

BYTES = TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))

# prompts ------------------------------------------------------------------------------------------


@fuzz(150)
@given(
    st.lists(TEXTS.map(lambda t: t.encode("utf-8", "surrogatepass")) | ODD, max_size=5).map(
        b"\n".join
    )
    | st.lists(VALUES.map(texts_of) | spoilt_json({"prompt": "a cat"}), max_size=4).map(b"\n".join),
    st.sampled_from([".txt", ".TXT", ".jsonl", ".JSONL", "", ".json", ".csv"]),
)
def test_prompts(base: Path, content: bytes, ending: str) -> None:
    path = base / f"prompts{ending}"
    path.write_bytes(content)
    prompts = answered(lambda: read_prompts(path), "prompts")
    if ending in (".json", ".csv"):
        assert prompts is None
    if prompts is not None:
        assert prompts
        for prompt in prompts:
            assert prompt.strip()
            prompt.encode("utf-8")  # no half of a pair
            assert "\0" not in prompt
            assert len(prompt) <= 10_000
        if ending.lower() != ".jsonl":
            lines = content.decode("utf-8-sig").split("\n")
            assert prompts == [line.strip() for line in lines if line.strip()]


# folders ------------------------------------------------------------------------------------------


def used(where: Path) -> None:
    """Whatever is in the place: every picture and caption that is used is whole.

    As it is, and with patience for all but nothing left.
    """
    for share in (listing.MOST_LEFT_OUT, 0.99):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listing, "MOST_LEFT_OUT", share)
            look(where)


def look(where: Path) -> None:
    before = files_in(where) if where.is_dir() else {}
    source = answered(lambda: open_data(where, 8), "pictures")
    if where.is_dir():
        assert files_in(where) == before
    if source is not None:
        drawn = answered(lambda: source.draw(np.random.default_rng(0), 3), "pictures")
        assert drawn is not None
        assert drawn.pictures is not None
        assert drawn.pictures.shape == (3, 3, 8, 8)
        assert all(c == " ".join(c.split()) and c and "\0" not in c for c in drawn.captions)
        assert all(len(c) <= 10_000 for c in drawn.captions)
        assert all(one.name.isprintable() for one in source.catalogue.listing.left_out)
        for i in range(len(source.catalogue)):
            source.catalogue.caption(i).encode("utf-8")
            assert source.catalogue.open(i).size == source.catalogue.size(i)


def put(folder: Path, name: str, content: bytes) -> None:
    with suppress(OSError, ValueError):  # a name that no file can have
        path = folder / os.fsencode(name).decode("utf-8", "surrogateescape")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@fuzz(70)
@given(
    st.lists(st.tuples(NAMES, ENDINGS, PICTURES), min_size=1, max_size=4),
    st.sampled_from(
        [b"a caption", b"", b"\xff", b"\xef\xbb\xbfcaption", b" \n ", b"a\0b", b"a " * 5001]
    ),
    st.sampled_from(["", "loop", "gone", "outside", "fifo", "folder.png", "words"]),
)
def test_folders_of_pictures(
    base: Path, files: list[tuple[str, str, bytes]], caption: bytes, odd: str
) -> None:
    folder = fresh(base)
    put(folder, "whole.png", WHOLE[0])
    put(folder, "whole.txt", b"a caption")
    for name, ending, content in files:
        put(folder, name + ending, content)
        put(folder, name + ".txt", caption)
    links = {"loop": folder, "gone": folder / "nothing", "outside": Path("/etc/passwd")}
    if odd in links:
        (folder / "link.png").symlink_to(links[odd])
    elif odd == "fifo":
        os.mkfifo(folder / "pipe.png")
        put(folder, "pipe.txt", b"a caption")  # else it is left out for want of one
    elif odd == "words":
        os.mkfifo(folder / "words.txt")
        put(folder, "words.png", WHOLE[1])
    elif odd:
        (folder / odd).mkdir()
    used(folder)


@fuzz(70)
@given(
    st.lists(
        spoilt_json({"file_name": "whole.png", "text": "a caption"})
        | st.builds(
            lambda name, text: texts_of({"file_name": name, "text": text}),
            st.sampled_from(["whole.png", "../x.png", "/etc/passwd", "a\0", "", ".", "x" * 300]),
            TEXTS,
        ),
        max_size=4,
    ),
    st.sampled_from(["metadata.jsonl", "metadata.csv"]),
    st.sampled_from([b"\n", b"\r\n", b"\0", b""]),
)
def test_folders_with_metadata(base: Path, lines: list[bytes], name: str, between: bytes) -> None:
    folder = fresh(base)
    put(folder, "whole.png", WHOLE[0])
    good = b"file_name,text\nwhole.png,a" if name.endswith("csv") else texts_of(
        {"file_name": "whole.png", "text": "a caption"}
    )  # fmt: skip
    put(folder, name, between.join([good, *lines]))
    used(folder)


@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl", "metadata.csv", "a.tar"])
@pytest.mark.parametrize("target", ["pipe", "/dev/null"])
def test_pipes_and_devices_are_named_and_not_opened(base: Path, name: str, target: str) -> None:
    folder = fresh(base)
    put(folder, "a.png", WHOLE[0])
    put(folder, "a.txt", b"a caption")
    if name == "a.tar":
        (folder / "a.png").unlink()
    (folder / name).unlink(missing_ok=True)
    if target == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(target)
    with patient(), pytest.raises(UserError, match="regular file"):
        open_data(folder, 8)


# preferences --------------------------------------------------------------------------------------

PAIR = {
    "caption": "a cat", "label_0": 1, "label_1": 0, "has_label": True, "num_example_per_prompt": 2,
    "image_0": "0.png", "image_1": "1.png", "aesthetic_gap": 0.5, "different_flag": 1,
}  # fmt: skip


@fuzz(150)
@given(
    st.lists(spoilt_json(PAIR), min_size=1, max_size=3),
    st.sampled_from(["p.jsonl", "p.JSONL"]),
    st.booleans(),
)
def test_preferences(base: Path, lines: list[bytes], name: str, apart: bool) -> None:
    """Every pair that is used has a label, a weight and words."""
    folder = fresh(base)
    put(folder, "0.png", WHOLE[0])
    put(folder, "1.png", WHOLE[1])
    good = texts_of(PAIR)
    put(folder, name, b"\n".join([good] * 3) if apart else b"\n".join([good, *lines]))
    put(folder, "gaps.jsonl", b"\n".join([good, *lines]))
    gaps = folder / "gaps.jsonl" if apart else None
    found = answered(lambda: open_preferences(folder / name, gaps=gaps), "preferences")
    if found is not None:
        pairs = found[0]
        assert len(pairs) == len(pairs.captions) > 0
        assert np.isin(pairs.labels, (0, 0.5, 1)).all()
        assert (np.isfinite(pairs.per_prompt) & (pairs.per_prompt >= 1)).all()
        for caption in pairs.captions:
            caption.encode("utf-8")
            assert "\0" not in caption
            assert len(caption) <= 10_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_0", "x"),
        ("label_0", [1]),
        ("label_1", "0"),
        ("has_label", "false"),
        ("num_example_per_prompt", "x"),
        ("num_example_per_prompt", 0),
        ("num_example_per_prompt", None),
        ("aesthetic_gap", "x"),
        ("aesthetic_gap", 10**400),
        ("different_flag", {}),
        ("caption", "a\ud800"),
    ],
)
def test_a_preference_that_is_none_is_named(base: Path, key: str, value: Any) -> None:
    folder = fresh(base)
    put(folder, "0.png", WHOLE[0])
    put(folder, "1.png", WHOLE[1])
    put(folder, "p.jsonl", texts_of(PAIR) + b"\n" + texts_of({**PAIR, key: value}))
    with pytest.raises(UserError, match=rf"p\.jsonl: .*{key}.* (row|which is) 1"):
        open_preferences(folder / "p.jsonl")


# tars ---------------------------------------------------------------------------------------------

MEMBERS = st.builds(
    lambda name, ending, content, kind, size: (name + ending, content, kind, size),
    NAMES | st.sampled_from(["../a", "/a", "a/../../b", "a" * 300, "./a"]),
    ENDINGS | st.just(".json"),
    PICTURES | VALUES.map(texts_of),
    st.sampled_from([b"0"] * 6 + [b"1", b"2", b"3", b"4", b"5", b"6", b"x", b"g", b"L", b"S"]),
    st.sampled_from([None] * 6 + [-1, 0, 10**6, 8**11 - 1]),
)


def packed(members: list[tuple[str, bytes, bytes, int | None]]) -> bytes:
    stream = io.BytesIO()
    for name, content, kind, size in members:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
        lying = info if size is None else tarfile.TarInfo(name)
        if size is not None:
            lying.size, lying.type = max(0, size), kind
        with suppress(ValueError, UnicodeError):
            head = lying.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            stream.write(head + content + b"\0" * (-len(content) % 512))
    return stream.getvalue() + b"\0" * 1024


@fuzz(100)
@given(st.data())
def test_tars(base: Path, data: st.DataObject) -> None:
    folder = fresh(base)
    good = [("whole.png", WHOLE[0], b"0", None), ("whole.txt", b"a caption", b"0", None)]
    content = packed([*good, *data.draw(st.lists(MEMBERS, max_size=4))])
    if data.draw(st.booleans()):
        content = data.draw(spoilt_bytes(content))
    (folder / "a.tar").write_bytes(content)
    if data.draw(st.booleans()):
        (folder / "b.tar").write_bytes(packed(good))
    used(folder)


@fuzz(60)
@given(st.text(alphabet="a{}.,0123456789*?[]!-/\0\udcff", max_size=14) | TEXTS)
def test_places_and_patterns(base: Path, where: str) -> None:
    answered(lambda: open_data(str(base / "nothing-") + where, 8), "pictures")
    answered(lambda: open_data(f"{base}/nothing/{where}.tar", 8), "pictures")


# what an earlier check kept -----------------------------------------------------------------------


@fuzz(60)
@given(spoilt_json({"decoded": 1, "sizes": [[9, 7]]}))
def test_a_kept_check_that_is_damaged_is_made_again(base: Path, content: bytes) -> None:
    folder, cache = fresh(base), base / "cache"
    put(folder, "whole.png", WHOLE[0])
    os.utime(folder / "whole.png", ns=(0, 0))
    put(folder, "whole.txt", b"a caption")
    cache.mkdir(exist_ok=True)
    open_data(folder, 8, cache=cache)
    (kept,) = cache.glob("pictures-*.json")
    kept.write_bytes(content)
    source = answered(lambda: open_data(folder, 8, cache=cache), "pictures")
    assert source is not None
    assert source.catalogue.size(0) == (9, 7)
    assert json.loads(kept.read_text())["sizes"] == [[9, 7]]


def test_a_kept_check_of_other_digits_is_not_believed(base: Path) -> None:
    folder, cache = fresh(base), base / "digits"
    put(folder, "whole.png", WHOLE[0])
    put(folder, "whole.txt", b"a caption")
    open_data(folder, 8, cache=cache)
    (kept,) = cache.glob("pictures-*.json")
    kept.write_text(kept.read_text().replace("[9, 7]", "[8, 7]"))
    assert open_data(folder, 8, cache=cache).catalogue.size(0) == (9, 7)
