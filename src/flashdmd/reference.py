"""Every key of a recipe, for editors (JSON schema) and for people (docs/recipe.md).

What a key means is the comment that stands beside its field, so it is said in one place.
"""

import inspect
import json
import re
from typing import Any

from pydantic import BaseModel, TypeAdapter

from flashdmd.algorithm import LARGEST, LONGEST, MANY
from flashdmd.config import SECTIONS, Recipe
from flashdmd.schedule import STEPS

FIELD = re.compile(r"^    (\w+): .*?(?:  # (.*))?$")
Json = dict[str, Any]

TIME = {"minimum": 1, "maximum": STEPS}
METHOD: dict[str, Json] = {  # what `Method` itself checks, a test holds the two together
    "student_timesteps": {"minItems": 1, "items": TIME},
    "matching_timesteps": {"minItems": 1, "items": TIME},
    "adversarial_timesteps": {"minItems": 1, "items": TIME},
    "preference_timesteps": {"items": TIME},
    "teacher_guidance_scale": {"minimum": 1, "maximum": LARGEST},
    "renoise_range": {"items": {"minimum": 1, "maximum": STEPS - 1}},
    "renoise_shift": {"exclusiveMinimum": 0, "maximum": LARGEST},
    "score_coupling": {"minimum": 0, "maximum": 1},
    "ttur": {"minimum": 1, "maximum": LONGEST},
    "gan_loss_weight": {"minimum": 0, "maximum": LARGEST},
    "gan_gradient_ratio": {"exclusiveMinimum": 0, "maximum": LARGEST},
    "candidates": {"minimum": 2, "exclusiveMaximum": MANY},
    "beta": {"exclusiveMinimum": 0, "maximum": LARGEST},
    "ratio_clamp": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "preferences_per_distillation": {"minimum": 0, "maximum": LONGEST},
}


def comments(section: type) -> dict[str, str]:
    """Field by field, what stands beside it in the source."""
    matches = map(FIELD.match, inspect.getsource(section).splitlines())
    return {m[1]: m[2] for m in matches if m and m[2]}


def schema(recipe: type[BaseModel] = Recipe) -> Json:
    """JSON schema (2020-12) of a recipe: types, bounds, defaults, and what each key means.

    What holds between keys is not in it; `flashdmd config show` checks that.
    """
    made = TypeAdapter(recipe).json_schema()
    parts = made.pop("$defs", {})
    described(made, recipe)
    for name, section in SECTIONS.items():
        if name not in made["properties"]:
            continue
        part = parts[section.__name__]
        described(part, section)
        for key, bounds in METHOD.items() if name == "method" else ():
            bound(part["properties"][key], bounds)
        # a section of which nothing is said may stand there empty
        made["properties"][name] = {**part, "type": ["object", "null"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def described(part: Json, section: type) -> None:
    said = comments(section)
    for name in ("title", "description"):
        part.pop(name, None)
    for key, field in part["properties"].items():
        field.pop("title", None)
        if key in said:
            field["description"] = said[key].replace("None", "null")


def bound(field: Json, bounds: Json) -> None:
    """Puts bounds in, of what may be null into the number's part, of a list into its items."""
    if "anyOf" in field:
        field = next(one for one in field["anyOf"] if one["type"] != "null")
    inner = bounds.get("items", {})
    for items in field.get("prefixItems") or [field.get("items", {})]:
        items.update(inner)
    field.update({k: v for k, v in bounds.items() if k != "items"})


def page() -> str:
    """docs/recipe.md."""
    lines, whole = [HEAD], schema()
    for name in [*SECTIONS, ""]:
        fields = whole["properties"][name]["properties"] if name else whole["properties"]
        lines.append(f"\n## {name or 'beside the sections'}\n")
        lines.append("| key | takes | default | meaning |\n| --- | --- | --- | --- |")
        for key, field in fields.items():
            if name or key not in SECTIONS:
                default = json.dumps(field["default"])
                row = (f"`{key}`", takes(field), f"`{default}`", field.get("description", ""))
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def takes(field: Json) -> str:
    """What a key takes, in words."""
    if "anyOf" in field:
        return " or ".join(map(takes, field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    kind = {"integer": "whole number", "boolean": "`true`, `false`", "string": "text"}
    word = str(kind.get(field["type"], field["type"]))
    if field["type"] == "array":
        first = (field.get("prefixItems") or [field["items"]])[0]
        count = len(field.get("prefixItems", ()))
        word = f"list of {count or ''}".strip() + f" ({takes(first)})"
        word += ", one or more" if field.get("minItems") and not count else ""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    told = {k: v for k, v in field.items() if v not in (MANY, LARGEST, -LARGEST)}  # in the head
    limits = [f"{sign} {told[k]}" for k, sign in signs.items() if k in told]
    return " ".join([word, ", ".join(limits)]).strip()


HEAD = """# Recipes, key by key

Made by `make docs` from the comments beside the fields; the same in `docs/recipe.schema.json`,
for editors. An editor with a YAML language server checks a recipe as it is typed, and shows what
a key means, when its first line is

    # yaml-language-server: $schema=https://.../recipe.schema.json

with the way to that file, as a path from the recipe (`../docs/recipe.schema.json` in `recipes/`)
or as an address. `flashdmd config schema` prints it, `flashdmd config show RECIPE` the recipe as
it would run.

A recipe is YAML in its plainest form (1.2's core): `no`, `12:30` and `2024-01-01` are words,
`010` is ten, `1e3` a whole number; a key that is given twice, an alias, a tag and a key that does
not exist are errors, and a value of another type is never turned into one that fits (`"1"`,
`true` and `yes` are no numbers and no truths, but for `true`). No text is empty; whole numbers are
below 2^31, others between -1e30 and 1e30, if nothing else is said. `[DEF]` marks a default that the
paper does not give, `null` is what stands where a default says so.

What the schema cannot say holds between keys, and is checked before the first model is loaded:

- The steps of `method.matching_timesteps`, `adversarial_timesteps` and `preference_timesteps` are
  some of `student_timesteps`, which fall; candidates are not drawn at the last. Left out, the
  three follow from `student_timesteps`, and under `train.arm: dmd2` so do that method's numbers;
  with `lora.rank`, the rates of LoRA.
- `train.gan_calibration_steps` end within the first stage; batches are multiples of
  `gradient_accumulation_steps`.
- Stage 2 has a reward, of the teacher's kind and for its latents (channels, scale, shift), and
  steps to draw at.
- The teacher knows the steps, a stock scheduler walks them, and a picture is a whole number of
  its patches.
- What a setting would have no use for is an error, and not ignored: see the messages.
"""
