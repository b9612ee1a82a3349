"""The student as a stock diffusers pipeline folder: the plain call runs the trained steps."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from flashdmd.algorithm import Method
from flashdmd.emoji.flow import silent_t5
from flashdmd.errors import UserError
from flashdmd.files import forget_origins, replace_folder
from flashdmd.models.families import NetworkDenoiser, Teacher

# Any multiple of the number of steps gives LCMScheduler the grid 999, 999 - 1000/n, ...; with 40
# students of 1, 2, 4 and 8 steps are all right. Its default of 50 gives 999, 759, 499, 259.
ORIGINAL_INFERENCE_STEPS = 40
NOTES = "flashdmd.json"  # beside model_index.json: the trained steps, for `flashdmd sample`


def scheduler_for(teacher: Teacher, steps: tuple[int, ...]) -> Any:
    """A diffusers scheduler whose `set_timesteps(len(steps))` gives exactly `steps`.

    Raises UserError when no setting of the stock scheduler does.
    """
    if teacher.family.kind == "score":
        known = inspect.signature(LCMScheduler.__init__).parameters
        shared = {k: v for k, v in teacher.pipeline.scheduler.config.items() if k in known}
        ours = {
            "original_inference_steps": ORIGINAL_INFERENCE_STEPS,
            "timestep_spacing": "leading",
            "clip_sample": False,
        }
        scheduler = LCMScheduler(**(shared | ours))
    else:
        # The plain grid runs from 1 to 1/1000; stretched, it ends at the student's last step.
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            shift_terminal=steps[-1] / 1000 if len(steps) > 1 else None,
            stochastic_sampling=True,
        )
    scheduler.set_timesteps(len(steps))
    got = tuple(round(float(t), 3) for t in scheduler.timesteps)
    if got != tuple(float(t) for t in steps):
        raise UserError(
            f"student_timesteps={steps} cannot be written as a stock scheduler's grid, which would "
            f"be {got}; equally spaced steps can"
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
    """Writes `folder` whole or not at all: the teacher's pipeline with the student's network.

    `card` becomes README.md; `averaged` are the updates in the weights, where a run from this
    student counts on. The weights are float32 as trained. Where an SD3 teacher has no T5, the
    student has one that says nothing: the plain call does not load a folder without.
    """
    parts = dict(teacher.pipeline.components)
    if "text_encoder_3" in parts and parts["text_encoder_3"] is None:
        width = teacher.pipeline.transformer.config.joint_attention_dim
        parts["text_encoder_3"], parts["tokenizer_3"] = silent_t5(width)
    parts[teacher.family.network] = student.network
    parts["scheduler"] = scheduler_for(teacher, method.student_timesteps)
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipeline = type(teacher.pipeline)(**parts, **extra)
    notes = {
        "student_timesteps": method.student_timesteps,
        "teacher_guidance_scale": method.teacher_guidance_scale,
        "averaged_updates": averaged,
    }
    with replace_folder(folder) as beside:
        pipeline.save_pretrained(beside, safe_serialization=True)
        forget_origins(beside)
        (beside / "README.md").write_text(card, "utf-8")
        (beside / NOTES).write_text(json.dumps(notes, indent=2))
    return folder


@dataclass(frozen=True)
class Notes:
    """What a student folder says of itself beside its weights."""

    steps: tuple[int, ...]
    guidance: float  # of the teacher that it was distilled from
    averaged: int


def notes_of(folder: Path) -> Notes | None:
    """The notes of a student; None for any other pipeline. Raises UserError for broken ones."""
    path = folder / NOTES
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text("utf-8"))
        steps = tuple(int(t) for t in said["student_timesteps"])
        guidance = float(said["teacher_guidance_scale"])
        return Notes(steps, guidance, int(said.get("averaged_updates", 0)))
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
image = pipe("your prompt", num_inference_steps={len(steps)}, guidance_scale=0).images[0]
```

Guidance is part of the weights: leave `guidance_scale` at 0; negative prompts have no effect.
{guidance_note}

- Trained steps (network times): {", ".join(map(str, steps))}; others are off the trained grid.
- ComfyUI: {comfy}, {len(steps)} steps.
- Teacher guidance while distilling: {method.teacher_guidance_scale}.
- The licence of the base model applies.
"""
