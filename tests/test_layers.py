"""The layers of the design, checked on the source: no import reaches up; the core is torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/flashdmd"
LAYERS: list[set[str]] = [  # a module may import what stands in its own line or above
    {"__init__", "errors", "files", "plain", "seeds", "schedule", "losses", "draws"},
    {"sampler", "discriminator", "reward", "stopwatch", "memory", "augment", "distributed"},
    {"algorithm", "baselines"},
    {"optimizers"},
    {"config", "sections", "rules", "checkpoint", "data", "cache", "models", "emoji", "evaluate"},
    {"trainer", "preferences", "reference"},
    {"batches", "export", "report", "drawing", "reward_fit", "notfinite"},
    {"loading", "sources"},
    {"beforehand"},
    {"session", "resuming", "best", "initial", "publish", "doctor"},
    {"run", "replay"},
    {"compare"},
    {"cli", "cli_emoji", "__main__"},
]
CORE = (
    "schedule",
    "losses",
    "sampler",
    "algorithm",
    "baselines",
    "discriminator",
    "reward",
    "augment",
    "draws",
)
MAY_USE = {
    "diffusers": {"models", "emoji"},
    "transformers": {"models", "emoji"},
    "peft": {"models"},
}


def layer(module: str) -> int:
    for depth, names in enumerate(LAYERS):
        if module in names:
            return depth
    raise AssertionError(f"flashdmd.{module} has no layer: give it a place in LAYERS")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            dotted = [f"{node.module}.{a.name}" for a in node.names]
            found += dotted if node.module == "flashdmd" else [node.module]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names]
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(path):
        if name.startswith("flashdmd."):
            there = name.split(".")[1]
            assert layer(there) <= layer(here), f"{here} may not import flashdmd.{there}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_big_libraries_are_imported_where_they_belong(path: Path) -> None:
    here = path.relative_to(SOURCE)
    for name in imports(path):
        allowed = MAY_USE.get(name.partition(".")[0])
        assert allowed is None or str(here) in allowed or here.parts[0] in allowed, (here, name)


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_needs_torch_alone() -> None:
    run(
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'pydantic', 'PIL', 'numpy.random._x'):\n"
        "    sys.modules[name] = None\n" + "\n".join(f"import flashdmd.{m}" for m in CORE)
    )


def test_help_is_quick_because_it_imports_little() -> None:
    run(
        "import sys\nimport flashdmd.cli\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_files_and_functions_are_short() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)
