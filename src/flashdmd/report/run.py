"""A run folder as it was left, finished or not: what is there, and what is missing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashdmd.errors import UserError
from flashdmd.report.health import number, refined

FILES = (
    "recipe.yaml", "metrics.jsonl", "metrics.json", "samples", "data.json", "timing.json",
    "versions.json",
)  # fmt: skip
Record = Mapping[str, Any]


@dataclass
class Run:
    """Everything the page shows; `missing` says in sentences what it cannot show."""

    folder: Path
    name: str
    recipe: str = ""
    log: list[Record] = field(default_factory=list)  # of one arm, resumed and rewound parts merged
    prompts: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)  # that have pictures
    rows: list[Record] = field(default_factory=list)
    fingerprint: Record = field(default_factory=dict)
    health: list[Record] = field(default_factory=list)
    caveat: str = ""  # what stands in real pictures' place
    data: list[str] = field(default_factory=list)  # sentences on the pictures that it learned on
    timing: dict[str, float] = field(default_factory=dict)  # milliseconds an iteration
    versions: Record = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def has_stage_2(self) -> bool:
        figures = [str(row["arm"]) for row in self.rows]
        return refined(self.arms + figures) is not None or any(
            stage_of(r) in ("joint", "rl") for r in self.log
        )

    def picture(self, arm: str, i: int) -> np.ndarray | None:
        """(3, H, W) uint8, or None where there is none to read."""
        path = self.folder / "samples" / arm / f"{i:02d}.png"
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError):  # PIL's ways of saying: no picture
            return None

    def pictures(self, arm: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """Two arms' pictures for the prompts that both drew, in equal sizes."""
        pairs = [(self.picture(arm, i), self.picture(other, i)) for i in range(len(self.prompts))]
        both = [(a, b) for a, b in pairs if a is not None and b is not None and a.shape == b.shape]
        both = [pair for pair in both if pair[0].shape == both[0][0].shape]
        if not both:
            none = np.zeros((0, 3, 1, 1), dtype=np.uint8)
            return none, none
        return np.stack([a for a, _ in both]), np.stack([b for _, b in both])


def read(folder: Path) -> Run:
    """Reads what there is. Raises UserError when `folder` holds nothing of a run."""
    if not any((folder / name).exists() for name in FILES):
        raise UserError(
            f"{folder} is not a run folder: it holds none of {', '.join(FILES)}; name the "
            "output_dir of a training run"
        )
    run = Run(folder, folder.resolve().name)
    read_recipe(run)
    read_log(run)
    read_samples(run)
    read_metrics(run)
    read_data(run)
    read_machine(run)
    if not run.has_stage_2:
        run.missing.append("Stage 2 (reinforcement learning) has not run.")
    return run


def read_recipe(run: Run) -> None:
    try:
        run.recipe = (run.folder / "recipe.yaml").read_text("utf-8", errors="replace")
    except FileNotFoundError:
        run.missing.append("recipe.yaml is not there, so the recipe cannot be shown.")


def read_log(run: Run) -> None:
    try:
        text = (run.folder / "metrics.jsonl").read_text("utf-8", errors="replace")
    except FileNotFoundError:
        run.missing.append("metrics.jsonl is not there, so there are no curves.")
        return
    records, torn = parsed(text)
    if torn:
        run.missing.append(f"Lines of metrics.jsonl that cannot be read and are left out: {torn}.")
    arms = list(dict.fromkeys(str(r.get("arm", "")) for r in records))
    if len(arms) > 1:
        run.missing.append(f"The curves are those of {arms[0]!r}; the log also has {arms[1:]}.")
    run.log = unrolled([r for r in records if str(r.get("arm", "")) == arms[0]])


def parsed(text: str) -> tuple[list[Record], int]:
    """The iterations that a log tells of, and how many of its lines cannot be read."""
    records: list[Record] = []
    torn = 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            records.append(record)
        elif line.strip():
            torn += 1
    return records, torn


def unrolled(records: list[Record]) -> list[Record]:
    """The history that led to the end, numbered through: each record gets an "x".

    A run that was resumed from a checkpoint logs the iterations after it again: the later lines
    count, also where the run went back by a stage. Stages may count from 0 or go on counting.
    """
    order = {stage: n for n, stage in enumerate(dict.fromkeys(stage_of(r) for r in records))}
    history: list[tuple[int, int, Record]] = []
    for record in records:
        place = (order[stage_of(record)], record["iteration"])
        while history and history[-1][:2] >= place:
            history.pop()
        history.append((*place, record))
    numbered: list[Record] = []
    offset, before = 0, -1
    for stage, iteration, record in history:
        if numbered and stage != before and iteration + offset <= numbered[-1]["x"]:
            offset = numbered[-1]["x"] + 1 - iteration
        numbered.append({**record, "x": iteration + offset})
        before = stage
    return numbered


def stage_of(record: Record) -> str:
    return str(record.get("stage", ""))


def read_samples(run: Run) -> None:
    samples = read_json(run, "samples/samples.json", "there are no pictures to compare")
    run.prompts = [str(p) for p in listed(samples, "prompts")]
    named = [str(arm) for arm in listed(samples, "arms")]
    run.arms = [arm for arm in named if is_plain(arm) and (run.folder / "samples" / arm).is_dir()]
    for arm in named:
        if arm not in run.arms:
            run.missing.append(f"There are no pictures of {arm!r}.")
        elif gaps := sum(run.picture(arm, i) is None for i in range(len(run.prompts))):
            run.missing.append(
                f"Pictures of {arm!r} that cannot be read: {gaps} of {len(run.prompts)}."
            )


def is_plain(arm: str) -> bool:
    """Whether `arm` names a folder inside, not a way out."""
    return Path(arm).name == arm and arm not in ("", ".", "..") and "\0" not in arm


def read_metrics(run: Run) -> None:
    metrics = read_json(
        run,
        "metrics.json",
        "nothing was measured; the command of the run does that in the end",
    )
    rows = listed(metrics, "rows")
    run.rows = [r for r in rows if isinstance(r, dict) and isinstance(r.get("arm"), str)]
    run.health = [h for h in listed(metrics, "health") if isinstance(h, dict)]
    fingerprint = metrics.get("fingerprint")
    run.fingerprint = fingerprint if isinstance(fingerprint, dict) else {}


def read_data(run: Run) -> None:
    data = read_json(run, "data.json", "it is not known what the run learned on")
    run.caveat = str(data.get("caveat", ""))
    run.data = [str(sentence) for sentence in listed(data, "says")]


def read_machine(run: Run) -> None:
    timing = read_json(run, "timing.json", "it is not known where the time went")
    parts = timing.get("milliseconds")
    parts = parts if isinstance(parts, dict) else {}
    run.timing = {part: ms for part in parts if (ms := number(parts, part)) is not None}
    run.versions = read_json(run, "versions.json", "the versions are not known")


def read_json(run: Run, name: str, so: str) -> dict[str, Any]:
    """The object in a file; {} and an entry in `run.missing` where there is none."""
    try:
        value = json.loads((run.folder / name).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        run.missing.append(f"{name} is not there, so {so}.")
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        run.missing.append(f"{name} cannot be read ({error}), so {so}.")
        return {}
    if not isinstance(value, dict):
        run.missing.append(f"{name} does not hold an object, so {so}.")
        return {}
    return value


def listed(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    return found if isinstance(found, list) else []
