"""docs/reliability.md is what benchmarks/reliability.py makes of what tests with faults told."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reliability() -> Any:
    """The benchmark, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "benchmarks/reliability.py")
    assert spec
    assert spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses ask
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_writer_makes_of_the_evidence(reliability: Any) -> None:
    written = (ROOT / "docs/reliability.md").read_text("utf-8")
    assert written == reliability.page(reliability.evidence_here()), (
        "write it anew: python benchmarks/reliability.py --table-only"
    )


def test_the_evidence_is_of_the_tests_that_there_are(reliability: Any) -> None:
    """Every row of one, and of every test all its rows; each says what was lost."""
    rows = json.loads((ROOT / "docs/evidence/reliability.json").read_text("utf-8"))["rows"]
    told = {(row["fault"], row["how"], test) for row in rows for test in row["tests"]}
    injected = reliability.faults()
    assert told == {(*fault, test) for test, own in injected.items() for fault in own}
    for row in rows:
        assert row["tried"] + row["skipped"] > 0, row["fault"]
        assert row["lost"] or not row["survived"], row["fault"]


def test_every_fault_that_was_asked_for_is_injected(reliability: Any) -> None:
    names = {fault.name for own in reliability.faults().values() for fault in own}
    assert names >= {
        "checkpoint: a damaged or forged manifest", "checkpoint: a file is truncated",
        "checkpoint: of another family", "data: a worker is killed", "data: the folder vanishes",
        "disk: full when a checkpoint is written",
        "disk: full when shares of a checkpoint are written", "disk: read-only",
        "memory: none left",
        "numbers: a loss that is not finite", "processes: one of them dies",
        "processes: two make a cache at once", "stop: SIGINT", "stop: SIGTERM",
        "stop: two runs in one folder",
    }  # fmt: skip


OUTCOMES = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_x[1]"><properties>
<property name="fault" value="[&quot;one&quot;, &quot;so&quot;]"/>
<property name="lost" value="[2, &quot;files&quot;]"/>
<property name="figure" value="[&quot;wait&quot;, 1.5, &quot;s&quot;]"/></properties></testcase>
<testcase classname="tests.test_a" name="test_x[2]"><properties>
<property name="fault" value="[&quot;one&quot;, &quot;so&quot;]"/>
<property name="lost" value="[0, &quot;files&quot;]"/>
<property name="figure" value="[&quot;wait&quot;, 0.5, &quot;s&quot;]"/></properties></testcase>
<testcase classname="tests.test_a" name="test_x[3]"><properties>
<property name="fault" value="[&quot;one&quot;, &quot;so&quot;]"/></properties>
<failure message="it hung">at line 3</failure></testcase>
<testcase classname="tests.test_a" name="test_y"><properties>
<property name="fault" value="[&quot;other&quot;, &quot;so&quot;]"/></properties>
<skipped message="no mount"/></testcase>
</testsuite></testsuites>"""


def test_a_failure_counts_as_not_survived_and_what_was_lost_as_a_span(
    reliability: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outcomes.xml").write_text(OUTCOMES)
    found = reliability.cases(tmp_path / "outcomes.xml")
    one, other = reliability.Fault("one", "so"), reliability.Fault("other", "so")
    tests = {"test_a.py::test_x": [one], "test_a.py::test_y": [other]}
    monkeypatch.setattr(reliability, "faults", lambda: tests)
    tries = iter([found, []])  # the second had to be ended
    monkeypatch.setattr(reliability, "attempt", lambda *_: next(tries))
    told = reliability.all_tries(2)
    first, second = told["rows"]
    assert (first["tried"], first["survived"], first["lost"]) == (4, 2, {"files": (0, 2)})
    assert first["failures"] == ["test_a.py::test_x: it hung", "test_a.py::test_x: no result"]
    assert (second["tried"], second["skipped"], second["survived"]) == (1, 1, 0)
    (figure,) = told["figures"]
    assert (figure["name"], figure["least"], figure["most"]) == ("wait", 0.5, 1.5)
    nothing = dict.fromkeys(("kills", "sharded", "overhead"))
    page = reliability.page({"reliability": json.loads(json.dumps(told)), **nothing})
    assert "| one | so | 4 | 2 | files: 0 to 2 |" in page
    assert "| wait | 1.5 s at most |" in page
    assert "Not measured yet: kills, sharded, overhead." in page


def test_figures_of_the_other_benchmarks_are_shown_as_they_write_them(reliability: Any) -> None:
    """The keys are those of benchmarks/sharded.py and benchmarks/overhead.py."""
    stage = {"whole_mib": 2000.0, "rank_mib": [1100.0, 1090.0], "ratio": 0.55}
    sharded = {
        "made_by": "python benchmarks/sharded.py", "parameters": 158_000_000, "baseline_mib": 400,
        "versions": {"torch": "0"}, "stage 1": stage | {"ratio_above_baseline": 0.44},
    }  # fmt: skip
    overhead = {"on_ms": 101.4, "off_ms": 100.2, "ratio": 1.012, "ci95": [1.001, 1.023]}
    newest = {"times": 2, "rows": [], "figures": [], "versions": {"torch": "1"}}
    page = reliability.page(
        {"reliability": newest, "kills": None, "sharded": sharded, "overhead": overhead}
    )
    assert "stage 1: peak memory of one, of what it is in one process (158 M parameters) |" in page
    assert "| 0.55 (1100 and 1090 of 2000 MiB); 0.44 above what" in page
    assert "| 1.012 (95 %: 1.001 to 1.023; 101 and 100 ms) |" in page
    assert "`evidence/sharded.json` is of other ones. Versions: torch 0." in page
    assert "overhead.json` is of other" not in page  # it names none
    assert "Not measured yet: kills.\n" in page
