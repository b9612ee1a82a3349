"""Faults injected for real, time after time, and what else a run that is trusted has to show:
docs/evidence/reliability.json, and of all evidence docs/reliability.md.

    OMP_NUM_THREADS=1 python benchmarks/reliability.py [--times 10] [--kills 200] [--only PART]

The faults are those of the tests with the mark `fault`: its name, and how it is injected. Where the
test passes it was survived, and the test tells what was lost, as it counted. The moments differ
from try to try. Then the kills of tests/kills.py, the memory of sharded runs, and what all this
costs. What --only leaves out is as it was measured before; --table-only writes the page alone.
"""

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from flashdmd.files import write_text
from flashdmd.session import versions

ROOT = Path(__file__).parents[1]
TESTS, EVIDENCE, PAGE = ROOT / "tests", ROOT / "docs/evidence", ROOT / "docs/reliability.md"
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/reliability.py"
PARTS = ("faults", "kills", "sharded", "overhead")
LONGEST = 1200  # seconds that a try may take
TOLD = 600  # characters of a failure that are kept


class Fault(NamedTuple):
    name: str
    how: str


@dataclass
class Row:
    """What came of one fault, injected in one way."""

    fault: str
    how: str
    tests: list[str] = field(default_factory=list)
    tried: int = 0
    survived: int = 0
    skipped: int = 0  # it cannot be injected here
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)  # of what: least, most
    failures: list[str] = field(default_factory=list)


@dataclass
class Figure:
    """What tests measured: the least and the most."""

    name: str
    unit: str
    least: float
    most: float
    tests: list[str] = field(default_factory=list)


# which tests inject what, as they are written ----------------------------------------------------


def of_mark(node: ast.AST) -> Fault | None:
    """The fault of `pytest.mark.fault(name, how)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        words = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if node.func.attr == "fault":
            return Fault(*words)
    return None


def tests_in(path: Path) -> Iterator[tuple[ast.FunctionDef, list[Fault]]]:
    """The tests of a file and their faults, also by marks that have names of their own."""
    module = ast.parse(path.read_text("utf-8"))
    named = {
        target.id: fault
        for node in module.body
        if isinstance(node, ast.Assign) and (fault := of_mark(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for test in module.body:
        if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
            continue
        nodes = [node for mark in test.decorator_list for node in ast.walk(mark)]
        by_name = (named.get(n.id) for n in nodes if isinstance(n, ast.Name))
        found = (*map(of_mark, nodes), *by_name)
        yield test, sorted({fault for fault in found if fault})


def called(path: Path, test: str) -> str:
    return f"{path.name}::{test}"


def faults() -> dict[str, list[Fault]]:
    """By the test that injects them."""
    files = sorted(TESTS.glob("test_*.py"))
    return {called(p, test.name): own for p in files for test, own in tests_in(p) if own}


def measuring() -> set[str]:
    """Tests that measure figures."""
    return {
        called(path, test.name)
        for path in sorted(TESTS.glob("test_*.py"))
        for test, _ in tests_in(path)
        if "figure" in [argument.arg for argument in test.args.args]
    }


# trying them ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A test of one try: what it recorded, what became of it."""

    test: str
    told: list[tuple[str, list[Any]]]
    skipped: bool
    failure: str | None


def attempt(number: int, files: Sequence[str], which: str) -> list[Case]:
    """One try of all tests with a mark; none if it had to be ended."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.xml"
        words = ["-q", "-m", which, "-n", "2", "--dist", "loadfile", f"--junit-xml={outcomes}"]
        env = os.environ | {"FLASHDMD_TRY": str(number), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", *words, *(f"tests/{name}" for name in files)]
        with subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        return cases(outcomes) if outcomes.exists() else []


def cases(outcomes: Path) -> list[Case]:
    found = []
    for case in ElementTree.parse(outcomes).getroot().iter("testcase"):
        file = case.attrib["classname"].rpartition(".")[2]
        told = [(p.attrib["name"], json.loads(p.attrib["value"])) for p in case.iter("property")]
        wrong = [one for kind in ("failure", "error") for one in case.iter(kind)]
        failure = wrong[0].attrib.get("message", "") if wrong else None
        name = f"{file}.py::{case.attrib['name'].partition('[')[0]}"
        found.append(Case(name, told, case.find("skipped") is not None, failure))
    return found


def count(rows: dict[Fault, Row], figures: dict[str, Figure], case: Case) -> None:
    """Adds a case to what it is of."""
    for row in (rows[Fault(*value)] for key, value in case.told if key == "fault"):
        if case.skipped:
            row.skipped += 1
            continue
        row.tried += 1
        row.survived += case.failure is None
        row.failures += [f"{case.test}: {case.failure}"[:TOLD]] if case.failure is not None else []
        for number, of in (value for key, value in case.told if key == "lost"):
            least, most = row.lost.get(of, (number, number))
            row.lost[of] = (min(least, number), max(most, number))
    for name, value, unit in (value for key, value in case.told if key == "figure"):
        figure = figures.setdefault(name, Figure(name, unit, value, value))
        figure.least, figure.most = min(figure.least, value), max(figure.most, value)
        figure.tests = sorted({*figure.tests, case.test})


def all_tries(times: int) -> dict[str, Any]:
    rows: dict[Fault, Row] = {}
    figures: dict[str, Figure] = {}
    injected = faults()
    for test, own in injected.items():
        for fault in own:
            rows.setdefault(fault, Row(*fault)).tests.append(test)
    for number in range(times):
        started = time.monotonic()
        first = number == 0  # figures that need no repetition
        asked = {*injected, *measuring()} if first else injected.keys()
        files = sorted({test.partition("::")[0] for test in asked})
        done = attempt(number, files, "fault or figure" if first else "fault")
        missing = injected.keys() - {case.test for case in done}
        silent = [
            Case(test, [("fault", list(fault)) for fault in injected[test]], False, "no result")
            for test in sorted(missing)
        ]
        for case in (*done, *silent):
            count(rows, figures, case)
        failed = [case.test for case in (*done, *silent) if case.failure is not None]
        seconds = time.monotonic() - started
        say(f"try {number + 1} of {times}: {len(failed)} not survived {failed}, {seconds:.0f} s")
    return {
        "times": times,
        "rows": [asdict(rows[fault]) for fault in sorted(rows)],
        "figures": [asdict(figures[name]) for name in sorted(figures)],
        "versions": versions(),
    }


def say(words: str) -> None:
    print(words, flush=True)


# the page ---------------------------------------------------------------------------------------

TOP = f"""# Reliability

What was done to runs on purpose, how often, and what it cost. Made, not written, by
`{COMMAND}`.

Survived is: the run goes on by itself, or ends with the documented code ([runs](runs.md)) and a
message that names what is wrong, and the same command goes on from what was saved. Lost is what the
tests counted: iterations that were logged and have to be made again, files that are gone or not as
they were. Most rows are whole runs of real pipelines at tiny size that save after every generator
update; damaged checkpoints, single losses, killed workers and caches are tried on the code that has
to do with them. What ends a run without warning costs what came after its newest checkpoint: here
an update, at the default of `train.checkpointing_steps` up to 100.
"""

NOT_COVERED = """## Not covered

- One machine with two cores: processes speak gloo over its loopback. No GPU, no NCCL, no network
  that is cut in two, no machine that goes while others stay, no folder on another machine.
- No bucket mounted as a folder was tried, such as the one in `launch/skypilot.yaml`. A run appends
  to logs, renames folders, flushes and locks, and counts on a file system that does so.
- No power was cut. That files and names are flushed before they count is tested; that a disk keeps
  what it says it has is believed.
- A bit that flips in memory before it is written is written, with the right hash. One that flips in
  a file is found.
- A manifest that somebody forges with the right hashes of other weights is believed.
- A process that hangs and does not die: others wait for it FLASHDMD_TIMEOUT_MINUTES.
- The memory of a GPU was not exhausted, and a system that takes memory back kills, as SIGKILL does.
- Bitwise is on a processor, with the same versions and number of threads. A GPU may add up in
  another order.
"""


def page(evidence: dict[str, dict[str, Any] | None]) -> str:
    """docs/reliability.md, of what is in docs/evidence; what is absent is said to be."""
    measured, kills = evidence["reliability"], evidence["kills"]
    rows = [*fault_rows(measured), *kill_rows(kills)]
    absent = ", ".join(name for name, told in evidence.items() if told is None)
    return "\n".join(
        [
            TOP,
            *(
                [f"Every test was run {so_often(measured)}. {of_versions(measured)}"]
                if measured
                else []
            ),
            *([f"Not measured yet: {absent}.\n"] if absent else []),
            table(("fault", "how it was injected", "tried", "survived", "lost"), sorted(rows)),
            "## Figures\n",
            table(("figure", "measured"), figure_rows(evidence)),
            *other_versions(evidence),
            NOT_COVERED,
            "## Again\n",
            f"    {COMMAND}",
            f"    {COMMAND} --only faults\n",
            "All takes up to an hour on two idle cores. `--only` faults, kills, sharded or "
            "overhead leaves the\nothers as they were; `--table-only` writes this page of the "
            "evidence that is there.\n",
            "What failed is in `evidence/reliability.json`, with its message. A test with the mark "
            "`fault` is\na row; one with the fixture `figure` a figure.\n",
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    assert not any("|" in cell for line in lines for cell in line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def fault_rows(measured: dict[str, Any] | None) -> list[tuple[str, ...]]:
    rows = [Row(**told) for told in measured["rows"]] if measured else []
    return [
        (row.fault, row.how, str(row.tried), str(row.survived), losses(row))
        if row.tried
        else (row.fault, row.how, "0", "-", "cannot be injected where this was made")
        for row in rows
    ]


def losses(row: Row) -> str:
    return "; ".join(f"{of}: {span(*most)}" for of, most in sorted(row.lost.items()))


def span(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def kill_rows(kills: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """Those while something was written, and the others."""
    if kills is None:
        return []
    counted = ("kills", "survived", "most_lost")
    everything, writing = kills, {
        "kills": kills["while_writing"],
        "survived": kills["survived_while_writing"],
        "most_lost": kills["most_lost_while_writing"],
    }  # fmt: skip
    other = {key: everything[key] - writing[key] for key in counted[:2]}
    other["most_lost"] = everything["most_lost"]
    how = f"{len(kills['by_kind'])} kinds of run, both stages; bitwise as if never killed"
    return [
        (
            f"stop: SIGKILL {when}",
            how,
            str(one["kills"]),
            str(one["survived"]),
            f"iterations: {span(0, one['most_lost'])}",
        )
        for when, one in (
            ("at a random moment", other),
            ("while a checkpoint or a student is written", writing),
        )
    ]


def figure_rows(evidence: dict[str, dict[str, Any] | None]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if kills := evidence["kills"]:
        cost = kills["cost"]
        megabytes = cost["checkpoint_bytes"] / 1e6
        rows += [
            (
                "kills after which the run ended bit for bit as one that was not killed",
                f"{kills['survived']} of {kills['kills']}, in {kills['runs']} runs",
            ),
            (
                f"embedded default: to save a checkpoint ({megabytes:.0f} MB)",
                f"{cost['seconds_to_save']:.2f} s",
            ),
            ("embedded default: to resume, from the start of the command's work",
             f"{cost['seconds_to_resume']:.2f} s"),
            (
                f"saving every {cost['checkpointing_steps']} generator updates, of all time",
                f"{cost['share_of_training']:.2%}",
            ),
        ]  # fmt: skip
    if measured := evidence["reliability"]:
        figures = [Figure(**told) for told in measured["figures"]]
        rows += [(f.name, f"{f.most:.2g} {f.unit}".rstrip() + at_most(f)) for f in figures]
    if sharded := evidence["sharded"]:
        stages = {name: told for name, told in sharded.items() if name.startswith("stage ")}
        rows += [
            (
                f"sharded over two processes, {name}: peak memory of one, of what it is in one "
                f"process ({sharded['parameters'] / 1e6:.0f} M parameters)",
                f"{told['ratio']:.2f} ({' and '.join(f'{mib:.0f}' for mib in told['rank_mib'])} of "
                f"{told['whole_mib']:.0f} MiB); {told['ratio_above_baseline']:.2f} above what a "
                "process holds after its imports",
            )
            for name, told in stages.items()
        ]
    if overhead := evidence["overhead"]:
        low, high = overhead["ci95"]
        rows.append(
            (
                "embedded default: an iteration with all of it on, of one with it off",
                f"{overhead['ratio']:.3f} (95 %: {low:.3f} to {high:.3f}; "
                f"{overhead['on_ms']:.0f} and {overhead['off_ms']:.0f} ms)",
            )
        )
    return rows


def at_most(figure: Figure) -> str:
    return " at most" if figure.least != figure.most else ""


def so_often(measured: dict[str, Any]) -> str:
    times = measured["times"]
    return f"{times} times; one that takes several values is as many tries" if times > 1 else "once"


def of_versions(told: dict[str, Any]) -> str:
    return f"Versions: {', '.join(f'{name} {v}' for name, v in told['versions'].items())}.\n"


def other_versions(evidence: dict[str, dict[str, Any] | None]) -> list[str]:
    """What was measured with others than the faults."""
    newest = evidence["reliability"]
    return [
        f"`evidence/{name}.json` is of other ones. {of_versions(told)}"
        for name, told in evidence.items()
        if newest and told and told.get("versions", newest["versions"]) != newest["versions"]
    ]


def evidence_here() -> dict[str, dict[str, Any] | None]:
    names = ("reliability", "kills", "sharded", "overhead")
    paths = {name: EVIDENCE / f"{name}.json" for name in names}
    return {n: json.loads(p.read_text("utf-8")) if p.is_file() else None for n, p in paths.items()}


def other_benchmark(name: str, *words: str) -> None:
    """One that writes its own evidence; when it fails, what was measured before stays."""
    script, started = ROOT / "benchmarks" / f"{name}.py", time.monotonic()
    if not script.is_file():
        say(f"{name}: there is no {script.relative_to(ROOT)}")
        return
    code = subprocess.run([sys.executable, str(script), *words], cwd=ROOT, check=False).returncode
    say(f"{name}: code {code}, {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=10, help="tries of every fault")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given again")
    parser.add_argument("--table-only", action="store_true", help="nothing is measured")
    asked = parser.parse_args()
    started, parts = time.monotonic(), () if asked.table_only else asked.only or PARTS
    if "faults" in parts:
        told = json.dumps(all_tries(asked.times), indent=2)
        write_text(EVIDENCE / "reliability.json", told + "\n")
    if "kills" in parts:
        other_benchmark("kills", "--kills", str(asked.kills))
    for name in ("sharded", "overhead"):
        if name in parts:
            other_benchmark(name)
    write_text(PAGE, page(evidence_here()))
    say(f"Wrote {PAGE.relative_to(ROOT)}, {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
