"""Hugging Face data sets on disk: saved ones, and folders of parquet or arrow files."""

import re
from collections.abc import Mapping
from importlib import import_module
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from flashdmd.data.listing import MUTE, Listing, Refused
from flashdmd.data.listing import opened as opened_file
from flashdmd.data.pictures import Stream
from flashdmd.data.prompts import CAPTION_KEYS, one_line, sound
from flashdmd.errors import UserError
from flashdmd.files import digest

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes
TABLES = (".parquet", ".arrow")
IMAGE_KEYS = ("image", "img", "picture", "jpg", "png", "webp")
SHARD = re.compile(r"(.+)-\d+-of-\d+")  # the stem of a file of a split


def list_rows(
    folder: Path,
    captions: bool,
    image_column: str | None = None,
    caption_column: str | None = None,
    cache: Path | None = None,
) -> Listing:
    """The rows of a data set's `train` split, or of its only one.

    Columns that are not given are guessed; of a list of captions the first is taken. Parquet is
    turned into arrow once, under `cache` or where `datasets` keeps such things. Raises UserError
    when `datasets` is not installed, or the data set cannot be read or has no such split or column.
    """
    table = opened(folder, cache)
    image = column(table, "image", image_column, IMAGE_KEYS, pictorial)
    wanted = [column(table, "caption", caption_column, CAPTION_KEYS, textual)] if captions else []
    table = table.with_format(None).select_columns([image, *wanted])
    if kind(table.features[image]) == "Image":
        table = table.cast_column(image, import_module("datasets").Image(decode=False))
    listing = Listing(str(folder), lambda row: contents(folder, table[row][image]), root=folder)
    stamp = fingerprint(folder)
    for row, told in enumerate(table[wanted[0]] if wanted else [""] * len(table)):
        first = told if isinstance(told, str) else next(iter(told or ()), None)
        try:
            caption = sound(one_line(first or ""), f"its {(wanted or [''])[0]}")
        except UserError as e:
            listing.leave_out(MUTE, f"row {row}", str(e))
            continue
        if captions and not caption:
            listing.leave_out(MUTE, f"row {row}", f"its {wanted[0]} is empty")
        else:
            listing.add(f"row {row}", caption, row, stamp)
    return listing


def opened(folder: Path, cache: Path | None) -> Any:
    """A datasets.Dataset."""
    try:
        datasets = import_module("datasets")
    except ImportError as e:
        raise UserError(
            f"{folder} is a Hugging Face data set and `datasets` is not installed; "
            "pip install flashdmd[data]"
        ) from e
    datasets.disable_progress_bars()
    try:
        if any((folder / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(folder))
            return found[train(folder, list(found))] if isinstance(found, dict) else found
        files = of_train(folder)
        if files[0].endswith(".arrow"):
            return datasets.concatenate_datasets([datasets.Dataset.from_file(f) for f in files])
        where = str(cache / "parquet") if cache else None
        return datasets.Dataset.from_parquet(files, cache_dir=where)
    except UserError:
        raise
    except Exception as e:  # datasets and pyarrow each raise their own kinds
        raise UserError(f"the data set in {folder} cannot be read: {one_line(str(e))}") from e


def train(folder: Path, splits: list[str]) -> str:
    """The split to train on. Raises UserError that names them if it is not clear."""
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise UserError(
        f"{folder} holds the splits {', '.join(splits)} and none is called train; give the folder "
        "of one of them"
    )


def of_train(folder: Path) -> list[str]:
    """The table files of the split to train on: {split}-00000-of-00012.parquet."""
    splits: dict[str, list[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in TABLES and p.is_file()):
        shard = SHARD.fullmatch(path.stem)
        splits.setdefault(shard[1] if shard else path.stem, []).append(str(path))
    if not any(SHARD.fullmatch(Path(files[0]).stem) for files in splits.values()):
        splits = {"train": [f for files in splits.values() for f in files]}
    files = splits[train(folder, list(splits))]
    if len({Path(f).suffix for f in files}) > 1:
        raise UserError(f"{folder} holds both parquet and arrow files; give a folder of one kind")
    return files


def kind(feature: Any) -> str:
    return type(feature).__name__


def pictorial(feature: Any) -> bool:
    """An image, the {bytes, path} that images are stored as, or bytes."""
    stored = isinstance(feature, Mapping) and "bytes" in feature
    return stored or kind(feature) == "Image" or "binary" in str(getattr(feature, "dtype", ""))


def textual(feature: Any) -> bool:
    """A string, or a list of such."""
    inner = getattr(feature, "feature", feature)
    return kind(inner) == "Value" and inner.dtype in ("string", "large_string")


def column(table: Any, what: str, given: str | None, keys: tuple[str, ...], fits: Any) -> str:
    """The column that is given, else the one of a usual name, else the only one that fits."""
    features = dict(table.features)
    fitting = [name for name, feature in features.items() if fits(feature)]
    usual = [name for key in keys for name in fitting if name.lower() == key]
    chosen = [given] if given else usual[:1] or fitting
    if len(chosen) == 1 and chosen[0] in fitting:
        return chosen[0]
    columns = ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items())
    asked = f"{given!r} is no column of {what}s" if given else f"no clear column of {what}s"
    raise UserError(f"{asked}; the columns are {columns}: name one as data.{what}_column")


def contents(folder: Path, value: Any) -> Stream:
    """Opens what a row holds: bytes, or a path inside the data set's folder."""
    inner = value if isinstance(value, Mapping) else {"bytes": value}
    if inner.get("bytes"):
        return BytesIO(inner["bytes"])
    path = PurePosixPath(inner.get("path") or "")
    if path.is_absolute() or ".." in path.parts:
        raise Refused(f"{path} is outside the data set's folder")
    if not path.parts:
        raise ValueError("the row holds no picture")
    return opened_file(folder / path)


def fingerprint(folder: Path) -> str:
    """Of the names, sizes and times of a data set's files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    facts = ((str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return digest(*(repr(fact).encode() for fact in facts))
