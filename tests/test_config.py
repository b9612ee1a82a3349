"""Recipes: strict, clear about what is wrong, and the same after a round trip."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashdmd import config
from flashdmd.algorithm import SPLIT
from flashdmd.config import Recipe
from flashdmd.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = [p for p in sorted(RECIPES.glob("*.yaml")) if not p.stem.startswith("reward")]


def load(text: str, tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text or "{}")
    return config.load(path, list(overrides))


@pytest.mark.parametrize(
    "word", ["08", "1e5", "0o17", "1234e56", "<<", "=", "~", "null", "no", "2024-01-01", "1_0", "-"]
)
def test_what_looks_like_something_else_is_written_as_a_word(word: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"output_dir": word, "validation": {"prompts": [word, "a"]}})
    assert load(config.dump(recipe), tmp_path) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_shipped_recipes_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = config.load(path, [])
    assert load(config.dump(recipe), tmp_path) == recipe
    name = recipe.model.pretrained_model_name_or_path
    assert (name == path.stem) == path.stem.startswith("emoji")  # else a hub id


def test_there_are_recipes_of_both_families() -> None:
    assert {p.stem for p in SHIPPED} >= {"emoji-score", "emoji-flow"}


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    recipe = load("train: {seed: 1, learning_rate: 1e-5}", tmp_path, "train.seed=2", "output_dir=x")
    assert (recipe.train.seed, recipe.train.learning_rate, recipe.output_dir) == (2, 1e-5, "x")


def test_another_arm_brings_its_own_numbers_and_what_is_named_beside_it_wins(
    tmp_path: Path,
) -> None:
    text = "method: {ttur: 3, score_coupling: 0.9, gan_loss_weight: 0.5, teacher_guidance_scale: 3}"
    arm = ("train.arm=dmd2", "train.joint_train_steps=0")
    switched = load(text, tmp_path, *arm)
    method = switched.method
    assert (method.ttur, method.gan_loss_weight, method.gan_gradient_ratio) == (5, 5e-3, None)
    assert (method.score_coupling, method.renoise) == (1.0, "full")
    assert method.matching_timesteps == method.student_timesteps
    assert method.teacher_guidance_scale == 3
    own = load(text, tmp_path, "method.ttur=10", *arm, "method.gan_loss_weight=0.001").method
    assert (own.ttur, own.gan_loss_weight) == (10, 1e-3)
    assert load(config.dump(switched), tmp_path) == switched
    back = load(config.dump(switched), tmp_path, "train.arm=flash-dmd").method
    assert (back.ttur, back.matching_timesteps) == (2, (999, 749, 499))
    few = load("", tmp_path, *arm, "method.student_timesteps=[999, 499]").method
    assert few.matching_timesteps == (999, 499)
    filed = load("train: {arm: dmd2, joint_train_steps: 0}\nmethod: {ttur: 10}", tmp_path).method
    assert (filed.ttur, filed.gan_gradient_ratio) == (10, None)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "0.00001", "+1e-5"])
def test_numbers_are_numbers_however_they_are_written(text: str, tmp_path: Path) -> None:
    assert load("", tmp_path, f"train.learning_rate={text}").train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lerning_rate=1", "did you mean train.learning_rate"),
        ("train.ttur=2", "did you mean method.ttur"),
        ("method.dfake_gen_update_ratio=5", "here it is called method.ttur"),
        ("method.denoising_step_list=[999]", "here it is called method.student_timesteps"),
        ("trian.seed=1", "unknown key 'trian'"),
        ("seed=1", "unknown key 'seed'; did you mean train.seed?"),
        ("train.use_ema=true", "unknown key 'train.use_ema'; here it is called train.ema_decay"),
        ("model.qqq=x", "unknown key 'model.qqq'\nvalid here"),  # nothing is near
        ("method.ttur=many", "method.ttur='many'"),
        ("method.ttur=1.5", "method.ttur=1.5"),
        ("method.ttur=0", "ttur=0"),
        ("method.student_timesteps=[249,999]", "strictly decreasing"),
        ("method.matching_timesteps=[998]", "are not among"),
        ("method.preference_timesteps=[249]", "the last step"),
        ("train.arm=dmd3", "'flash-dmd' or 'dmd2'"),
        ("train.arm=dmd2", "no second stage"),
        ("train={arm: dmd2, joint_train_steps: 0}\nmethod.score_coupling=0.9", "never sees"),
        ("train.gan_calibration_steps=[9,3]", "must rise"),
        ("train.gradient_accumulation_steps=5", "not a multiple of gradient_accumulation_steps=5"),
        ("train=3", "train must hold keys"),
        ("train.seed", "write section.key=value"),
        ("train.seed=[", "is not YAML"),
        ("model.reward_model_name_or_path=null", "needs a latent reward model"),
        ("model.reward_model_name_or_path=''", "reward_model_name_or_path='' is empty"),
        ("data.prompts=''", "data.prompts='' is empty"),
        ("data.train_data_dir=''", "data.train_data_dir='' is empty"),
        ("data.cache_dir=''", "data.cache_dir='' is empty"),
        ("discriminator.backbone=''", "discriminator.backbone='' is empty"),
        ("validation.prompts=[a, '']", "validation.prompts.1='' is empty"),
        ("output_dir=''", "output_dir='' is empty"),
        ("output_dir.x=1", "unknown key 'output_dir.x'"),
        ("output_dir.=1", "unknown key 'output_dir.'"),
        ("train.=1", "unknown key 'train.'"),
        ("train.learning_rate=1e39", "less than or equal to 1e+30"),
        ("train.adam_weight_decay=1e300", "less than or equal to 1000"),
        ("train.adam_epsilon=1e-300", "greater than or equal to 1e-30"),
        ("model.teacher_lora_scale=-1e39", "greater than or equal to -1e+30"),
        ("method.teacher_guidance_scale=1e300", "must be finite, 1e+30 at most"),
        ("method.gan_loss_weight=1e300", "must be finite, 1e+30 at most"),
        ("method.ttur=2147483647", "must be 10000 or less"),
        ("method.preferences_per_distillation=10001", "must be 10000 or less"),
        *(
            (f"{key}=1{'0' * 40}", "less than 2147483648")
            for key in (
                "lora.rank",
                "discriminator.width",
                "data.resolution",
                "method.candidates",
                "train.train_batch_size",
                "method.ttur",
            )
        ),
        ("discriminator.blocks=[]", "at least 1 item"),
        ("discriminator.blocks=[-1]", "greater than or equal to 0"),
    ],
)
def test_what_is_wrong_is_named(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("", tmp_path, *override.splitlines())
    assert said in str(caught.value)


def test_every_wrong_value_has_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("train: {seed: x, train_batch_size: 0}", tmp_path)
    assert "train.seed='x'" in str(caught.value)
    assert "train.train_batch_size=0" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"train: {seed: 1}\ntrain: {seed: 2}", "given twice"),
        (b"train: {seed: 1, seed: 2}", "given twice"),
        (b"train: [", "is not YAML"),
        (b"!!python/object/apply:os.system ['true']", "aliases and tags are not read"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases and tags are not read"),
        (b"train: &t {seed: 1}\nmethod:\n  <<: *t", "aliases and tags are not read"),
        (b'output_dir: "a\\0b"', "a NUL or half a surrogate pair"),
        (b"#" * 2**20 + b"\n", "is larger than 1048576 bytes"),
        (b"[" * 4000, "is not YAML"),
        (b"? [1, 2]\n: 3\n", "a key must be a word"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        config.load(path, [])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed='1'", "valid integer"),
        ("train.seed=true", "valid integer"),
        ("train.seed=1_000", "valid integer"),
        ("method.ttur='2'", "valid integer"),
        ("method.beta=true", "valid number"),
        ("method.ttur=null", "valid integer"),
        ("train.gradient_checkpointing=1", "valid boolean"),
        ("train.gradient_checkpointing=yes", "valid boolean"),
        ("train.learning_rate=.nan", "finite"),
        ("train.learning_rate=1e999", "finite"),
        ("output_dir=null", "valid string"),
        ("output_dir=3", "valid string"),
    ],
)
def test_a_value_of_another_type_is_no_value(override: str, said: str, tmp_path: Path) -> None:
    """Nothing is guessed: `true` is no seed and `yes` no truth."""
    with pytest.raises(UserError, match=said):
        load("", tmp_path, override)


def test_words_and_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = "output_dir: 2024-01-01\ntrain: {seed: 010, mixed_precision: no, max_train_steps: 1e3}"
    recipe = load(text, tmp_path, "data.cache_dir=12:30")
    assert (recipe.output_dir, recipe.data.cache_dir) == ("2024-01-01", "12:30")
    train = recipe.train
    assert (train.seed, train.mixed_precision, train.max_train_steps) == (10, "no", 1000)


def test_a_recipe_may_come_through_a_pipe_and_never_fills_the_memory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is larger than"):
        config.load(Path("/dev/zero"), [])
    reader, writer = os.pipe()
    os.write(writer, b"train: {seed: 3}")
    os.close(writer)
    assert config.load(Path(f"/dev/fd/{reader}"), []).train.seed == 3
    os.close(reader)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read: No such file"):
        config.load(tmp_path / "nowhere.yaml", [])


@pytest.mark.parametrize("n", SPLIT)
@pytest.mark.parametrize("first", [999, 1000])
def test_steps_may_be_named_alone(n: int, first: int) -> None:
    """Of either kind of teacher, in a recipe or after it; the split follows."""
    steps = [first - 1000 * i // n for i in range(n)]
    changes = [f"method.student_timesteps={steps}", f"train.joint_train_steps={min(n - 1, 40)}"]
    method = config.read("emoji-score", changes).method
    assert list(method.student_timesteps) == steps
    assert set(method.matching_timesteps) | set(method.adversarial_timesteps) == set(steps)
    own = config.read("emoji-score", [*changes, f"method.adversarial_timesteps=[{steps[0]}]"])
    assert own.method.adversarial_timesteps == (steps[0],)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2000)
    | st.floats(allow_nan=True, width=16)
    | st.text(max_size=6)
    | st.sampled_from(["bf16", "dmd2", "joint", "1e-5", "full", "~", "emoji"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [f"{s}.{k}" for s, ks in config.keys().items() for k in ks] + ["output_dir"]
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(NAMES | st.text(max_size=8), VALUES, min_size=1, max_size=4))
def test_any_change_gives_a_recipe_or_a_clear_error(changes: dict, tmp_path: Path) -> None:
    content: dict = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key:
            inner = content.setdefault(section, {})
            if isinstance(inner, dict):
                inner[key] = value
        else:
            content[section] = value
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        recipe = config.load(path, [])
    except UserError:
        return
    path.write_text(config.dump(recipe))
    assert config.load(path, []) == recipe


def test_a_calibration_that_would_never_end_is_refused() -> None:
    """Whatever the first stage is; not where nothing is calibrated."""
    short = ["train.max_train_steps=30", "train.gan_calibration_steps=[10, 40]"]
    with pytest.raises(UserError, match=r"gan_calibration_steps=\[10, 40\] reaches past the 30"):
        config.load(SHIPPED[0], short)
    joint = ["train.max_train_steps=0", "train.joint_train_steps=20", *short[1:]]
    with pytest.raises(UserError, match=r"reaches past the 20"):
        config.load(SHIPPED[0], joint)
    for free in ("method.gan_gradient_ratio=null", "train.stage2=rl"):
        config.load(SHIPPED[0], [*(short if "ratio" in free else joint), free])


def test_dmd2_on_prompts_alone_is_refused() -> None:
    changes = ["train.arm=dmd2", "train.joint_train_steps=0", "data.prompts=p.txt"]
    with pytest.raises(UserError, match="real latents by their own captions"):
        config.load(SHIPPED[0], changes)
