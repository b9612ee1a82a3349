"""What a recipe asks for and would not get: an error, and not ignored. Found in its text alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from flashdmd.algorithm import Method
from flashdmd.sections import Critic, Data, Lora, Model, Train

EMBEDDED = {"emoji-score": "score", "emoji-flow": "flow"}  # teachers: folders of emoji/assets
BUILT_IN = {*EMBEDDED, "emoji-reward", "emoji", "teacher"}  # names that are no folders
MADE = (  # by a run, beside its checkpoints; gone when it starts over
    "metrics.jsonl", "validation.jsonl", "metrics.json", "data.json", "timing.json", "report.html",
    "samples", "student", "student-stage1", "not-finite",
)  # fmt: skip
Rule = tuple[bool, str]  # whether it is broken, and what is said then


@runtime_checkable
class Sections(Protocol):
    """A recipe."""

    @property
    def model(self) -> Model: ...
    @property
    def lora(self) -> Lora: ...
    @property
    def discriminator(self) -> Critic: ...
    @property
    def data(self) -> Data: ...
    @property
    def method(self) -> Method: ...
    @property
    def train(self) -> Train: ...
    @property
    def output_dir(self) -> str: ...


def idle(recipe: Sections) -> Iterator[Rule]:
    yield from of_networks(recipe)
    yield from of_pictures(recipe)
    yield from of_dmd2(recipe)
    yield from of_shares(recipe)
    yield from of_output(recipe)


def of_networks(recipe: Sections) -> Iterator[Rule]:
    model, lora, critic = recipe.model, recipe.lora, recipe.discriminator
    if model.pretrained_model_name_or_path in EMBEDDED:
        for name in (
            "revision",
            "variant",
            "teacher_lora",
            "pretrained_vae_model_name_or_path",
        ):
            yield (
                getattr(model, name) is not None,
                f"model.{name} is of a pipeline folder or a hub id, and "
                f"{model.pretrained_model_name_or_path} is neither; leave it out",
            )
    yield (
        model.teacher_lora is None and model.teacher_lora_scale != 1,
        "model.teacher_lora_scale is given without model.teacher_lora; name the LoRA",
    )
    yield (
        not lora.rank and model.quantize_base != "none",
        f"model.quantize_base={model.quantize_base} is for LoRA, its base is frozen; set "
        "lora.rank, or quantize_base to none",
    )
    for name in ("lora_alpha", "lora_layers"):
        yield (
            not lora.rank and getattr(lora, name) is not None,
            f"lora.{name} is given and lora.rank=0 trains every weight; set lora.rank, or "
            f"leave lora.{name} out",
        )
    whole = critic.backbone == Critic().backbone or critic.backbone.startswith("timm:")
    yield (
        whole and critic.blocks is not None,
        f"discriminator.blocks: {critic.backbone} gives the maps of all of its stages; leave "
        "blocks out",
    )
    student, output = model.student_model_name_or_path, Path(recipe.output_dir).absolute()
    yield (
        student is not None and Path(student).absolute().is_relative_to(output),
        f"model.student_model_name_or_path={student!r} is inside output_dir="
        f"{recipe.output_dir!r}, where the run writes its own students; give another output_dir",
    )


def of_output(recipe: Sections) -> Iterator[Rule]:
    """A run writes over nothing that it reads, and does not read what it writes."""
    model, data, output = recipe.model, recipe.data, Path(recipe.output_dir).resolve()
    for key, name in (
        ("model.pretrained_model_name_or_path", model.pretrained_model_name_or_path),
        ("model.reward_model_name_or_path", model.reward_model_name_or_path),
        ("model.student_model_name_or_path", model.student_model_name_or_path),
        ("data.train_data_dir", data.train_data_dir),
    ):
        if name is None or name in BUILT_IN:
            continue
        place = Path(name).resolve()
        yield (
            output.is_relative_to(place),
            f"output_dir={recipe.output_dir!r} is inside {key}={name!r}, which a run reads and "
            "does not write to; give another output_dir",
        )
        first = place.relative_to(output).parts[:1] if place.is_relative_to(output) else ()
        yield (
            any(part in MADE or part.startswith("checkpoint-") for part in first),
            f"{key}={name!r} is where output_dir={recipe.output_dir!r} has what a run makes, and "
            "it would be written over; give another output_dir",
        )


def of_pictures(recipe: Sections) -> Iterator[Rule]:
    data = recipe.data
    if recipe.method.real_images == "raw":
        crop = recipe.discriminator.crop is not None
        for name, asked in (
            ("discriminator.crop", crop),
            ("data.cache_latents", data.cache_latents),
        ):
            yield (
                asked,
                f"{name} is of latents, and method.real_images=raw shows the discriminator "
                "pictures that never were; use decoded, or leave it out",
            )
    if data.train_data_dir == "emoji":
        for name in ("cache_latents", "aspect_ratio_buckets", "image_column", "caption_column"):
            yield (
                bool(getattr(data, name)),
                f"data.{name}: the pictures of the embedded world are rendered when drawn, all "
                "of one size, and are in no table; leave it out",
            )
        yield (
            data.cache_text_embeddings and data.prompts is None,
            "data.cache_text_embeddings: the captions of the embedded world are made as they "
            "are drawn; set it to false, or name prompts in data.prompts",
        )
    yield (
        data.train_data_dir == "teacher" and data.prompts is None,
        "data.train_data_dir=teacher draws the teacher's samples for prompts, and data.prompts "
        "names none; give a .txt file with one prompt a line",
    )


def of_dmd2(recipe: Sections) -> Iterator[Rule]:
    if recipe.train.arm != "dmd2":
        return
    yield (
        recipe.data.prompts is not None,
        "train.arm=dmd2 judges real latents by their own captions, so data.prompts cannot "
        "replace these; leave data.prompts out",
    )
    yield (
        recipe.method.score_coupling != 1,
        f"method.score_coupling={recipe.method.score_coupling}: the score estimator of "
        "train.arm=dmd2 never sees the student's weights; leave it out, or use flash-dmd",
    )
    yield (
        recipe.discriminator != Critic() or recipe.method.real_images == "raw",
        "discriminator and method.real_images=raw are of a discriminator of pictures, and that "
        "of train.arm=dmd2 looks at latents; leave them out, or use flash-dmd",
    )
    yield (
        recipe.train.joint_train_steps > 0,
        "train.arm=dmd2 has no second stage; set train.joint_train_steps=0 or use flash-dmd",
    )


def of_shares(recipe: Sections) -> Iterator[Rule]:
    train, rank = recipe.train, recipe.lora.rank
    for name, asked in (
        (f"lora.rank={rank}", rank > 0),
        ("train.arm=dmd2", train.arm == "dmd2"),
        ("train.use_8bit_adam=true", train.use_8bit_adam),
    ):
        yield (
            train.sharded and asked,
            "train.sharded=true is for full fine-tuning by flash-dmd with moments in float32, "
            f"not for {name}; leave one of them out",
        )
