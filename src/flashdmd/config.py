"""The recipe of a run: strict, frozen, YAML in. Unknown keys are errors."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails

from flashdmd import plain
from flashdmd.algorithm import Method, split
from flashdmd.augment import Change
from flashdmd.baselines import NUMBERS as DMD2
from flashdmd.errors import UserError
from flashdmd.plain import parse
from flashdmd.schedule import STEPS

Rate = Annotated[float, Field(ge=0)]
Norm = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
Metric = Literal["kid", "retrieval", "reward", "held_out_reward", "diversity"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

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


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, content: Any) -> Any:
        return tupled(content)


def tupled(content: Any) -> Any:
    """Lists, which are how YAML and JSON write tuples, as tuples."""
    if isinstance(content, dict):
        return {key: tupled(value) for key, value in content.items()}
    return tuple(map(tupled, content)) if isinstance(content, list) else content


class Model(Section):
    pretrained_model_name_or_path: str = "emoji-score"  # a folder, a hub id, emoji-score or -flow
    revision: str | None = None  # of the hub id
    variant: str | None = None  # of its files' names, such as fp16
    teacher_lora: str | None = None  # a LoRA that belongs to the teacher: folder, file, hub id
    teacher_lora_scale: float = 1.0  # of what teacher_lora adds
    pretrained_vae_model_name_or_path: str | None = None  # None: the pipeline's own
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"  # of all that is frozen but the autoencoder
    vae_precision: Literal["fp32", "run"] = "fp32"  # run: as train.mixed_precision
    quantize_base: Literal["none", "int8", "nf4"] = "none"  # of LoRA's base
    reward_model_name_or_path: str | None = "emoji-reward"  # or a folder; None: stage 1 only
    student_model_name_or_path: str | None = None  # a student to start from; None: the teacher

    @field_validator("vae_precision", mode="before")
    @classmethod
    def _half(cls, value: Any) -> Any:
        if value in ("fp16", "bf16", "no"):
            raise ValueError(
                "the Pixel-GAN learns through the decoder, and SDXL's overflows in float16 and "
                "loses what bfloat16 rounds; use fp32, or run to follow train.mixed_precision"
            )
        return value


class Lora(Section):
    rank: Annotated[int, Field(ge=0)] = 0  # of student and score estimator; 0: full fine-tuning
    lora_alpha: Annotated[float, Field(gt=0)] | None = None  # None: as rank, a scale of 1
    lora_layers: Names | None = None  # names of layers that get one; None: the family's


class Critic(Section):
    backbone: str = "efficientnet-lite0"  # or a SAM, DINOv2, DINOv3 folder or hub id, timm:NAME
    blocks: tuple[int, ...] | None = None  # whose maps have heads; None: SAM's global ones, four
    width: Count = 128  # [DEF] channels of the heads (ADM: 256, on SAM)
    crop: Count | None = None  # latent places across a random crop that is decoded; None: all
    augment: tuple[Change, ...] = ()  # DiffAugment: colour, translation, cutout; [DEF] none
    r1_weight: Rate = 0.0  # [DEF] of approximate R1 on real pictures; 0: none
    r1_sigma: Annotated[float, Field(gt=0)] = 0.1  # [DEF] its noise


class Data(Section):
    train_data_dir: str = "emoji"  # real pictures and captions (docs/data.md); teacher: its samples
    prompts: str | None = None  # .txt, one a line, or .jsonl with "prompt"; None: the captions
    image_column: str | None = None  # of a Hugging Face data set; None: guessed
    caption_column: str | None = None  # likewise
    resolution: Annotated[int, Field(ge=8)] | None = None  # pixels; None: the teacher's
    aspect_ratio_buckets: bool = False  # a batch of one shape, not all cut to squares
    teacher_samples: Count = 4096  # pictures, where train_data_dir is teacher
    cache_dir: str | None = None  # of embeddings, latents, teacher samples; None: output_dir/cache
    cache_text_embeddings: bool = False  # then the text encoders are let go
    cache_latents: bool = False  # of the real pictures; a picture is then always cut the same
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0  # processes that draw ahead; 0: none


class Train(Section):
    arm: Literal["flash-dmd", "dmd2"] = "flash-dmd"  # the method, or what it is compared with
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    max_train_steps: Annotated[int, Field(ge=0)] = 1000  # GENERATOR updates of stage 1 (paper: 1k)
    joint_train_steps: Annotated[int, Field(ge=0)] = 400  # generator updates of stage 2; 0: none
    stage2: Literal["joint", "rl"] = "joint"  # rl: preference updates alone, and they are counted
    train_batch_size: Count = 64  # images an iteration (paper: 64 SDXL, 32 SD3)
    preference_batch_size: Count = 32  # [DEF] prompts of a preference update, a pair at each S_rl
    gradient_accumulation_steps: Count = 1  # parts that a batch is worked through in
    gradient_checkpointing: bool = False  # of the networks that learn, decoder and backbone
    sharded: bool = False  # student, score estimator and teacher, over the processes (FSDP2)
    use_8bit_adam: bool = False  # moments in 8 bits, of bitsandbytes
    learning_rate: Rate = 1e-6  # [DEF] G, full fine-tuning of SDXL: SenseFlow's (DMD2: 5e-7)
    fake_score_learning_rate: Rate = 1e-6  # [DEF] psi: SenseFlow's
    discriminator_learning_rate: Rate = 1e-4  # [DEF] heads start from random weights; 1e-5..1e-4
    preference_learning_rate: Rate = 1e-6  # [DEF] G in stage 2 (LPO's LoRA: 1e-5); own moments
    stage2_learning_rate: Rate | None = None  # [DEF] G's distilling updates of stage 2; None: as 1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # DMD2
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999  # DMD2
    adam_weight_decay: Rate = 0.01  # DMD2
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8  # torch's
    max_grad_norm: Norm = 10.0  # of student and score estimator; DMD2, full fine-tuning
    discriminator_max_grad_norm: Norm = 1.0  # [DEF] heads: SenseFlow's
    preference_max_grad_norm: Norm = 1.0  # [DEF] G in stage 2: LPO's
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0  # of each network's own updates
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99  # [DEF] student's (RTDMD); 0: none
    mixed_precision: Literal["no", "bf16"] = "bf16"  # of the networks; losses are float32
    seed: Seed = 0  # with the step it decides all that is drawn
    checkpointing_steps: Annotated[int, Field(ge=0)] = 100  # generator updates; 0: only at the end
    checkpoints_total_limit: Count | None = 2  # the newest; None keeps all
    max_bad_iterations: Count = 3  # [DEF] in a row in which something is not finite; then it stops
    gan_calibration_steps: tuple[int, int] = (50, 150)  # [DEF] generator updates; sets lambda_adv

    @field_validator("gan_calibration_steps")
    @classmethod
    def _rises(cls, window: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= window[0] < window[1]:
            raise ValueError(f"gan_calibration_steps={list(window)} must rise from 0 or more")
        return window

    @model_validator(mode="after")
    def _parts(self) -> "Train":
        parts = self.gradient_accumulation_steps
        for name in ("train_batch_size", "preference_batch_size"):
            if getattr(self, name) % parts:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of "
                    f"gradient_accumulation_steps={parts}: a batch is worked through in equal parts"
                )
        return self


LORA_DEFAULTS: dict[str, Any] = {  # of `train`, where lora.rank is not 0 and nothing is given
    "learning_rate": 3e-5,  # [DEF] RTDMD's for SD3-medium (DMD2's LoRA: 5e-5)
    "fake_score_learning_rate": 3e-5,  # [DEF] as the student's
    "preference_learning_rate": 1e-5,  # [DEF] LPO's
    "max_grad_norm": 1.0,  # [DEF] RTDMD's
}


class Validation(Section):
    prompts: tuple[str, ...] = ()  # shown in the report; none: some of those that are measured
    num_prompts: Annotated[int, Field(ge=8, le=276)] = 276  # measured on, one picture each
    teacher_steps: Annotated[int, Field(ge=1, le=STEPS)] = 50  # of the teacher beside it
    seed: Seed = 1234  # of the starting noise, the same for every arm
    best_metric: Metric | None = None  # measured at each checkpoint, the best is kept; None: no


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
    output_dir: Annotated[str, Field(min_length=1)] = "runs/flashdmd"  # of all that a run leaves

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
    def _raw(self) -> "Recipe":
        if self.method.real_images == "raw":
            for name, asked in (
                ("discriminator.crop", self.discriminator.crop is not None),
                ("data.cache_latents", self.data.cache_latents),
            ):
                if asked:
                    raise ValueError(
                        f"{name} is of latents, and method.real_images=raw shows the discriminator "
                        "pictures that never were; use decoded, or leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _lora(self) -> "Recipe":
        if self.lora.rank == 0 and self.model.quantize_base != "none":
            raise ValueError(
                f"model.quantize_base={self.model.quantize_base} is for LoRA, its base is frozen; "
                "set lora.rank, or quantize_base to none"
            )
        return self

    @model_validator(mode="after")
    def _sharded(self) -> "Recipe":
        for name, asked in (
            (f"lora.rank={self.lora.rank}", self.lora.rank > 0),
            ("train.arm=dmd2", self.train.arm == "dmd2"),
            ("train.use_8bit_adam=true", self.train.use_8bit_adam),
        ):
            if self.train.sharded and asked:
                raise ValueError(
                    f"train.sharded=true is for full fine-tuning by flash-dmd with moments in "
                    f"float32, not for {name}; leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _prompts(self) -> "Recipe":
        if self.train.arm == "dmd2" and self.data.prompts:
            raise ValueError(
                "train.arm=dmd2 judges real latents by their own captions, so data.prompts cannot "
                "replace these; leave data.prompts out"
            )
        return self

    @model_validator(mode="after")
    def _coupling(self) -> "Recipe":
        if self.train.arm == "dmd2" and self.method.score_coupling != 1:
            raise ValueError(
                f"method.score_coupling={self.method.score_coupling}: the score estimator of "
                "train.arm=dmd2 never sees the student's weights; leave it out, or use flash-dmd"
            )
        return self

    @model_validator(mode="after")
    def _stages(self) -> "Recipe":
        if self.train.arm == "dmd2" and self.train.joint_train_steps:
            raise ValueError(
                "train.arm=dmd2 has no second stage; set train.joint_train_steps=0 or use flash-dmd"
            )
        if self.train.joint_train_steps and not self.method.preference_timesteps:
            raise ValueError(
                "train.joint_train_steps is not 0 but method.preference_timesteps is empty: name "
                "the steps at which candidates are drawn, or set train.joint_train_steps=0"
            )
        if self.train.joint_train_steps and self.model.reward_model_name_or_path is None:
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
    content = {} if content is None else content
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
        section, _, key = name.partition(".")
        if not equals:
            raise UserError(f"{override!r} is not an override; write section.key=value")
        value = parse(text, f"the value of {override!r}")
        given: dict[Any, Any] = {section: {key: value}} if key else {section: value}
        check_keys(given, f"the override {override!r}")
        if key:
            result[section] = {**(result.get(section) or {}), key: value}
        else:
            result[section] = value
    named, method = {o.partition("=")[0] for o in overrides}, result.get("method")
    if arm_of(result) != arm_of(content) and isinstance(method, dict) and "method" not in named:
        own = {"matching_timesteps", *DMD2} - {name.removeprefix("method.") for name in named}
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
        if not valid[section]:
            continue
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{where}: {section} must hold keys, such as {valid[section][0]}")
        for key in inner or {}:
            if key not in valid[section]:
                raise UserError(unknown(f"{section}.{key}", valid[section], where, valid))


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
    if not name or error["type"] == "value_error":
        return message if not name else f"{name}: {message}"
    return f"{name}={error['input']!r}: {message}"


def dump(recipe: Recipe) -> str:
    """YAML that loads back to an equal recipe."""
    content = json.loads(recipe.model_dump_json())
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text
