"""The recipe of a run: strict, frozen, YAML in. Unknown keys are errors."""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails

from flashdmd import plain, rules
from flashdmd.algorithm import Method, split
from flashdmd.baselines import NUMBERS as DMD2
from flashdmd.errors import UserError
from flashdmd.plain import parse, written
from flashdmd.sections import Critic, Data, Lora, Model, Section, Text, Train
from flashdmd.sections import Metric as Metric
from flashdmd.sections import Validation as Validation

HERE = Path(__file__).parent
RECIPES = (HERE / "recipes", HERE.parents[1] / "recipes")  # in a wheel, in a checkout

ALIASES = {  # what other tools call it: its name here
    "dfake_gen_update_ratio": "method.ttur",
    "generator_update_interval": "method.ttur",
    "student_update_freq": "method.ttur (one less: updates of the score a generator update)",
    "dmd_denoising_steps": "method.student_timesteps",
    "denoising_step_list": "method.student_timesteps",
    "t_list": "method.student_timesteps",
    "real_guidance_scale": "method.teacher_guidance_scale",
    "real_score_guidance_scale": "method.teacher_guidance_scale",
    "guidance_scale": "method.teacher_guidance_scale",
    "gan_loss_weight_gen": "method.gan_loss_weight",
    "pretrained_teacher_model": "model.pretrained_model_name_or_path",
    "batch_size": "train.train_batch_size",
    "max_iter": "train.max_train_steps (generator updates, one in method.ttur iterations)",
    "lr": "train.learning_rate",
    "use_ema": "train.ema_decay (0: none)",
    "num_workers": "data.dataloader_num_workers",
    "validation_prompts": "validation.prompts",
    "validation_prompt": "validation.prompts (a list)",
    "dataset_name": "data.train_data_dir (a folder)",
    "discriminator_width": "discriminator.width",
    "lora_rank": "lora.rank",
    "use_8bit": "train.use_8bit_adam",
    "target_modules": "lora.lora_layers",
}


LORA_DEFAULTS: dict[str, Any] = {  # of `train`, where lora.rank is not 0 and nothing is given
    "learning_rate": 3e-5,  # [DEF] RTDMD's for SD3-medium (DMD2's LoRA: 5e-5)
    "fake_score_learning_rate": 3e-5,  # [DEF] as the student's
    "preference_learning_rate": 1e-5,  # [DEF] LPO's
    "max_grad_norm": 1.0,  # [DEF] RTDMD's
}


def as_mapping(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """A strict dataclass would be accepted as an instance alone; its fields stay strict."""
    schema = handler(source)
    fields: Any = handler.resolve_ref_schema(schema)
    fields["strict"] = False
    return schema


class Recipe(Section):
    model: Model = Model()
    lora: Lora = Lora()
    discriminator: Critic = Critic()
    data: Data = Data()
    method: Annotated[Method, GetPydanticSchema(as_mapping)] = Method()
    train: Train = Train()
    validation: Validation = Validation()
    output_dir: Text = "runs/flashdmd"  # of all that a run leaves

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, content: Any) -> Any:
        """What a method leaves out: the split of its steps, and under DMD2 that one's numbers."""
        if not isinstance(content, dict):
            return content
        method = content.get("method", {})
        if not isinstance(method, dict):
            return content
        steps = method.get("student_timesteps", Method.student_timesteps)
        left_out: dict[str, Any] = {}
        if isinstance(steps, list | tuple) and steps and all(type(t) is int for t in steps):
            left_out |= split(tuple(steps))
        if arm_of(content) == "dmd2":
            left_out |= {"matching_timesteps": steps, **DMD2}
        filled = {**content, "method": {**left_out, **method}}
        lora, train = content.get("lora"), content.get("train", {})
        if isinstance(lora, dict) and lora.get("rank") and isinstance(train, dict):
            filled["train"] = {**LORA_DEFAULTS, **train}
        return filled

    @property
    def first_stage(self) -> str:
        """Where lambda_adv is calibrated: stage 1, or stage 2 of a student that is there."""
        return "distill" if self.train.max_train_steps else self.train.stage2

    @model_validator(mode="after")
    def _calibration(self) -> "Recipe":
        train, first = self.train, self.first_stage
        steps = train.max_train_steps or train.joint_train_steps
        if self.method.gan_gradient_ratio is None or first == "rl" or not steps:
            return self
        if train.gan_calibration_steps[1] > steps:
            raise ValueError(
                f"train.gan_calibration_steps={list(train.gan_calibration_steps)} reaches past the "
                f"{steps} generator updates of the first stage, so the adversarial weight would "
                "never be set; lower it, or keep the weight fixed with "
                "method.gan_gradient_ratio=null"
            )
        return self

    @model_validator(mode="after")
    def _idle(self) -> "Recipe":
        """What a recipe asks for and would not get is an error, and not ignored."""
        for asked, message in rules.idle(self):
            if asked:
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _stages(self) -> "Recipe":
        if not self.train.max_train_steps and not self.train.joint_train_steps:
            raise ValueError(
                "train.max_train_steps=0 and train.joint_train_steps=0: there is nothing to train"
            )
        if self.train.joint_train_steps and not self.method.preference_timesteps:
            raise ValueError(
                "train.joint_train_steps is not 0 but method.preference_timesteps is empty: name "
                "the steps at which candidates are drawn, or set train.joint_train_steps=0"
            )
        if self.train.joint_train_steps and not self.model.reward_model_name_or_path:
            raise ValueError(
                "train.joint_train_steps is not 0 but there is no model.reward_model_name_or_path: "
                "stage 2 needs a latent reward model"
            )
        return self


SECTIONS: dict[str, type] = {
    "model": Model,
    "lora": Lora,
    "discriminator": Critic,
    "data": Data,
    "method": Method,
    "train": Train,
    "validation": Validation,
}


def keys() -> dict[str, list[str]]:
    """Every valid key, section by section; `output_dir` stands alone."""
    found = {name: list(section.__annotations__) for name, section in SECTIONS.items()}
    return {**found, "output_dir": []}


def read(name: str, overrides: list[str], output_dir: Path | None = None) -> Recipe:
    """A recipe by file, or one of the shipped ones by name (emoji-score, emoji-flow)."""
    path = next((p / f"{name}.yaml" for p in RECIPES if (p / f"{name}.yaml").is_file()), Path(name))
    if output_dir is not None:
        overrides = [*overrides, f"output_dir={json.dumps(str(output_dir))}"]
    return load(path, overrides)


def load(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in `path` with `section.key=value` overrides applied after it.

    Raises UserError for a file that cannot be read, an unknown key or a value that does not fit.
    """
    content = parse(plain.read(path, "the recipe"), str(path))
    if content is None:  # cut off, perhaps; nobody asks for a run by nothing
        raise UserError(f"the recipe {path} is empty; {{}} asks for the defaults")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a recipe is sections of keys")
    check_keys(content, str(path))
    return build(apply(content, overrides), str(path))


def apply(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`content` with `section.key=value` put in, values read as YAML.

    Another `train.arm` takes the numbers that are one arm's own out of `content`: what is not named
    beside it is the new arm's default.
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not equals:
            raise UserError(f"{override!r} is not an override; write section.key=value")
        value = parse(text, f"the value of {override!r}")
        given: dict[Any, Any] = {section: {key: value}} if dot else {section: value}
        check_keys(given, f"the override {override!r}")
        if dot:
            result[section] = {**(result.get(section) or {}), key: value}
        else:
            result[section] = value
    named, method = {o.partition("=")[0] for o in overrides}, result.get("method")
    if arm_of(result) == arm_of(content):
        return result
    if arm_of(result) == "dmd2" and not any(name.startswith("discriminator") for name in named):
        result.pop("discriminator", None)  # of pictures; DMD2's is its own
    if isinstance(method, dict) and "method" not in named:
        own = {"matching_timesteps", "real_images", *DMD2} - {
            name.removeprefix("method.") for name in named
        }
        result["method"] = {k: v for k, v in method.items() if k not in own}
    return result


def arm_of(content: dict[str, Any]) -> Any:
    """The method that a recipe names, before it is known to be a recipe."""
    train = content.get("train")
    named = train.get("arm") if isinstance(train, dict) else getattr(train, "arm", None)
    return named or Train.model_fields["arm"].default


def check_keys(content: dict[Any, Any], where: str) -> None:
    """Raises UserError for the first key that is none of a recipe's, with the nearest that is."""
    valid = keys()
    for section, inner in content.items():
        if section not in valid:
            raise UserError(unknown(str(section), list(valid), where, valid))
        if not valid[section] and not isinstance(inner, dict):
            continue
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{where}: {section} must hold keys, such as {valid[section][0]}")
        for key in inner or {}:
            if key not in valid[section]:
                near = valid[section] or list(valid)
                raise UserError(unknown(f"{section}.{key}", near, where, valid))


def unknown(name: str, near: list[str], where: str, valid: dict[str, list[str]]) -> str:
    """The message for an unknown key: what it is called here, or the nearest, and all there are."""
    key = name.rpartition(".")[2]
    everywhere = {k: f"{s}.{k}" for s, ks in reversed(valid.items()) for k in ks}
    if key in ALIASES:
        hint = f"; here it is called {ALIASES[key]}"
    elif key in everywhere:
        hint = f"; did you mean {everywhere[key]}?"
    elif close := difflib.get_close_matches(
        key, [k.rpartition(".")[2] for k in near], n=1, cutoff=0.5
    ) or difflib.get_close_matches(key, everywhere, n=1, cutoff=0.7):
        hint = f"; did you mean {everywhere.get(close[0], close[0])}?"
    else:
        hint = ""
    return f"{where}: unknown key {name!r}{hint}\nvalid here: {', '.join(near)}"


def build(content: dict[str, Any], where: str) -> Recipe:
    """Validates a whole recipe; one line for each thing that is wrong."""
    filled = {k: v for k, v in content.items() if v is not None or k == "output_dir"}
    try:
        return Recipe.model_validate(filled)
    except ValidationError as e:
        lines = [describe(error) for error in e.errors()]
        raise UserError(f"{where}: " + "\n".join(lines)) from e


def describe(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    for bound in error.get("ctx", {}).values():
        if isinstance(bound, float):  # 1e30 comes with all its digits
            message = re.sub(r"-?[\d.]+$", f"{bound:g}", message)
    if error["type"] == "string_too_short":
        return f"{name}='' is empty; leave it out, or write what it names"
    if not name or error["type"] == "value_error":
        return message if not name else f"{name}: {message}"
    return f"{name}={error['input']!r}: {message}"


def dump(recipe: Recipe) -> str:
    """YAML that loads back to an equal recipe."""
    return written(json.loads(recipe.model_dump_json()))
