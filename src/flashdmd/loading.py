"""Teachers, students and rewards by name, on the device and in the precision that a recipe says."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flashdmd import export
from flashdmd.config import Recipe
from flashdmd.emoji import reward as emoji_reward
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import UserError
from flashdmd.models import latent_reward
from flashdmd.models.families import Family
from flashdmd.models.teacher import Pipeline, Precision, Teacher, add_lora, load_pipeline
from flashdmd.rules import EMBEDDED
from flashdmd.sampler import Cond


def load_teacher(name: str, device: str = "cpu", merged: bool = False) -> Teacher:
    """A teacher or student by folder or hub id, or one of the embedded teachers by name.

    A student that is a LoRA is `merged` into its base, in float32, or lies beside it.
    """
    if name not in EMBEDDED:
        if student := load_lora(Path(name), device, merged):
            return student
        loaded, notes = load_pipeline(Path(name), device), export.notes_of(Path(name))
        loaded.resolution = notes.resolution if notes else 0
        return loaded
    teacher = load_pipeline(embedded_folder(name))
    teacher.folder, teacher.source = Path(name), Pipeline(name)  # what cards and reports call it
    teacher.pipeline.to(device)
    return teacher


def embedded_folder(name: str) -> Path:
    folder = ASSETS / EMBEDDED[name]
    if not folder.is_dir():
        raise UserError(
            f"{name} is not shipped with this version; make it with `flashdmd emoji teacher "
            f"--family {EMBEDDED[name]}` and name the pipeline folder that this writes"
        )
    return folder


def load_base(
    notes: dict[str, Any], device: str = "cpu", dtype: Precision | None = "fp32"
) -> Teacher:
    """The teacher that a student's notes name; in the precision of theirs if `dtype` is None."""
    source = Pipeline(**notes)
    if source.name in EMBEDDED:
        return load_teacher(source.name, device)
    return load_pipeline(replace(source, learns=False, dtype=dtype or source.dtype), device)


def load_lora(folder: Path, device: str = "cpu", merged: bool = False) -> Teacher | None:
    """A student that is a LoRA, on its base, ready to draw; None for anything else."""
    notes = export.notes_of(folder)
    if notes is None or not notes.rank:
        return None
    if notes.teacher is None:
        raise UserError(f"{folder} is a LoRA and does not say of which model")
    student = load_base(notes.teacher, device, "fp32" if merged else None)
    add_lora(student.pipeline, str(folder), fused=merged)
    for part in student.pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    student.pipeline.scheduler = export.scheduler_for(student, notes.steps)
    student.resolution = notes.resolution
    return student


def check_teacher(recipe: Recipe) -> None:
    """Raises UserError for a student in a teacher's place, or one that is not shipped."""
    name = recipe.model.pretrained_model_name_or_path
    if name in EMBEDDED:
        embedded_folder(name)
    elif export.notes_of(Path(name)):
        raise UserError(
            f"model.pretrained_model_name_or_path={name!r} is a few-step student; name its teacher "
            "there, and the student as model.student_model_name_or_path"
        )


def teacher_of(recipe: Recipe) -> Teacher:
    """The teacher that a recipe names, on the recipe's device and held as the recipe says."""
    model = recipe.model
    name = model.pretrained_model_name_or_path
    device = device_of(recipe)
    check_teacher(recipe)
    if name in EMBEDDED:
        teacher = load_teacher(name, device)
    else:
        source = Pipeline(
            name,
            model.revision,
            model.variant,
            model.teacher_lora,
            model.teacher_lora_scale,
            model.pretrained_vae_model_name_or_path,
            model.frozen_dtype,
            learns=not recipe.lora.rank,
        )
        teacher = load_pipeline(source, device)
    teacher.in_run = model.vae_precision == "run"
    teacher.guidance = recipe.method.teacher_guidance_scale
    teacher.resolution = patches(recipe, teacher.family, teacher.pipeline)
    return teacher


def device_of(recipe: Recipe) -> str:
    """Raises UserError for a device that is not there."""
    asked, there = recipe.train.device, torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("train.device=cuda: torch sees no CUDA device here; use auto or cpu")
    return "cuda" if there and asked != "cpu" else "cpu"


def patches(recipe: Recipe, family: Family, pipeline: Any) -> int:
    """data.resolution, or 0. Raises UserError for pictures that are no whole number of patches."""
    asked, unit = recipe.data.resolution or 0, family.multiple(pipeline)
    if asked % unit:
        raise UserError(
            f"data.resolution={asked} must be a multiple of {unit}, the pixels of a patch of this "
            f"pipeline; {max(1, asked // unit) * unit} is one"
        )
    return asked


@runtime_checkable
class RewardModel(Protocol):
    """What stage 2 asks: how well latents go with prompts, at their own noise level."""

    @property
    def network(self) -> nn.Module: ...

    def encode_prompts(self, prompts: list[str]) -> Cond: ...

    def __call__(self, z_t: Tensor, t: Tensor, cond: Cond) -> Tensor: ...


def reward_folder(name: str) -> Path:
    return ASSETS / "reward" if name == "emoji-reward" else Path(name)


def load_reward(name: str, teacher: Teacher) -> RewardModel:
    """A latent reward model for latents of `teacher`: a folder of `flashdmd reward`, one of
    `flashdmd emoji reward`, or emoji-reward.
    """
    folder, vae = reward_folder(name), teacher.pipeline.vae
    if not latent_reward.is_one(folder):
        embedded = emoji_reward.load(folder, teacher.process, vae)
        embedded.network.to(teacher.device)
        return embedded
    return latent_reward.load(folder, teacher.process, vae).to(teacher.device)
