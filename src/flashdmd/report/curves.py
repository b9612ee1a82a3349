"""Curves of a run as inline SVG that takes its colours and its font from the page."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flashdmd.report.run import Record, stage_of

WIDTH, HEIGHT = 3.4, 1.75  # inches of 72 units: the text is as large as the page's small print
POINTS = 240  # drawn of a curve; each is the mean of a bin
SMOOTH = 15  # points that the strong line averages, over a faint line of all
COLOURS = {  # what matplotlib draws with -> the page's custom properties
    "#010101": "var(--muted)",
    "#020202": "var(--rule)",
    "#030303": "var(--series-1)",
    "#040404": "var(--series-2)",
    "#050505": "var(--series-3)",
}
TEXT, RULE, *SERIES = COLOURS


@dataclass(frozen=True)
class Panel:
    """Some keys of metrics.jsonl in one plot, and what a sound run shows there."""

    title: str
    series: tuple[tuple[str, str], ...]  # (key, label)
    expect: str
    log_scale: bool = False
    level: float | None = None  # a dashed line
    level_says: str = ""


PANELS = (
    Panel(
        "Generator: gradient norm by term",
        (
            ("generator/grad_norm_matching", "matching"),
            ("generator/grad_norm_adversarial", "adversarial"),
        ),
        "Falls or stays level. Matching leads; a jump by ten is a run about to burn.",
        log_scale=True,
    ),
    Panel(
        "Gradient norm by network",
        (
            ("generator/grad_norm", "generator"),
            ("score/grad_norm", "score estimator"),
            ("discriminator/grad_norm", "discriminator"),
        ),
        "Before clipping. Level, with single spikes.",
        log_scale=True,
    ),
    Panel(
        "Score estimator: diffusion loss",
        (("diffusion", "diffusion"),),
        "Noisy by nature, level in the mean. A lasting rise is score lag.",
    ),
    Panel(
        "Discriminator: hinge loss",
        (("hinge", "hinge"),),
        "Knowing nothing, it stands at the dashed 2; at 0 it has stopped learning.",
        level=2.0,
        level_says="2",
    ),
    Panel(
        "Discriminator: mean logits",
        (("discriminator/real", "real"), ("discriminator/fake", "generated")),
        "Apart, but within -1 and 1: beyond that the hinge has no gradient.",
    ),
    Panel(
        "Generator: loss terms",
        (("matching", "matching"), ("adversarial", "adversarial")),
        "The value of matching only carries a gradient and may go anywhere.",
    ),
    Panel(
        "Preference loss",
        (("preference", "preference"),),
        "Starts at the dashed ln 2 and falls a little; near 0 the student has left its reference.",
        level=math.log(2),
        level_says="ln 2",
    ),
    Panel(
        "Reward of the candidates",
        (("reward/best", "best of K"), ("reward/worst", "worst of K")),
        "Both rise together. A gap that closes leaves nothing to prefer.",
    ),
    Panel(
        "Latents of the student",
        (("latent/std", "standard deviation"),),
        "Level. A rising spread is saturation to come; a falling one, washed-out colours; waves, "
        "oscillation.",
    ),
)


@dataclass(frozen=True)
class Curve:
    """A drawn panel: `svg` is safe to put into a page as it is."""

    title: str
    labels: tuple[str, ...]  # in the order of the page's --series-1, -2, -3
    expect: str
    svg: str


def curves(log: Sequence[Record]) -> list[Curve]:
    """The panels for which the log has two points or more."""
    joint = next((r["x"] for r in log if stage_of(r) in ("joint", "rl")), None)
    joint = None if joint is None or joint == log[0]["x"] else float(joint)
    drawn: list[Curve] = []
    for panel in PANELS:
        lines = [(label, *points(log, key)) for key, label in panel.series]
        lines = [(label, x, y) for label, x, y in lines if np.isfinite(y).sum() > 1]
        if lines:
            svg = draw(panel, [(x, y) for _, x, y in lines], joint, prefix=f"c{len(drawn)}")
            drawn.append(Curve(panel.title, tuple(line[0] for line in lines), panel.expect, svg))
    return drawn


def points(log: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a key, as means of at most POINTS bins of equally many records."""
    found = [(r["x"], r[key]) for r in log if isinstance(r.get(key), int | float)]
    if not found:
        return np.zeros(0), np.zeros(0)
    bins = np.array_split(np.array(found, dtype=float), min(POINTS, len(found)))
    x, y = np.array([b.mean(0) for b in bins]).T
    return x, y


def smooth(y: np.ndarray) -> np.ndarray:
    """A centred running mean that shrinks at both ends."""
    reach = min(SMOOTH, len(y) // 4 + 1) // 2
    total = np.concatenate([[0.0], np.cumsum(y)])
    n = np.arange(len(y))
    low, high = np.maximum(n - reach, 0), np.minimum(n + reach + 1, len(y))
    mean: np.ndarray = (total[high] - total[low]) / (high - low)
    return mean


def draw(
    panel: Panel, lines: Sequence[tuple[np.ndarray, np.ndarray]], joint: float | None, prefix: str
) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flashdmd"}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0.125, 0.13, 0.855, 0.8))
        for (x, y), colour in zip(lines, SERIES, strict=False):
            y = np.where(y > 0, y, np.nan) if panel.log_scale else y
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
            kept = np.isfinite(y)
            axes.plot(x[kept], smooth(y[kept]), color=colour, linewidth=1.5)
        dress(axes, panel, joint)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return themed(out.getvalue(), prefix, panel.title)


def dress(axes: Axes, panel: Panel, joint: float | None) -> None:
    """Axes without a box: rules behind the curves, small print, where stage 2 begins."""
    if panel.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=TEXT)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.margins(x=0.01)
    if panel.level is not None:
        axes.axhline(panel.level, color=TEXT, linewidth=0.8, dashes=(3, 3))
    if joint is not None and joint > axes.get_xlim()[0]:
        axes.axvline(joint, color=TEXT, linewidth=0.8)
        axes.annotate(
            " stage 2",
            (joint, 1),
            xycoords=("data", "axes fraction"),
            color=TEXT,
            fontsize=8,
            va="bottom",
        )


def themed(svg: str, prefix: str, title: str) -> str:
    """Only the <svg> element, in the page's colours and font, with ids of its own."""
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    body = svg[svg.index(">", view.end()) + 1 :]
    for pattern, wanted in (
        (r"<metadata>.*?</metadata>|<style.*?</style>", ""),  # a style would reach the whole page
        (r"font-family: [^;\"]*; ", ""),
        (r' id="(?!p[0-9a-f]{10}")[^"]*"', ""),  # only clip paths are referred to
        (r'(\bid="|url\(#)', rf"\1{prefix}-"),
        (r"\d+\.\d{3,}(?![^<>]*</text>)", lambda m: f"{float(m[0]):.2f}"),
        (r"\s*\n\s*", "\n"),
    ):
        body = re.sub(pattern, wanted, body, flags=re.DOTALL)
    for drawn, wanted in COLOURS.items():
        body = body.replace(drawn, wanted)
    return f'<svg {view[0]} role="img" aria-label="{title}">{body}'
