"""Which of two pictures of a prompt people prefer: Pick-a-Pic's columns, or lines of JSON.

A data set is a folder of parquet or arrow files, or as datasets' save_to_disk leaves it, with the
columns caption, jpg_0 and jpg_1 (or image_0 and image_1), label_0 and, if there are, label_1,
has_label, num_example_per_prompt and score gaps; or a .jsonl of the same, of paths of pictures.
"""

import csv
import importlib
import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from flashdmd.data.listing import MOST_LEFT_OUT as MOST_BROKEN
from flashdmd.data.listing import TELL_AFTER
from flashdmd.data.pictures import FORMATS
from flashdmd.data.prompts import read_text, record, sound
from flashdmd.errors import UserError
from flashdmd.files import digest
from flashdmd.seeds import seed_of

TIE = 0.5
SIDES = (("jpg_0", "jpg_1"), ("image_0", "image_1"))
EXAMPLES = "num_example_per_prompt"
COLUMNS = ("caption", "label_0", "label_1", "has_label", EXAMPLES)
LONGEST = 50  # characters of a value that are told
DIFFERENT = "different_flag"  # of a file of gaps: 0 is a tie (LPO's)
SHARD = re.compile(r"(\w+)-\d+-of-\d+")  # how the hub names the files of a split
# LPO's second strategy, on the leads of the preferred picture: least of a kept pair, most of a tie
GAPS = {"aesthetic_gap": (-0.5, 0.2), "clipscore_gap": (0.0, 0.03), "vqascore_gap": (0.0, 0.07)}

Raw = bytes | Path  # an encoded picture, or where it is
Counts = dict[str, int]
Columns = Mapping[str, Iterable[Any]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Pairs in order of preference; of a tie either order."""

    win: UInt8[Tensor, "B 3 H W"]
    lose: UInt8[Tensor, "B 3 H W"]
    ties: Float[Tensor, "B"]
    weights: Float[Tensor, "B"]  # shares of the examples: 1 over its prompt's pairs, normalised
    captions: list[str]


@dataclass(frozen=True)
class Preferences:
    """Labelled pairs; pictures are read when they are drawn.

    What cannot be read then is left out and another pair drawn in its place; when that befalls more
    than one pair in a hundred, UserError.
    """

    captions: list[str]
    labels: np.ndarray  # (N,) 1: the first is preferred, 0: the second, 0.5: neither
    per_prompt: np.ndarray  # (N,) pairs of the same prompt
    gaps: dict[str, np.ndarray]  # (N,) each: the preferred picture's score less the other's
    pictures: Callable[[int], tuple[Raw, Raw]]  # of a row of the source
    rows: np.ndarray  # (N,) of the source
    broken: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ties(self) -> np.ndarray:
        return self.labels == TIE

    def take(self, chosen: np.ndarray) -> "Preferences":
        """Those where the mask `chosen` is true."""
        return replace(
            self,
            captions=[c for c, is_chosen in zip(self.captions, chosen, strict=True) if is_chosen],
            labels=self.labels[chosen],
            per_prompt=self.per_prompt[chosen],
            gaps={name: values[chosen] for name, values in self.gaps.items()},
            rows=self.rows[chosen],
        )

    def batch(self, n: int, batch_size: int, size: int, seed: int, readers: Executor) -> Batch:
        """Batch `n`, a function of (seed, n); pictures are `size` across."""
        rng = np.random.default_rng(seed_of(seed, "instead of broken pairs", n))
        chosen = drawn(n, batch_size, len(self), seed)
        return self.read(chosen, size, readers, lambda: int(rng.integers(len(self))))

    def read(
        self, chosen: list[int], size: int, readers: Executor, another: Callable[[], int]
    ) -> Batch:
        """These pairs; `another` is asked for one in place of one that cannot be read."""
        seen = []
        for at, pair in enumerate(list(readers.map(lambda i: self.pair(i, size), chosen))):
            while pair is None:
                chosen[at] = another()
                pair = self.pair(chosen[at], size)
            seen.append(pair)
        weights = torch.from_numpy(1 / self.per_prompt[chosen]).float()
        return Batch(
            win=torch.from_numpy(np.stack([win for win, _ in seen])),
            lose=torch.from_numpy(np.stack([lose for _, lose in seen])),
            ties=torch.from_numpy(self.ties[chosen]).float(),
            weights=weights / weights.sum(),
            captions=[self.captions[i] for i in chosen],
        )

    def pair(self, i: int, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(preferred, other), each (3, size, size) uint8; None if one cannot be read."""
        try:
            first, second = (picture(raw, size) for raw in self.pictures(int(self.rows[i])))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            self.leave_out(int(self.rows[i]), e)
            return None
        return (first, second) if self.labels[i] >= TIE else (second, first)

    def leave_out(self, row: int, why: Exception) -> None:
        if row not in self.broken:
            log.warning("pair %d is left out: %s", row, why)
        self.broken.add(row)
        if len(self.broken) > MOST_BROKEN * len(self):
            rows = ", ".join(str(r) for r in sorted(self.broken)[:TELL_AFTER])
            raise UserError(
                f"the pictures of {len(self.broken)} of {len(self)} pairs cannot be read (rows "
                f"{rows}, ...; {why}): more than one in a hundred; repair or remove them"
            )


def drawn(n: int, batch_size: int, total: int, seed: int) -> list[int]:
    """Which of `total` examples batch `n` has: all once an epoch, each epoch in its own order."""
    places = range(n * batch_size, (n + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng(seed_of(seed, "epoch", epoch)).permutation(total)
        for epoch in {place // total for place in places}
    }
    return [int(orders[place // total][place % total]) for place in places]


def picture(raw: Raw, size: int) -> np.ndarray:
    """(3, size, size) uint8 RGB: resized, not cropped, as LPO does."""
    stream = raw if isinstance(raw, Path) else io.BytesIO(raw)
    with Image.open(stream, formats=FORMATS) as opened:
        resized = opened.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1)


def filtered(
    pairs: Preferences, bounds: Mapping[str, tuple[float, float]]
) -> tuple[Preferences, Counts]:
    """The pairs whose scores agree with the label, and how many there were (LPO's MPCF).

    `bounds` of a gap: what it must exceed of a pair with a preference, and what its size must be
    below of a tie. Without gaps all are kept. Raises UserError when only some of them are there.
    """
    lacking = [name for name in bounds if name not in pairs.gaps]
    if lacking and pairs.gaps:
        raise UserError(
            f"there are gaps of {', '.join(pairs.gaps)} but none of {', '.join(lacking)}; give "
            "these too, or leave them out of gap_bounds"
        )
    kept = np.ones(len(pairs), dtype=bool)
    counts = {"pairs": len(pairs), "ties": int(pairs.ties.sum())}
    for name, (least, most) in bounds.items() if not lacking else ():
        gap = pairs.gaps[name]
        agrees = np.where(pairs.ties, np.abs(gap) < most, gap > least)
        counts[f"refused by {name}"] = int((~agrees).sum())  # by others as well, or by it alone
        kept &= agrees
    chosen = pairs.take(kept)
    if not len(chosen):
        raise UserError(f"no pair is left by the filter of score gaps: {counts}")
    return chosen, counts | {"kept": len(chosen), "kept ties": int(chosen.ties.sum())}


def divided(pairs: Preferences, share: float) -> tuple[Preferences, Preferences]:
    """(to learn from, held out): whole prompts, about a `share` of them, told by their digest."""
    held = np.array([int(digest(c.encode()), 16) % 10_000 < share * 10_000 for c in pairs.captions])
    return pairs.take(~held), pairs.take(held)


def open_preferences(
    path: Path,
    split: str = "train",
    gaps: Path | None = None,
    gap_names: tuple[str, ...] = tuple(GAPS),
) -> tuple[Preferences, Counts]:
    """The labelled pairs of a folder or a .jsonl, and how many there were.

    `gaps` is a .csv or .jsonl with a line for each row of the data set; without it, columns of
    `gap_names` are used if there are any. Raises UserError for what cannot be read as this.
    """
    columns, pictures = (
        from_lines(path) if is_lines(path) else from_datasets(path, split, gap_names)
    )
    scores = read_gaps(gaps) if gaps else columns
    return assemble(path, columns, pictures, gaps or path, scores, gap_names)


def is_lines(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def assemble(
    path: Path,
    columns: Columns,
    pictures: Callable[[int], tuple[Raw, Raw]],
    given: Path,
    scores: Columns,
    gap_names: tuple[str, ...],
) -> tuple[Preferences, Counts]:
    """Preferences of the rows with a label, their columns checked; `given` has the `scores`."""
    if missing := [name for name in ("caption", "label_0") if name not in columns]:
        raise UserError(f"{path} has no column {missing[0]}; it has {', '.join(columns)}")
    captions, labels = list(columns["caption"]), numbers(path, columns, "label_0")
    if "label_1" in columns:
        other = numbers(path, columns, "label_1")
        refuse_rows(path, labels + other != 1, labels, "label_0 and label_1 do not add up to 1")
    refuse_rows(path, ~np.isin(labels, (0, TIE, 1)), labels, "label_0 is not 1, 0 or 0.5")
    mute = np.array([not isinstance(caption, str) for caption in captions])
    refuse_rows(path, mute, labels, "caption is not a text")
    labelled = ~np.isnan(labels)
    for row in np.flatnonzero(labelled):
        sound(captions[row], f"{path}: the caption of row {row}")
    if "has_label" in columns:
        labelled &= numbers(path, columns, "has_label") == 1
    gaps = {name: numbers(given, scores, name) for name in gap_names if name in scores}
    if odd := [name for name, values in gaps.items() if len(values) != len(labels)]:
        raise UserError(
            f"{path} has {len(labels)} rows and there are {len(gaps[odd[0]])} of {odd[0]}; a file "
            "of gaps has one for each row, in the same order"
        )
    if DIFFERENT in scores:
        differ = (numbers(given, scores, DIFFERENT) == 1) != (labels != TIE)
        refuse_rows(path, differ & labelled, labels, f"{DIFFERENT} says otherwise than label_0")
    if not labelled.any():
        raise UserError(f"none of the {len(labels)} rows of {path} has a label")
    captions = [str(caption) for caption in captions]  # of unlabelled rows they may be anything
    counted = Counter(captions)
    own = {EXAMPLES: columns.get(EXAMPLES, [counted[c] for c in captions])}
    per_prompt = numbers(path, own, EXAMPLES)
    few = ~((per_prompt >= 1) & np.isfinite(per_prompt))
    refuse_rows(path, few & labelled, labels, f"{EXAMPLES} is not a number of 1 or more")
    pairs = Preferences(captions, labels, per_prompt, gaps, pictures, np.arange(len(labels)))
    counts = {"rows": len(labels), "without a label": int((~labelled).sum())}
    return pairs.take(labelled), counts


def numbers(path: Path, columns: Columns, name: str) -> np.ndarray:
    """A column as float64; NaN for none. Raises UserError that names the first row of no number."""
    found = []
    for row, x in enumerate(columns[name]):
        try:
            if isinstance(x, str):
                raise TypeError("a text")
            found.append(np.nan if x is None else float(x))
        except (TypeError, ValueError, OverflowError) as e:
            raise UserError(
                f"{path}: {name} of row {row} is {str(x)[:LONGEST]!r}; accepted are numbers"
            ) from e
    return np.array(found)


def refuse_rows(path: Path, wrong: np.ndarray, labels: np.ndarray, what: str) -> None:
    """Raises UserError for the first row that is wrong, unless it has no label at all."""
    if len(rows := np.flatnonzero(wrong & ~np.isnan(labels))):
        raise UserError(f"{path}: {what} in {len(rows)} rows, the first of which is {rows[0]}")


def from_lines(path: Path) -> tuple[Columns, Callable[[int], tuple[Raw, Raw]]]:
    """The objects of a .jsonl; pictures are named by paths inside its folder."""
    lines = read_text(path, "the list of pairs", "make it readable").split("\n")
    found = [
        (i, record(line, f"{path}, line {i}")) for i, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise UserError(f"{path} holds no pairs; write an object with caption, label_0, ... a line")
    paths = []
    for number, entry in found:
        names = [entry.get(side) for side in SIDES[1]]
        both = [path.parent / str(name) for name in names]
        outside = [PurePosixPath(str(n)) for n in names]
        if any(p.is_absolute() or ".." in p.parts for p in outside) or not all(
            isinstance(name, str) and p.is_file() for name, p in zip(names, both, strict=True)
        ):
            raise UserError(
                f"{path}, line {number}: image_0 and image_1 must be pictures in its folder, and "
                f"they are {names[0]!r} and {names[1]!r}"
            )
        paths.append((both[0], both[1]))
    return by_name([entry for _, entry in found]), lambda row: paths[row]


def by_name(entries: list[dict[str, Any]]) -> Columns:
    """Objects as columns; None where one lacks what another has."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: [entry.get(name) for entry in entries] for name in names}


def read_gaps(path: Path) -> Columns:
    """A .csv with a header, or a .jsonl."""
    text = read_text(path, "the file of score gaps", "give a .csv or a .jsonl")
    if is_lines(path):
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return by_name([record(line, f"{path}, line {i}") for i, line in lines])
    try:
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
        columns = {
            name: [float(row[name]) if row[name] else None for row in rows]
            for name in (rows[0] if rows else ())
            if name in GAPS or name == DIFFERENT or name.endswith("_gap")
        }
    except (csv.Error, ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be read as a table of numbers: {e}") from e
    if not columns:
        raise UserError(f"{path} has none of the columns {', '.join(GAPS)}")
    return columns


def from_datasets(
    folder: Path, split: str, gap_names: tuple[str, ...]
) -> tuple[Columns, Callable[[int], tuple[Raw, Raw]]]:
    """Through the datasets library, which keeps pictures on the disk."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as e:
        raise UserError(
            f"{folder}: parquet and arrow files need the datasets library (pip install datasets); "
            "a .jsonl of pictures needs nothing more"
        ) from e
    try:
        table = read_table(datasets, folder, split)
        sides = next((s for s in SIDES if set(s) <= set(table.column_names)), None)
        if sides is None:
            raise UserError(f"{folder} has neither jpg_0 and jpg_1 nor image_0 and image_1")
        for side in sides:
            if isinstance(table.features[side], datasets.Image):
                table = table.cast_column(side, datasets.Image(decode=False))
        wanted = [n for n in (*COLUMNS, *gap_names, DIFFERENT) if n in table.column_names]
        read = table.select_columns(wanted).with_format("arrow")[:]
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{folder} cannot be read as a data set: {e}") from e
    pictures = table.select_columns(list(sides))

    def both(row: int) -> tuple[Raw, Raw]:
        found = pictures[row]
        first, second = (raw_of(folder, found[side]) for side in sides)
        return first, second

    return read.to_pydict(), both


def read_table(datasets: Any, folder: Path, split: str) -> Any:
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(folder))
        if split not in splits:
            raise UserError(f"{folder} has no split {split}; it has {', '.join(splits)}")
        return splits[split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    for ending in ("parquet", "arrow"):
        if files := of_split(sorted(folder.rglob(f"*.{ending}")), split):
            named = [str(file) for file in files]
            return datasets.load_dataset(ending, data_files=named, split="train")
    raise UserError(
        f"{folder} holds no data set of preferences with a split {split}: give a folder of "
        ".parquet or .arrow files, one written by save_to_disk, or a .jsonl"
    )


def of_split(files: list[Path], split: str) -> list[Path]:
    """Those of a split, where the names tell of one."""
    told = [(file, SHARD.match(file.name)) for file in files]
    return [file for file, name in told if name is None or name[1] == split]


def raw_of(folder: Path, value: Any) -> Raw:
    """The bytes of a column of bytes or of the library's pictures, or the path of one of these,
    inside the folder.
    """
    if isinstance(value, dict):
        inside = PurePosixPath(str(value.get("path")))
        if value.get("bytes") is None and (inside.is_absolute() or ".." in inside.parts):
            raise ValueError(f"{inside} is outside the data set's folder")
        value = value["bytes"] if value.get("bytes") is not None else folder / inside
    if isinstance(value, Path) and value.exists() and not value.is_file():
        raise ValueError(f"{value} is no regular file")
    if not isinstance(value, bytes | Path):
        raise ValueError(f"a picture is {type(value).__name__}, not bytes")
    return value
