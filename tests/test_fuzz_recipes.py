"""Recipes of every kind: a recipe, or a clear error; never a guess."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import json_schema
import pytest
import tiny_data
import yaml
from fuzzing import (
    NUMBERS,
    ODD,
    TEXTS,
    VALUES,
    answered,
    files_in,
    fuzz,
    spoilt_bytes,
    spoilt_value,
)
from hypothesis import example, given
from hypothesis import strategies as st

from flashdmd import cli, config, reference, reward_fit, run
from flashdmd.config import Recipe
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import UserError

AREA = "recipes"
RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = [p for p in sorted(RECIPES.glob("*.yaml")) if not p.stem.startswith("reward")]
GOOD = [json.loads(config.read(p.stem, []).model_dump_json()) for p in SHIPPED]
SCHEMA = reference.schema()
NAMES = [f"{s}.{k}".removesuffix(".") for s, ks in config.keys().items() for k in ks or [""]]
KEYS = [
    *NAMES,
    *(f"{name}.x" for name in [*config.SECTIONS, "output_dir"]),
    "output_dir.",
    "train.",
]
WORDS = st.sampled_from(["emoji", "teacher", "dmd2", "joint", "rl", "bf16", "fp16", "raw", "none"])
LARGE = st.sampled_from(["", 1e39, 1e300, 2**31, 10**40])
ANY = VALUES | WORDS | LARGE | st.lists(NUMBERS, max_size=5)

SCALARS = (
    TEXTS
    | NUMBERS.map(str)
    | st.sampled_from(
        [
            "!!int x", "!!bool maybe", "!!timestamp x", "!!binary x", "!!float x", "! x", "!x y",
            "!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!!set {a}", "*a",
            "&a [*a]", "&a b", "| \n x", "> \n x", "? a", "- b", "@x", "`x", "%x", "0x", "0o9",
            "1_0", "12:30:45", "010", ".e5", "1e", ".nan", "-.inf", "2024-02-30", "=", "<<: x",
            "''", '"\\0"', '"\\ud800"', '"\\U0011ffff"', "[[[[", "}{", "# x", "---", "...", "\t",
            "null null",
        ]
    )
)  # fmt: skip


@st.composite
def yaml_text(draw: st.DrawFn) -> bytes:
    """Lines of sections and keys, right and wrong, with all that YAML knows behind the colon."""
    lines = []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(NAMES) | st.text(max_size=6))
        section, _, key = name.partition(".")
        value = draw(SCALARS)
        lines.append(f"{section}:\n  {key}: {value}" if key else f"{section}: {value}")
    joined = "\n".join(lines).encode("utf-8", "surrogatepass")
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"%YAML 1.1\n---\n", b"--- \n"])) + joined


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def loaded(content: bytes, folder: Path, *overrides: str) -> Recipe | None:
    """The recipe, which is sound, round, and valid by the schema; None where it is refused."""
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    before = files_in(folder)
    recipe = answered(lambda: config.load(path, list(overrides)), AREA)
    assert files_in(folder) == before
    if recipe is not None:
        plain = json.loads(recipe.model_dump_json())
        assert sound(plain)
        assert not list(json_schema.errors(SCHEMA, plain))
        assert config.build(plain, "it") == recipe
        path.write_text(config.dump(recipe), "utf-8")
        assert config.load(path, []) == recipe
    return recipe


def sound(value: Any, key: str = "") -> bool:
    """No text is empty, and every number is held by what it is counted or trained in."""
    if isinstance(value, dict):
        return all(sound(inner, name) for name, inner in value.items())
    if isinstance(value, list):
        return all(sound(inner) for inner in value)
    if isinstance(value, int):
        return abs(value) < (2**63 if key == "seed" else 2**31)
    return value != "" and (not isinstance(value, float) or abs(value) <= 1e30)


@fuzz(150)
@given(yaml_text() | ODD | st.binary(max_size=60))
def test_any_text(folder: Path, content: bytes) -> None:
    loaded(content, folder)


@fuzz(60)
@given(st.sampled_from(SHIPPED).flatmap(lambda p: spoilt_bytes(p.read_bytes())))
def test_a_damaged_file(folder: Path, content: bytes) -> None:
    loaded(content, folder)


@fuzz(120)
@given(st.sampled_from(GOOD).flatmap(lambda good: spoilt_value(good, ANY)))
@example(GOOD[0] | {"train": GOOD[0]["train"] | {"learning_rate": 1e39}})
@example(GOOD[0] | {"data": GOOD[0]["data"] | {"cache_dir": ""}})
def test_what_the_schema_refuses_is_refused_and_what_is_taken_is_taken_as_it_is(
    folder: Path, content: Any
) -> None:
    text = yaml.safe_dump(content).encode("utf-8", "surrogatepass")
    recipe = loaded(text, folder)
    if list(json_schema.errors(SCHEMA, content)):
        assert recipe is None, "the schema refuses it"
    if recipe is not None:  # nothing that was given is anything else now
        kept = json.loads(recipe.model_dump_json())
        for section, keys in content.items():
            for key, value in (keys or {}).items() if section != "output_dir" else ():
                assert same(kept[section][key], value), (section, key, value)


def same(kept: Any, given: Any) -> bool:
    if isinstance(given, list):
        return len(kept) == len(given) and all(map(same, kept, given))
    if isinstance(given, int | float) and not isinstance(given, bool):
        return not isinstance(kept, bool) and math.isclose(kept, given)
    return type(kept) is type(given) and kept == given


@fuzz(120)
@given(st.lists(st.tuples(st.sampled_from(KEYS) | TEXTS, SCALARS | ANY.map(str)), max_size=4))
@example([("output_dir.x", "1")])
def test_any_overrides(folder: Path, changes: list[tuple[str, str]]) -> None:
    overrides = [f"{name}={value}" for name, value in changes]
    loaded(SHIPPED[1].read_bytes(), folder, *overrides)


@fuzz(60)
@given(
    spoilt_bytes((RECIPES / "reward-sdxl.yaml").read_bytes())
    | spoilt_value(yaml.safe_load((RECIPES / "reward-sdxl.yaml").read_text()), ANY).map(
        lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass")
    ),
    st.lists(st.sampled_from(list(reward_fit.RewardRecipe.model_fields)) | TEXTS, max_size=2),
    SCALARS,
)
def test_a_rewards_recipe(folder: Path, content: bytes, names: list[str], value: str) -> None:
    path = folder / "reward.yaml"
    path.write_bytes(content)
    recipe = answered(lambda: reward_fit.read(path, [f"{name}={value}" for name in names]), AREA)
    assert recipe is None or sound(recipe.model_dump())


@fuzz(40)
@given(yaml_text() | ODD, st.lists(st.tuples(st.sampled_from(NAMES), SCALARS), max_size=2))
def test_the_command_ends_with_0_or_2(
    folder: Path, content: bytes, changes: list[tuple[str, str]]
) -> None:
    """No traceback, nothing written."""
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    before = files_in(folder)
    overrides = [f"{name}={value}".replace("\0", "") for name, value in changes]
    code = answered(lambda: command("config", "show", str(path), *overrides), AREA)
    assert code in (0, 2)
    assert files_in(folder) == before


REAL = {  # a small run of a real pipeline
    "model": {"pretrained_model_name_or_path": "teacher", "reward_model_name_or_path": None},
    "data": {"train_data_dir": "pictures", "prompts": "prompts.txt", "resolution": 64},
    "discriminator": {"backbone": "sam", "blocks": [1], "width": 8, "crop": 4},
    "lora": {"rank": 4, "lora_alpha": 4.0, "lora_layers": ["to_q", "to_k"]},
    "train": {"joint_train_steps": 0, "max_train_steps": 1, "gan_calibration_steps": [0, 1]},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What REAL names, with no weights of the teacher: they are never come to."""
    folder = tmp_path_factory.mktemp("here")
    without = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(ASSETS / "score", folder / "teacher", ignore=without)
    tiny_data.pictures(folder / "pictures", (64, 64))
    tiny_data.sam(folder / "sam")
    (folder / "prompts.txt").write_text("a cat")
    assert trained(folder, yaml.safe_dump(REAL).encode(), []) == (2, True)
    return folder


def trained(here: Path, content: bytes, overrides: list[str]) -> tuple[int | None, bool]:
    """With what `flashdmd train` ends, and whether it came to the loading of models."""
    (here / "recipe.yaml").write_bytes(content)
    opened = []

    def load(*_: Any) -> None:
        opened.append(1)
        raise UserError("all that can be found before is found")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(run, "open_session", load)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        words = ("train", "recipe.yaml", *overrides, "output_dir=out")
        return answered(lambda: command(*words), AREA), bool(opened)


@fuzz(60)
@given(
    spoilt_value(REAL, ANY).map(lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass"))
    | yaml_text(),
    st.lists(st.tuples(st.sampled_from(KEYS), SCALARS | ANY.map(str)), max_size=2),
)
@example(b"output_dir: out", [("output_dir.x", "1")])
def test_training_ends_with_2_where_models_are_not_loaded(
    here: Path, content: bytes, changes: list[tuple[str, str]]
) -> None:
    """No traceback, nothing written."""
    (here / "recipe.yaml").write_bytes(content)
    before = files_in(here)
    overrides = [f"{name}={value}".replace("\0", "") for name, value in changes]
    code, _ = trained(here, content, overrides)
    assert code == 2
    assert files_in(here) == before


def command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["flashdmd", *words])
        try:
            cli.main()
        except SystemExit as e:
            return int(e.code or 0)
    return 0


def test_a_bug_would_be_seen() -> None:
    """What the properties ask is not void: an exception of another kind comes through."""
    with pytest.raises(ZeroDivisionError):
        answered(lambda: 1 / 0, "nothing")

    def refuse() -> None:
        raise UserError("no")

    assert answered(refuse, "nothing") is None
