"""YAML and JSON that people hand in, read as data and nothing else, with an error for the rest."""

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from flashdmd.errors import UserError

LARGEST = 2**20  # bytes of a recipe; what is larger is something else, and would take minutes
Json = dict[str, Any]
Pairs = list[tuple[str, Any]]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core: words, numbers, truths, lists and mappings.

    So `no`, 12:30 and 2024-01-01 are words, 010 is ten, and 1e-5 a number. An alias is refused (a
    few of them make gigabytes), and so are tags and a key that is given twice.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            raise yaml.MarkedYAMLError(
                problem="aliases and tags are not read; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a word", problem_mark=key.start_mark
                )
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice (line {line})"
                )
            seen.add(key.value)
        return yaml.constructor.BaseConstructor.construct_mapping(self, node, deep)

    def construct_yaml_str(self, node: Any) -> str:
        """No path and no prompt has a NUL or half a surrogate pair in it."""
        text = str(node.value)
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
            raise yaml.MarkedYAMLError(
                problem="a text holds a NUL or half a surrogate pair", problem_mark=node.start_mark
            )
        return text

    def construct_yaml_int(self, node: Any) -> int:
        based = node.value[:2] in ("0o", "0x")
        return int(node.value, 0) if based else int(node.value)

    def construct_yaml_float(self, node: Any) -> float | int:
        """1e3 is a whole number, and so may be a count."""
        text = node.value.lower().replace(".inf", "inf").replace(".nan", "nan")
        number = float(text)
        whole = "e" in text and number.is_integer() and abs(number) < 2**53
        return int(number) if whole else number


CORE = {  # YAML 1.2, 10.3.2; what is none of these is a word
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in CORE.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )
for _kind in ("str", "int", "float"):
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}")
    )


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would read as something else, such as 08 and 1e5."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def written(content: Any, **how: Any) -> str:
    """YAML that `parse` reads back as it was; `how` are options of yaml.dump."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **how))


def parse(text: str, where: str) -> Any:
    """One YAML document. Raises UserError that names `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{where} is not YAML: {' '.join(str(e).split())}") from e


def read(path: Path, what: str) -> str:
    """The text of a small file; of a pipe too. Raises UserError, which calls it `what`."""
    try:
        return limited(path, what, LARGEST).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}); save it as UTF-8 text") from e
    except OSError as e:
        raise UserError(f"{what} {path} cannot be read: {e.strerror or e}") from e


def limited(path: Path, what: str, most: int) -> bytes:
    """All bytes of a file. Raises UserError, which calls it `what`, for more than `most`."""
    with path.open("rb") as f:
        raw = f.read(most + 1)
    if len(raw) > most:
        raise UserError(f"{what} {path} is larger than {most} bytes; is it another file?")
    return raw


def regular(path: Path) -> bool:
    """Whether it is a file, through links: no folder, and no pipe or device, which may not end.

    Raises OSError for what is not there.
    """
    return stat.S_ISREG(path.stat().st_mode)


def json_object(text: str | bytes, pairs: Callable[[Pairs], Json] | None = None) -> Json:
    """The object that a JSON text is, each made by `pairs`. Raises ValueError for anything else."""
    try:
        found = json.loads(text, object_pairs_hook=pairs)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} where an object is wanted")
    return found
