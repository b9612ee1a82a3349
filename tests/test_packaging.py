"""What is installed: pinned, without the libraries that pull gigabytes, and all of it declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [
    line.split(";")[0].strip()
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]
NAMES = {"PIL": "pillow", "yaml": "pyyaml"}  # imported as, distributed as
MEGABYTES = 60


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_everything_and_pulls_no_gigabytes() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9.!+]+", line) for line in LOCK)
    names = {canonical(line.split("==")[0]) for line in LOCK}
    assert not {n for n in names if n.startswith(("nvidia", "triton", "torchvision", "timm"))}
    assert "torch==2.13.0" in LOCK


def test_the_lock_holds_every_declared_dependency() -> None:
    names = {canonical(line.split("==")[0]) for line in LOCK}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    declared = {canonical(re.split(r"[<>=\[; ]", d)[0]) for d in wanted}
    assert declared <= names


def test_every_import_is_declared() -> None:
    extras = [d for group in PROJECT["optional-dependencies"].values() for d in group]
    declared = {canonical(re.split(r"[<>=\[; ]", d)[0]) for d in PROJECT["dependencies"] + extras}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in (n.partition(".")[0] for n in names):
                if name == "flashdmd" or name in sys.stdlib_module_names:
                    continue
                if name == "pydantic_core":
                    name = "pydantic"
                assert canonical(NAMES.get(name, name)) in declared, (path, name)


def test_weights_and_data_stay_small() -> None:
    assets = ROOT / "src/flashdmd/emoji/assets"
    assert sum(p.stat().st_size for p in assets.rglob("*") if p.is_file()) < MEGABYTES * 1e6


def test_nothing_in_the_tree_names_a_machine() -> None:
    text = re.compile(
        r"(?<![\w.])/(?:home|root|Users|work)/|https?://[^\s\"')]*(?:pypi|npmjs)\.(?:org|com)"
    )
    for folder in ("src", "tests", "docs", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".yaml", ".html", ".json"} and path != Path(__file__):
                assert not text.search(path.read_text()), path
