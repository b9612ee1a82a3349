"""Webdataset tars as people have them, some made to do harm."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flashdmd.data import Catalogue, open_data, open_pictures
from flashdmd.data.tars import expanded, list_tars, shards
from flashdmd.errors import UserError


def picture(colour: object = (255, 0, 0), kind: str = "PNG", mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (12, 8), colour).save(stream, kind)
    return stream.getvalue()


PNG = picture()


def tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def examples(n: int, prefix: str = "") -> list[tuple[str | tarfile.TarInfo, bytes | str]]:
    one = (((f"{prefix}{i:04d}.png", PNG), (f"{prefix}{i:04d}.txt", f"{i}")) for i in range(n))
    return [member for pair in one for member in pair]


def captions(catalogue: Catalogue) -> dict[str, str]:
    return {catalogue.name(i): catalogue.caption(i) for i in range(len(catalogue))}


def test_every_ending_of_pictures_and_captions_is_read(tmp_path: Path) -> None:
    caption = "a red\nthing"
    members = [
        ("a.jpg", picture(kind="JPEG")),
        ("a.txt", caption),
        ("b.PNG", PNG),
        ("b.text", caption),
        ("c.webp", picture(kind="WEBP")),
        ("c.caption", caption),
        *((f"{key}.png", PNG) for key in "def"),
        ("d.json", json.dumps({"caption": caption, "url": "x"})),
        ("e.json", json.dumps({"text": caption})),
        ("f.json", json.dumps({"prompt": caption})),
        ("./deep/g.x.json", "not read"),
        ("./deep/g.cls", "7"),
        ("./deep/g.jpeg", picture(kind="JPEG")),
        ("./deep/g.txt", caption),
        ("LICENSE", "no key"),
        ("._a.png", b"no picture"),
    ]
    catalogue = open_pictures(tar(tmp_path / "x.tar", members))
    assert set(captions(catalogue).values()) == {"a red thing"}
    assert [n.partition(":")[2] for n in captions(catalogue)] == [
        *("a.jpg", "b.png", "c.webp", "d.png", "e.png", "f.png", "deep/g.jpeg")
    ]
    for i in range(7):
        assert np.abs(np.asarray(catalogue.open(i)).mean((0, 1)) - (255, 0, 0)).max() < 3


def test_members_lie_where_the_index_says(tmp_path: Path) -> None:
    members = []
    for i in range(20):
        name = "n" * 150 + f"{i}"  # needs a header of its own
        members += [(f"{name}.txt", f"{i}"), (f"{name}.png", picture((i, 0, 0)))]
    catalogue = open_pictures(tar(tmp_path / "x.tar", members))
    for i in np.random.default_rng(0).permutation(20).tolist():
        assert int(catalogue.caption(i)) == np.asarray(catalogue.open(i))[0, 0, 0] == i


def test_many_tars_are_one_catalogue(tmp_path: Path) -> None:
    for k in range(12):
        tar(tmp_path / f"train-{k:03d}.tar", examples(2, f"{k}-"))
    folder = open_pictures(tmp_path)
    assert len(folder) == 24
    assert captions(open_pictures(f"{tmp_path}/train-{{000..011}}.tar")) == captions(folder)
    assert captions(open_pictures(f"{tmp_path}/*.tar")) == captions(folder)
    assert len(open_pictures(f"{tmp_path}/train-{{000,00{{1,2}}}}.tar")) == 6
    with pytest.raises(UserError, match=r"2 of the 3 tars .*train-012\.tar, .*train-013"):
        open_pictures(f"{tmp_path}/train-{{011..013}}.tar")
    with pytest.raises(UserError, match=r"not there: .*\*b\.tar"):
        open_pictures(f"{tmp_path}/*b.tar")


def test_braces_are_written_out() -> None:
    assert list(expanded("a{08..11}b{x,y}")) == [
        f"a{i}b{x}" for i in ("08", "09", "10", "11") for x in "xy"
    ]
    assert list(expanded("a{}")) == ["a{}"]


def test_a_key_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blue = picture((0, 0, 255))
    again = [("0000.png", blue), ("0000.txt", "blue"), ("0001.webp", blue)]
    tar(tmp_path / "a.tar", [*examples(2), *again])
    tar(tmp_path / "b.tar", examples(2))
    source = open_data(tmp_path, 8)
    told = captions(source.catalogue)
    assert told == {f"{t}.tar:000{i}.png": f"{i}" for t in "ab" for i in range(2)}
    assert np.asarray(source.catalogue.open(0)).mean((0, 1)).tolist() == [255, 0, 0]
    report = source.report
    assert (report.total, report.used, report.copies, report.duplicates) == (6, 4, 2, 4)
    assert "a.tar:0000.png: another picture of the key 0000" in caplog.text


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize(
    "member",
    [
        "../out.png",
        "a/../../out.png",
        "/out.png",
        "../.out.png",
        link("out.png", "/etc/passwd"),
        link("out.png", "0000.png", tarfile.LNKTYPE),
        link("out.png", "", tarfile.CHRTYPE),
        link("out.png", "", tarfile.GNUTYPE_SPARSE),
    ],
    ids=[
        "parent",
        "inner parent",
        "absolute",
        "hidden parent",
        "symbolic link",
        "hard link",
        "device",
        "with holes",
    ],
)
def test_nothing_outside_is_read_or_written(
    member: str | tarfile.TarInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = PNG if isinstance(member, str) else b""
    tar(tmp_path / "in/x.tar", [*examples(100), (member, content)])
    before = sorted(tmp_path.rglob("*"))
    catalogue = open_pictures(tmp_path / "in")
    assert (catalogue.report.used, catalogue.report.refused) == (100, 1)
    assert "out.png" in caplog.text
    assert not any("out" in name for name in captions(catalogue))
    assert sorted(tmp_path.rglob("*")) == before
    tar(tmp_path / "in/x.tar", [*examples(1), (member, content)])
    with pytest.raises(UserError, match=r"1 of 2 pictures .*1 refused \(x\.tar:.*out\.png"):
        open_pictures(tmp_path / "in")


def test_broken_pictures_and_missing_captions_are_counted(tmp_path: Path) -> None:
    extra = [
        ("b.png", PNG[:50]),
        ("b.txt", "broken"),
        ("c.png", PNG),
        ("d.png", PNG),
        ("d.json", '{"caption": null}'),
        ("e.txt", "a film"),
        ("e.mp4", b"x"),
    ]
    tar(tmp_path / "x.tar", [*examples(500), *extra])
    report = open_pictures(tmp_path).report
    assert (report.total, report.used) == (504, 500)
    assert (report.broken, report.without_caption, report.without_picture) == (1, 2, 1)
    tar(tmp_path / "x.tar", [*examples(100), *extra])
    with pytest.raises(
        UserError,
        match=r"4 of 104 .*2 without caption \(x\.tar:c\.png: no txt.*x\.tar:d\.png.*"
        r"\(x\.tar:e: it has txt, mp4\).*1 broken \(x\.tar:b\.png",
    ):
        open_pictures(tmp_path)
    with pytest.raises(UserError, match=r"2 of 104 "):
        open_pictures(tmp_path, captions=False)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", b" \n", b"[1]", b"{"])
@pytest.mark.parametrize("ending", ["txt", "json"])
def test_a_caption_that_is_none_is_missing(text: bytes, ending: str, tmp_path: Path) -> None:
    if ending == "txt" and text in (b"[1]", b"{"):
        return  # odd, but words
    tar(tmp_path / "x.tar", [*examples(100), ("b.png", PNG), (f"b.{ending}", text)])
    report = open_pictures(tmp_path).report
    assert (report.used, report.without_caption) == (100, 1)


def test_a_tar_that_is_not_whole_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", examples(30))
    whole = path.read_bytes()
    for size in (0, 100, 512, 1000, 1024, 2048, 20_000, 512 * 100, len(whole) - 10240):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x\.tar .*(cut off|cannot be read as a tar)"):
            open_pictures(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match=r"x\.tar goes on after byte"):
        open_pictures(tmp_path)
    path.write_bytes(whole[:1024] + b"\1" * 512 + whole[1536:])  # a head of no meaning
    with pytest.raises(UserError, match=r"x\.tar goes on after byte 1024"):
        open_pictures(tmp_path)
    with tarfile.open(path, "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match=r"x\.tar cannot be read as a tar.*not compressed"):
        open_pictures(tmp_path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(names=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), max_size=5))
def test_no_names_end_the_index(names: list[str], tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [(name.replace("\0", "/"), PNG) for name in names])
    listing = list_tars("x", [path], captions=False)
    assert {entry.place.size for entry in listing.entries} <= {len(PNG)}
    assert all(listing.stream(entry.place).read() == PNG for entry in listing.entries)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 4096), st.binary(max_size=8)), max_size=4))
def test_no_bytes_end_the_index(changes: list[tuple[int, bytes]], tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", examples(2))
    content = bytearray(path.read_bytes())
    for at, put in changes:
        content[at : at + len(put)] = put
    path.write_bytes(content)
    try:
        listing = list_tars("x", [path], captions=True)
    except UserError:
        return
    assert listing.total <= 5


def test_a_tar_that_vanishes_or_changes_while_training_is_named(tmp_path: Path) -> None:
    """At its places are other pictures than those of the captions, and it may hold half of all."""
    for k in range(2):
        tar(tmp_path / f"{k}.tar", examples(10, f"{k}-"))
    source, path = open_data(tmp_path, 8), tmp_path / "1.tar"
    whole, facts = path.read_bytes(), path.stat()

    def draw() -> int:
        return len(source(np.random.default_rng(0), 50)[1])

    for content, says in (
        (None, "1.tar is not there any more"),
        (whole[:700], "1.tar was changed since"),
        (whole[::-1], "1.tar was changed since"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"{says}.*put the tar back"):
            draw()
    path.write_bytes(whole)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert draw() == 50
    assert not source.failed


def test_shards_of_a_folder_are_sorted(tmp_path: Path) -> None:
    paths = [tar(tmp_path / name, []) for name in ("b.tar", "a.tar", "c/a.tar")]
    assert shards(str(tmp_path)) == sorted(paths)


@pytest.mark.parametrize("where", ["a-{0..999999999}.tar", "{0..999}{0..999}.tar", "{3..1}", "\0*"])
def test_a_pattern_of_none_or_of_too_many_is_refused_at_once(where: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no tar, or more than 100000"):
        open_pictures(f"{tmp_path}/{where}")
