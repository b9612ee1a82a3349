"""What people may hand in, by the thousand: how it is drawn, and what is asked of whoever reads it.

FLASHDMD_FUZZ=2000 draws so many examples of each property; without it some hundred, always the same
ones. `python benchmarks/fuzz.py` counts what was drawn, and what of it was refused.
"""

import atexit
import json
import os
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from flashdmd.cli import OUTSIDE
from flashdmd.errors import UserError

MANY = int(os.environ.get("FLASHDMD_FUZZ", "0"))
PATIENCE_S = 30  # what takes longer hangs; the machine may be busy
DRAWN: Counter[str] = Counter()  # examples of each property
REFUSED: Counter[str] = Counter()  # those of them that ended in a UserError

if told := os.environ.get("FLASHDMD_FUZZ_COUNTS"):  # a file, for the benchmark
    atexit.register(lambda: Path(told).write_text(json.dumps([DRAWN, REFUSED])))


def fuzz(examples: int) -> settings:
    """So many examples of a property in the suite, the same ones in every run."""
    return settings(
        max_examples=MANY or examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


T = TypeVar("T")


class HangError(BaseException):
    """It took longer than PATIENCE_S; nothing catches it."""


@contextmanager
def patient() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answered(call: Callable[[], T], area: str) -> T | None:
    """What a call gives, None where it refuses with words; anything else it raises is a bug."""
    DRAWN[area] += 1
    try:
        with patient():
            return call()
    except (UserError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in OUTSIDE:  # these end with code 2 as well
            raise
        REFUSED[area] += 1
        if not str(e).strip():
            raise AssertionError("it says nothing") from e
        return None


def files_in(folder: Path) -> dict[str, int]:
    """Every file below, with its size."""
    return {str(p): p.lstat().st_size for p in folder.rglob("*")}


# texts and JSON -----------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        b"", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 100_000,
        b'{"a":' * 50_000, b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b"{}", b"[]", b"null",
        b"{", b'"', b'"\\ud800"', b'{"a": 1, "a": 2}', b"\x1b[2J", b"x" * 70_000, b"\r\n" * 100,
    ]
)  # fmt: skip
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", " ", "..", "/", "/etc/passwd", "\0", "\ud800", "a\nb", "no", "~", "1e5", "x" * 5000, "<<"]
)
NUMBERS = (
    st.integers(-3, 2000)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 0])
    | st.floats(allow_nan=True, allow_infinity=True)
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def texts_of(value: Any) -> bytes:
    """JSON, with what JSON has no word for as Python writes it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    yield at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if at_list(value) else ()
    for key, inner in parts:
        yield from leaves(inner, (*at, key))


def at_list(value: Any) -> bool:
    return isinstance(value, list)


@st.composite
def spoilt_value(draw: st.DrawFn, good: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A JSON value with one to three of its parts replaced, taken out, or put beside others."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(list(leaves(value))))
        if not way:
            value = draw(values) if draw(st.integers(0, 5)) == 0 else value
            continue
        inner = value
        for key in way[:-1]:
            inner = inner[key]
        what = draw(st.sampled_from(["put", "put", "take", "add"]))
        if what == "take":
            del inner[way[-1]]
        elif what == "add" and isinstance(inner, dict):
            inner[draw(TEXTS)] = draw(values)
        else:
            inner[way[-1]] = draw(values)
    return value


@st.composite
def spoilt_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Cut short, with bits flipped, bytes put in, or something else altogether."""
    what = draw(st.sampled_from(["cut", "flip", "put", "odd", "random", "twice"]))
    if what == "odd":
        return draw(ODD)
    if what == "random":
        return draw(st.binary(max_size=200))
    if what == "twice":
        return good + good
    if what == "cut":
        return good[: draw(st.integers(0, max(0, len(good) - 1)))]
    changed = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        if what == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        else:
            changed[at:at] = draw(st.binary(max_size=8))
    return bytes(changed)


def spoilt_json(good: Any) -> st.SearchStrategy[bytes]:
    return spoilt_value(good).map(texts_of) | spoilt_bytes(texts_of(good)) | VALUES.map(texts_of)


# safetensors --------------------------------------------------------------------------------------

DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "X", "", 3])


@st.composite
def spoilt_safetensors(draw: st.DrawFn, good: bytes) -> bytes:
    """A file whose header lies, is no JSON, or is of other tensors; or that is damaged anywhere."""
    what = draw(st.sampled_from(["bytes", "header", "header", "length", "tensor", "json", "twice"]))
    if what == "bytes":
        return draw(spoilt_bytes(good))
    (length,) = struct.unpack("<Q", good[:8])
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    if what == "length":
        lie = draw(st.sampled_from([0, 1, length - 1, length + 1, 10**8, 10**9, 2**63, 2**64 - 1]))
        return struct.pack("<Q", lie) + good[8:]
    names = [name for name in header if name != "__metadata__"]
    if what == "header":
        name, key = draw(st.sampled_from(names)), draw(
            st.sampled_from(["dtype", "shape", "data_offsets"])
        )  # fmt: skip
        size = st.integers(-1, 200) | st.sampled_from([2**31, 2**63, 2**64 - 1])
        new: Any = DTYPES if key == "dtype" else st.lists(size, max_size=5) | VALUES
        header[name][key] = draw(new)
    elif what == "tensor":
        name = draw(st.sampled_from(names))
        change = draw(st.sampled_from(["take", "rename", "double", "metadata"]))
        if change in ("take", "rename"):
            entry = header.pop(name)
            header |= {draw(TEXTS): entry} if change == "rename" else {}
        elif change == "double":
            header[draw(TEXTS)] = header[name]
        else:
            header["__metadata__"] = draw(VALUES)
    text = texts_of(header)
    if what == "json":
        text = draw(spoilt_bytes(text))
    elif what == "twice":  # a key that is there two times
        text = text[:-1] + b", " + text[1:]
    return struct.pack("<Q", len(text)) + text + body
