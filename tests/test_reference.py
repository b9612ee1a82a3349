"""The schema and the table of keys: current, complete, and true of what is accepted."""

import json
from pathlib import Path
from typing import Any

import json_schema
import pytest

from flashdmd import config, reference
from flashdmd.algorithm import Method
from flashdmd.errors import UserError
from flashdmd.plain import parse

ROOT = Path(__file__).parents[1]
SCHEMA = reference.schema()
SHIPPED = [p for p in sorted((ROOT / "recipes").glob("*.yaml")) if not p.stem.startswith("reward")]
KEYS = {
    f"{section}.{key}".removeprefix("."): field
    for section in [*config.SECTIONS, ""]
    for key, field in (SCHEMA["properties"][section] if section else SCHEMA)["properties"].items()
    if section or key not in config.SECTIONS
}


def test_what_is_in_docs_is_what_the_commands_print() -> None:
    assert json.loads((ROOT / "docs/recipe.schema.json").read_text()) == SCHEMA, "run `make docs`"
    assert (ROOT / "docs/recipe.md").read_text() == reference.page(), "run `make docs`"


def test_every_key_is_there_with_its_meaning_and_its_default() -> None:
    named = [f"{s}.{k}" for s, keys in config.keys().items() for k in keys] + ["output_dir"]
    assert list(KEYS) == named
    plain = json.loads(config.Recipe().model_dump_json())
    for name, field in KEYS.items():
        section, _, key = name.rpartition(".")
        assert field["description"], name
        assert field["default"] == (plain[section][key] if section else plain[key]), name
    page = reference.page()
    assert all(f"`{name.rpartition('.')[2]}`" in page for name in KEYS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_shipped_recipes_are_valid(path: Path) -> None:
    assert not list(json_schema.errors(SCHEMA, parse(path.read_text(), path.name)))
    whole = json.loads(config.read(path.stem, []).model_dump_json())
    assert not list(json_schema.errors(SCHEMA, whole))


def wrong(field: dict[str, Any]) -> list[Any]:
    """Values just outside of what a field takes, and of every other type."""
    options = [one for one in field.get("anyOf", [field]) if one["type"] != "null"]
    (one,) = options
    outside: list[Any] = ["x", 3, 0.5, True, {}, [{}], None, [None, "x", 3]]
    for word, by in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)):
        if word in one:
            outside.append(one[word] + by)
    if "exclusiveMaximum" in one:
        outside.append(one["exclusiveMaximum"])
    inner = (one.get("prefixItems") or [one.get("items", {})])[0]
    for word, by in (("minimum", -1), ("maximum", 1)):
        if word in inner:
            outside.append([inner[word] + by] * max(1, len(one.get("prefixItems", ()))))
    outside += [[]] * ("minItems" in one) + [[1, 2, 3]] * ("prefixItems" in one)
    return [v for v in outside if list(json_schema.errors(field, v))]


@pytest.mark.parametrize("name", KEYS)
def test_what_the_schema_refuses_is_refused(name: str) -> None:
    section, _, key = name.rpartition(".")
    values = wrong(KEYS[name])
    assert len(values) > 3
    for value in values:
        content = {section: {key: value}} if section else {key: value}
        with pytest.raises(UserError):
            config.build(content, "a recipe")


def test_bounds_of_the_method_are_its_own() -> None:
    """The edge of each is accepted, so the schema refuses nothing that is valid."""
    for key, bounds in reference.METHOD.items():
        for word in ("minimum", "maximum"):
            if word in bounds:
                kind = type(getattr(Method, key))
                Method(**{key: kind(bounds[word])})
    last = (1000, 999, 1)
    Method(student_timesteps=last, matching_timesteps=(1000,), adversarial_timesteps=(1,),
           preference_timesteps=(), renoise_range=(1, 999), renoise_shift=1e-9, beta=1e-9,
           ratio_clamp=1e-9, gan_gradient_ratio=1e-9)  # fmt: skip


def test_a_section_may_be_empty_and_a_recipe_of_none_is_the_default() -> None:
    content = dict.fromkeys(config.SECTIONS)
    assert not list(json_schema.errors(SCHEMA, content))
    assert config.build(content, "a recipe") == config.Recipe()
