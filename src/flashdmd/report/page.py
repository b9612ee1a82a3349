"""report.html: one self-contained page about a run, readable on a phone and without a network."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from flashdmd.files import write_text
from flashdmd.report import health
from flashdmd.report.curves import curves
from flashdmd.report.health import Row, Verdict, apart, interval, number
from flashdmd.report.run import Run, read
from flashdmd.report.sheet import picture_of

OPEN_ROWS = 8  # prompts shown at once; the others unfold
PICTURES = 2_000_000  # bytes of data URIs; with all else the page stays below 3 MB
SMALL = 128  # pixels up to which a picture is shown as it is; larger ones become JPEG of THUMBNAIL
THUMBNAIL = 256
MINUS, DASH = "\u2212", "\u2013"
LONGEST = {"prompt": 400, "recipe": 100_000}  # characters
EVERYTHING_ELSE = 0.05  # of the time may go into none of the networks


@dataclass(frozen=True)
class Metric:
    key: str
    name: str
    better: Literal["lower", "higher"]
    means: str


METRICS = (
    Metric(
        "nfe",
        "Network calls",
        "lower",
        "Forward passes for one picture. Guidance costs two a step.",
    ),
    Metric(
        "kid",
        "KID",
        "lower",
        "Distance to the reference pictures in a judge's features. 0: cannot be told apart.",
    ),
    Metric(
        "retrieval",
        "Caption retrieval",
        "higher",
        "How often a picture's own name is among the judge's first five of all that were asked.",
    ),
    Metric(
        "reward",
        "Reward",
        "higher",
        "The reward that stage 2 trains for. It has to rise there, so it proves little.",
    ),
    Metric(
        "held_out_reward",
        "Held-out reward",
        "higher",
        "The same question to a judge that nothing was trained against.",
    ),
    Metric(
        "diversity",
        "Diversity",
        "higher",
        "Perceptual distance between pictures of one prompt.",
    ),
    Metric("seconds_per_image", "Seconds a picture", "lower", "On the machine of this run."),
)
ARMS = {
    "student-stage1": "Student after stage 1",
    "student-joint": "Student after stage 2",
    "student-rl": "Student after RL alone",
}
VERDICTS = {  # what each name asks
    "blur": "Did fine detail get lost?",
    "saturation_drift": "Did colours or contrast leave the teacher's?",
    "diversity_drop": "Does one prompt still give different pictures?",
    "score_lag": "Does the score estimator keep up with the student?",
    "oscillation": "Do student and score estimator settle?",
    "d_overpowering": "Has the discriminator stopped learning?",
    "reward_hacking": "Was the reward bought with quality?",
}


@dataclass(frozen=True)
class Cell:
    """One figure of the table."""

    text: str
    interval: str
    mark: Literal["", "best", "tied"]  # tied: its interval overlaps that of the best


@dataclass(frozen=True)
class Headline:
    """What the page says first; `rest` puts it into proportion."""

    title: str
    result: str
    rest: str = ""


def write(run: Path) -> Path:
    """Writes `report.html` into the run folder, from whatever the run left there.

    Raises UserError when the folder holds nothing of a run.
    """
    found = read(run)
    page = run / "report.html"
    # ASCII with character references: right whatever the encoding, even for half an emoji
    write_text(page, render(found).encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return page


def render(run: Run) -> str:
    """The page as text; the same run gives the same page."""
    arms = list(dict.fromkeys(str(row["arm"]) for row in run.rows))
    lines, hidden = grid(run)
    figures = table(run.rows)
    return template().render(
        name=run.name,
        headline=headline(run.rows, run.has_stage_2),
        missing=run.missing,
        columns=[(label(arm), calls(run.rows, arm)) for arm in run.arms],
        lines=lines,
        hidden=hidden,
        open_rows=OPEN_ROWS,
        table_arms=[label(arm) for arm in arms],
        table=figures,
        unmeasured=any(cell.text == DASH for _, _, line in figures for cell in line),
        ties=any(cell.mark == "tied" for _, _, line in figures for cell in line),
        fingerprint=plain(run.fingerprint),
        curves=[(c, Markup(c.svg)) for c in curves(run.log)],
        updates=updates(run),
        caveat=run.caveat,
        data=run.data,
        verdicts=[(asdict(v), VERDICTS.get(v.name, ""), percent(v)) for v in judged(run)],
        parts=parts(run.timing),
        total=sum(run.timing.values()),
        everything_else=EVERYTHING_ELSE,
        recipe=run.recipe[: LONGEST["recipe"]],
        recipe_cut=len(run.recipe) > LONGEST["recipe"],
        versions=plain(run.versions),
    )


@cache
def template() -> Template:
    text = (files("flashdmd.report") / "template.html").read_text("utf-8")
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return page.from_string(text)


def label(arm: str) -> str:
    """What people call an arm; one that is not known keeps its name."""
    steps = health.steps_of(arm)
    return f"Teacher, {steps} steps" if steps else ARMS.get(arm, arm)


def calls(rows: Sequence[Row], arm: str) -> str:
    """ "100 calls" of an arm, where the table knows."""
    n = next((number(row, "nfe") for row in rows if row["arm"] == arm), None)
    return "" if n is None else f"{n:g} calls"


def headline(rows: Sequence[Row], has_stage_2: bool) -> Headline:
    """The result in one sentence, from the table alone and with no more than it bears out."""
    by_arm = {str(row["arm"]): row for row in rows}
    arms = list(by_arm)
    student = by_arm.get(health.student_of(arms), {})
    teacher = by_arm.get(health.teacher_of(arms), {})
    few, many = number(student, "nfe"), number(teacher, "nfe")
    if few is None or many is None or few <= 0:
        return Headline(
            "No result yet",
            "This run has no figures for both student and teacher to set against each other.",
        )
    title = f"From {many:g} network calls to {few:g}"
    start = f"The student draws a picture in {few:g} network calls where its teacher takes {many:g}"
    old, new = number(teacher, "kid"), number(student, "kid")
    if old is None or new is None:
        return Headline(title, f"{start}; how good its pictures are was not measured.")
    against = f"{figure(new)} against {figure(old)}"
    times = f", {new / old:.2f} times the teacher's" if old > 0 and new > 0 else ""
    differ = apart(student, teacher, "kid")
    if new == old:
        result = f"{start}, at the same KID of {figure(new)}."
    elif differ is False:
        same = "cannot be told from the teacher's"
        result = f"{start}, and its KID {same}: {against}{times}, with intervals that overlap."
    elif new < old:
        result = f"{start}, and its KID is better: {against}{times}."
    else:
        result = f"{start}, but its KID is worse: {against}{times}."
    return Headline(title, result, proportion(by_arm, student, has_stage_2))


def proportion(by_arm: Mapping[str, Row], student: Row, has_stage_2: bool) -> str:
    """What the result is to be held against: the hurried teacher, the student before stage 2."""
    said = []
    hurried = min((a for a in by_arm if health.steps_of(a)), key=health.steps_of)
    quick, new = number(by_arm[hurried], "kid"), number(student, "kid")
    if hurried != health.teacher_of(list(by_arm)) and quick is not None and new is not None:
        no_worse = ", which is no worse: distillation has not paid off here" if quick <= new else ""
        steps = f"The teacher itself, hurried through {health.steps_of(hurried)} steps,"
        said.append(f"{steps} has a KID of {figure(quick)}{no_worse}.")
    before = by_arm.get("student-stage1", {})
    after = by_arm.get(health.refined(list(by_arm)) or "", {})
    changes = [
        f"the {name} by {figure(change, '+')}"
        for name, key in (("reward", "reward"), ("held-out reward", "held_out_reward"))
        if (change := health.change(before, after, key)) is not None
    ]
    if changes:
        said.append(f"Stage 2 changed {' and '.join(changes)}.")
    elif not has_stage_2:
        said.append("This is the student after stage 1; there was no stage 2.")
    return " ".join(said)


def grid(run: Run) -> tuple[list[tuple[str, list[str]]], int]:
    """([(prompt, a data URI an arm)], prompts left out), as many rows as PICTURES allows."""
    rows: list[tuple[str, list[str]]] = []
    spent = 0
    for i, prompt in enumerate(run.prompts if run.arms else []):
        images = [data_uri(run.picture(arm, i)) for arm in run.arms]
        spent += sum(map(len, images))
        if spent > PICTURES:
            return rows, len(run.prompts) - i
        rows.append((shortened(prompt, LONGEST["prompt"]), images))
    return rows, 0


def data_uri(picture: np.ndarray | None) -> str:
    """The picture as it is where it is small, else a thumbnail; "" for none."""
    if picture is None:
        return ""
    image, out = picture_of(picture), io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(out, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(out, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def table(rows: Sequence[Row]) -> list[tuple[Metric | None, str, list[Cell]]]:
    """(metric, its name, a cell an arm) for every figure in the rows, also those we do not know."""
    known = {metric.key: metric for metric in METRICS}
    others = dict.fromkeys(key for row in rows for key in row if number(row, key) is not None)
    keys = [*known, *(key for key in others if key not in known)]
    by_arm = list({str(row["arm"]): row for row in rows}.values())
    lines = []
    for key in keys:
        if any(number(row, key) is not None for row in by_arm):
            metric = known.get(key)
            lines.append((metric, metric.name if metric else key, cells(by_arm, key, metric)))
    return lines


def cells(rows: Sequence[Row], key: str, metric: Metric | None) -> list[Cell]:
    values = [number(row, key) for row in rows]
    measured = [v for v in values if v is not None]
    best = None
    if metric and len(set(measured)) > 1:
        best = min(measured) if metric.better == "lower" else max(measured)
    places = decimals(measured)
    winners = [row for row, value in zip(rows, values, strict=True) if value == best]
    made = []
    for row, value in zip(rows, values, strict=True):
        ends = interval(row, key)
        between = " to ".join(printed(end, places) for end in ends) if ends else ""
        text = DASH if value is None else printed(value, places)
        mark: Literal["", "best", "tied"] = ""
        if best is not None and value is not None:
            tied = any(apart(row, winner, key) is False for winner in winners)
            mark = "best" if value == best else "tied" if tied else ""
        made.append(Cell(text, between, mark))
    return made


def printed(value: float, places: int) -> str:
    return f"{value:,.{places}f}".replace("-", MINUS)


def decimals(values: Sequence[float]) -> int:
    """As many as give the smallest value two digits and the largest three or more; 0 for counts."""
    if all(v == int(v) for v in values):
        return 0
    sizes = [abs(v) for v in values if v]
    wanted = max(1 - math.floor(math.log10(min(sizes))), 2 - math.floor(math.log10(max(sizes))))
    return min(max(wanted, 0), 5)


def figure(value: float, sign: Literal["", "+"] = "") -> str:
    return f"{value:{sign}.3g}".replace("-", MINUS)


def judged(run: Run) -> list[Verdict]:
    """The run's own verdicts, and of what it did not judge those that its files allow."""
    recorded = {
        str(v.get("name")): v for v in run.health if v.get("verdict") in ("ok", "warn", "bad")
    }
    computed = {v.name: v for v in health.verdicts(run.log, run.rows, run.pictures)}
    return [
        Verdict(
            name,
            recorded[name]["verdict"],
            number(recorded[name], "value"),
            number(recorded[name], "limit"),
            str(recorded[name].get("says", "")),
        )
        if name in recorded
        else computed[name]
        for name in dict.fromkeys([*health.NAMES, *recorded])
    ]


def percent(verdict: Verdict) -> tuple[str, str]:
    """(value, limit) as the page prints them."""
    value, limit = ("" if v is None else f"{v:.0%}" for v in (verdict.value, verdict.limit))
    return value.replace("-0%", "0%"), limit


def parts(timing: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(part, milliseconds, share), "everything else" last."""
    total = sum(timing.values())
    if total <= 0:
        return []
    ordered = sorted(timing, key=lambda part: (part == "everything else", -timing[part]))
    return [(part, timing[part], max(0.0, timing[part] / total)) for part in ordered]


def updates(run: Run) -> str:
    """How far the run got, in iterations, generator updates and images."""
    if not run.log:
        return ""
    last = {
        key: number(r, key) for r in run.log for key in ("generator_updates", "images") if key in r
    }
    said = [f"{run.log[-1]['x'] - run.log[0]['x'] + 1:,} iterations"]
    if last.get("generator_updates") is not None:
        said.append(f"{last['generator_updates']:,.0f} generator updates")
    if last.get("images") is not None:
        said.append(f"{last['images']:,.0f} images")
    return ", ".join(said)


def plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and values as text."""
    return [(str(k), v if isinstance(v, str) else repr(v)) for k, v in values.items()]


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
