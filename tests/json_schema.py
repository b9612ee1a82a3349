"""What of JSON schema (2020-12) a recipe's uses, checked as the specification says."""

from collections.abc import Iterator
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "null": (type(None),), "integer": (int,), "number": (int, float),
}  # fmt: skip
TOLD = {"$schema", "title", "description", "default", "type"}  # looked at apart, or not at all


def is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = isinstance(value, float) and value.is_integer()
    return isinstance(value, KINDS[kind]) or (kind == "integer" and whole)


def errors(schema: Any, value: Any, at: str = "$") -> Iterator[str]:
    """What is wrong with a value, nothing if it is valid. KeyError for a keyword unknown here."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_a(value, kind) for kind in kinds):
        yield f"{at} is no {kinds}"
        return
    for word, said in schema.items():
        if word not in TOLD and not CHECKS[word](schema, said, value):
            yield f"{at} breaks {word}={said}"
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in schema.get("properties", {}):
                yield from errors(schema["properties"][key], inner, f"{at}.{key}")
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        for i, inner in enumerate(value):
            rules = first[i] if i < len(first) else schema.get("items", {})
            yield from errors(rules, inner, f"{at}[{i}]")


def number(compare: Any) -> Any:
    return lambda _, said, value: not is_a(value, "number") or compare(value, said)


def length(kind: type, compare: Any) -> Any:
    return lambda _, said, value: not isinstance(value, kind) or compare(len(value), said)


CHECKS: dict[str, Any] = {
    "anyOf": lambda _, said, value: any(not list(errors(one, value)) for one in said),
    "enum": lambda _, said, value: value in said,
    "minimum": number(lambda a, b: a >= b),
    "maximum": number(lambda a, b: a <= b),
    "exclusiveMinimum": number(lambda a, b: a > b),
    "exclusiveMaximum": number(lambda a, b: a < b),
    "minItems": length(list, lambda a, b: a >= b),
    "maxItems": length(list, lambda a, b: a <= b),
    "minLength": length(str, lambda a, b: a >= b),
    "additionalProperties": lambda schema, said, value: (
        said is not False
        or not isinstance(value, dict)
        or value.keys() <= set(schema["properties"])
    ),
    "properties": lambda *_: True,
    "items": lambda *_: True,
    "prefixItems": lambda *_: True,
    "required": lambda _, said, value: not isinstance(value, dict) or set(said) <= value.keys(),
}
