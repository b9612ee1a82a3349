"""Thousands of examples of every property of tests/test_fuzz_*.py: docs/evidence/fuzz.json.

    python benchmarks/fuzz.py [--examples 2000] [--slow 300]

`drawn` are calls that were made with what was drawn, `refused` those that ended in a UserError
(exit code 2); the others read what was there. What is none of these two is a failure. "found and
mended" is what the properties and their writing found.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs/evidence/fuzz.json"
SLOW = ("configurations", "teachers_lora", "a_reward", "embedded_kind")  # they load pipelines
FOUND = {
    "recipes": [
        "aliases that unfold to gigabytes; tags: AttributeError (!!timestamp x), KeyError",
        "a recipe without end (/dev/zero), or an empty one that was taken for the default",
        "true, '1' and yes taken for numbers and truths; 010 read as eight, 12:30 as 750",
        "a NUL or half a surrogate pair in a path",
    ],
    "patterns of tars": ["{0..999999999}, {0..999}{0..999}{0..999}: no end; a NUL: ValueError"],
    "checkpoints": ["state.json nested without end: RecursionError; a list taken for an object"],
    "prompts": ["a NUL in a prompt (UTF-16 without a mark)"],
    "pictures": [
        "a name that is no text: UnicodeEncodeError; one with line breaks, in messages",
        "a kept check nested without end: RecursionError; one damaged in its digits was believed",
    ],
    "header": ["a header that is cut off, is no JSON or lies: JSONDecodeError, MemoryError"],
    "published": ["values that are no weights, keys that are no names: TypeError, RuntimeError"],
    "notes": [
        "Infinity for a number: OverflowError; 3.7 read as 3, true as 1; nesting without end",
        "a teacher with an unknown key: TypeError",
    ],
    "configurations": [
        "a component's file that holds a list or a number: TypeError",
        "null for a backbone's statistics or configuration: TypeError",
        "sizes of 0, of 2^31, of no type: ZeroDivisionError, RuntimeError, the libraries' own",
        "2^31 layers: building them never ends",
    ],
}


def run(words: list[str], examples: int) -> tuple[dict[str, Any], list[Counter[str]]]:
    """Properties by pytest's `words`: how each went; calls drawn and refused, area by area."""
    with tempfile.TemporaryDirectory() as folder:
        counts, outcomes = Path(folder) / "counts.json", Path(folder) / "outcomes.xml"
        env = {"FLASHDMD_FUZZ": str(examples), "FLASHDMD_FUZZ_COUNTS": str(counts)}
        only = ["-m", "hypothesis", f"--junitxml={outcomes}"]  # tests that draw
        command = [sys.executable, "-m", "pytest", "-q", *only, *words]
        subprocess.run(command, cwd=ROOT, env=os.environ | env, check=False)
        cases = ElementTree.parse(outcomes).getroot().iter("testcase")
        rows = {
            case.attrib["name"].removeprefix("test_"): {
                "examples": examples,
                "held": not len(case),  # a failure or an error stands in it
                "seconds": round(float(case.attrib["time"]), 1),
            }
            for case in cases
        }
        return rows, [Counter(part) for part in json.loads(counts.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--slow", type=int, default=300, help="of those that load pipelines")
    asked = parser.parse_args()
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_fuzz_*.py"))
    slow = " or ".join(SLOW)
    rows, (drawn, refused) = run([*files, "-k", f"not ({slow})"], asked.examples)
    more, (also_drawn, also_refused) = run([*files, "-k", slow], asked.slow)
    rows, drawn, refused = rows | more, drawn + also_drawn, refused + also_refused
    told = {
        "examples": sum(row["examples"] for row in rows.values()),
        "failures": sum(not row["held"] for row in rows.values()),
        "areas": {a: {"drawn": drawn[a], "refused": refused[a]} for a in sorted(drawn)},
        "found and mended": FOUND,
        "properties": rows,
    }
    OUTPUT.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
