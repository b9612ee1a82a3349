"""The student as a stock diffusers pipeline folder: the plain call runs the trained steps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashdmd import checkpoint
from flashdmd.algorithm import Method
from flashdmd.errors import UserError
from flashdmd.files import forget_origins, replace_folder
from flashdmd.models.denoiser import AdapterDenoiser, NetworkDenoiser
from flashdmd.models.families.silent import silent_t5
from flashdmd.models.teacher import Pipeline, Teacher, fuse, load_pipeline

NOTES = "flashdmd.json"  # beside the weights: how they are used, for `flashdmd sample`
LORA = "pytorch_lora_weights.safetensors"
NEAR = 0.5  # of a network time: as near to its steps as the plain call has to take a student


def scheduler_for(teacher: Teacher, steps: tuple[int, ...]) -> Any:
    """A diffusers scheduler with which the pipeline's plain call walks `steps`.

    Raises UserError when no setting of the stock scheduler does.
    """
    scheduler = teacher.family.scheduler(teacher.pipeline, steps)
    got = teacher.family.grid(teacher.pipeline, scheduler, len(steps))
    if len(got) != len(steps) or max(abs(a - b) for a, b in zip(got, steps, strict=True)) > NEAR:
        raise UserError(
            f"student_timesteps={steps} cannot be written as a stock scheduler's grid, that would "
            f"be {tuple(round(t, 3) for t in got)}; steps that are equally spaced, or those "
            "shifted, can"
        )
    return scheduler


def write_student(
    teacher: Teacher,
    student: NetworkDenoiser,
    method: Method,
    folder: Path,
    card: str,
    averaged: int = 0,
) -> Path:
    """Writes `folder` whole or not at all: the teacher's pipeline with the student's network, or
    with LoRA the adapter alone, which `load_lora_weights` reads; both where there is no such
    method.

    `card` becomes README.md; `averaged` are the updates in the weights, where a run from this
    student counts on. The weights are float32 as trained.
    """
    notes: dict[str, Any] = {
        "student_timesteps": method.student_timesteps,
        "teacher_guidance_scale": method.teacher_guidance_scale,
        "averaged_updates": averaged,
    }
    with replace_folder(folder) as beside:
        adapter = isinstance(student, AdapterDenoiser)
        if isinstance(student, AdapterDenoiser):
            save_file(lora_weights(student), beside / LORA)
            notes |= {"rank": student.adapter.rank, "alpha": student.adapter.alpha}
        if adapter and hasattr(teacher.pipeline, "load_lora_weights"):  # PixArt's has none
            notes |= {"base": vars(teacher.source), "resolution": teacher.resolution}
        else:
            whole(teacher, student.merged(), method.student_timesteps).save_pretrained(beside)
            forget_origins(beside)
        (beside / "README.md").write_text(card, "utf-8")
        (beside / NOTES).write_text(json.dumps(notes, indent=2))
    return folder


def plain_guidance(teacher: Teacher, guidance: float) -> float:
    """The `guidance_scale` of a student's plain call: the teacher's where the network is told it,
    none elsewhere, as it is part of the weights.
    """
    return guidance if teacher.family.embeds_guidance(teacher.pipeline) else 0.0


def whole(teacher: Teacher, network: nn.Module, steps: tuple[int, ...]) -> Any:
    """The teacher's pipeline with another network and the scheduler of its steps.

    Where an SD3 teacher has no T5, it has one that says nothing: the plain call does not load a
    folder without.
    """
    parts = dict(teacher.pipeline.components)
    if "text_encoder_3" in parts and parts["text_encoder_3"] is None:
        width = teacher.pipeline.transformer.config.joint_attention_dim
        parts["text_encoder_3"], parts["tokenizer_3"] = silent_t5(width)
    parts[teacher.family.network] = network
    parts["scheduler"] = scheduler_for(teacher, steps)
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    return type(teacher.pipeline)(**parts, **extra)


def lora_weights(student: AdapterDenoiser) -> dict[str, Tensor]:
    """An adapter by the names that diffusers loads, its scale in B: alpha is the rank."""
    scale = student.adapter.alpha / student.adapter.rank
    return {
        f"{student.family.network}.{name}": (p * scale if ".lora_B." in name else p).contiguous()
        for name, p in student.state_dict().items()
    }


def read_student(student: NetworkDenoiser, folder: Path) -> None:
    """Fills `student` from a folder that `write_student` wrote, or from any pipeline of its kind.

    Raises UserError for weights of another network.
    """
    if not isinstance(student, AdapterDenoiser):
        checkpoint.load_network(student.network, folder, student.family.network)
        return
    path, unscaled = folder / LORA, student.adapter.rank / student.adapter.alpha
    try:
        read, own = load_file(path), dict(student.named_parameters())
        wanted = {f"{student.family.network}.{name}" for name in own}
        if odd := sorted(wanted ^ read.keys()):
            raise ValueError(f"layers differ, e.g. {odd[0]}")
        with torch.no_grad():
            for name, p in own.items():
                value = read[f"{student.family.network}.{name}"]
                p.copy_(value * unscaled if ".lora_B." in name else value)
    except (OSError, SafetensorError, RuntimeError, ValueError) as e:
        raise UserError(
            f"{path} cannot be read as a LoRA of this run ({e}); give one of the same teacher, "
            "lora.rank and lora.lora_layers"
        ) from e


def load_student(folder: Path) -> Teacher | None:
    """A student that is a LoRA, on its base, ready to draw; None for anything else."""
    notes = notes_of(folder)
    if notes is None or notes.base is None:
        return None
    teacher = load_pipeline(Pipeline(**notes.base))
    fuse(teacher.pipeline, str(folder), 1.0)
    teacher.pipeline.scheduler = scheduler_for(teacher, notes.steps)
    teacher.resolution = notes.resolution
    return teacher


@dataclass(frozen=True)
class Notes:
    """What a student folder says of itself beside its weights."""

    steps: tuple[int, ...]
    guidance: float  # of the teacher that it was distilled from
    averaged: int
    base: dict[str, Any] | None = None  # of a LoRA: the pipeline that it belongs to
    resolution: int = 0


def notes_of(folder: Path) -> Notes | None:
    """The notes of a student; None for any other pipeline. Raises UserError for broken ones."""
    path = folder / NOTES
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text("utf-8"))
        steps = tuple(int(t) for t in said["student_timesteps"])
        guidance = float(said["teacher_guidance_scale"])
        return Notes(
            steps,
            guidance,
            int(said.get("averaged_updates", 0)),
            said.get("base"),
            int(said.get("resolution", 0)),
        )
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} cannot be read as a student's notes: {e!r}") from e


def trained_steps(folder: Path) -> tuple[int, ...] | None:
    """The steps a student folder was trained for; None for any other pipeline."""
    notes = notes_of(folder)
    return notes.steps if notes else None


def model_card(name: str, teacher: Teacher, method: Method, guidance_note: str) -> str:
    """README.md of a student: how to call it, what it was trained from, what it cannot do."""
    steps = method.student_timesteps
    comfy = (
        "sampler `lcm`, scheduler `simple`, cfg 1"
        if teacher.family.kind == "score"
        else "sampler `lcm`, scheduler `simple`, cfg 1, ModelSamplingSD3 shift 1"
    )
    return f"""---
base_model: {teacher.folder.name}
license: other
library_name: diffusers
tags:
- text-to-image
- diffusers
- distillation
- flash-dmd
---

# {name}

A {len(steps)}-step student of `{teacher.folder.name}`, distilled with FlashDMD.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
image = pipe(prompt="your prompt", num_inference_steps={len(steps)}, guidance_scale=0).images[0]
```

Guidance is part of the weights: leave `guidance_scale` at 0; negative prompts have no effect.
{guidance_note}

- Trained steps (network times): {", ".join(map(str, steps))}; others are off the trained grid.
- ComfyUI: {comfy}, {len(steps)} steps.
- Teacher guidance while distilling: {method.teacher_guidance_scale}.
- The licence of the base model applies.
"""
