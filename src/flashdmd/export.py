"""The student as a stock diffusers pipeline folder: the plain call runs the trained steps."""

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flashdmd import checkpoint, distributed
from flashdmd.algorithm import Method
from flashdmd.config import describe
from flashdmd.errors import UserError
from flashdmd.files import forget_origins, replace_folder
from flashdmd.models.denoiser import AdapterDenoiser, NetworkDenoiser
from flashdmd.models.families import Family
from flashdmd.models.families.silent import silent_t5
from flashdmd.models.lora_keys import FILE_NAME as LORA
from flashdmd.models.lora_keys import to_diffusers
from flashdmd.models.teacher import Pipeline, Teacher
from flashdmd.schedule import STEPS

NOTES = "flashdmd.json"  # beside the weights: how they are used, for `flashdmd sample`
Time = Annotated[int, Field(ge=1, le=STEPS)]
NEAR = 0.5  # of a network time: as near to its steps as the plain call has to take a student


@dataclass(frozen=True)
class Notes:
    """What a student folder says of itself beside its weights."""

    steps: tuple[int, ...]
    guidance: float  # of the teacher that it was distilled from
    averaged: int = 0  # updates in the weights
    teacher: dict[str, Any] | None = None  # where the teacher was loaded from
    rank: int = 0  # of a LoRA; 0: the whole pipeline is there
    resolution: int = 0  # pixels across; 0: what the network was made for

    def write(self, folder: Path) -> None:
        said = {
            "student_timesteps": self.steps,
            "teacher_guidance_scale": self.guidance,
            "averaged_updates": self.averaged,
            "teacher": self.teacher,
            "lora_rank": self.rank,
            "resolution": self.resolution,
        }
        (folder / NOTES).write_text(json.dumps(said, indent=2))


class Said(BaseModel, strict=True, allow_inf_nan=False):
    """What a notes file holds; the keys that came later may be missing."""

    student_timesteps: Annotated[tuple[Time, ...], Field(min_length=1)]
    teacher_guidance_scale: float
    averaged_updates: Annotated[int, Field(ge=0)] = 0
    teacher: Pipeline | None = None
    lora_rank: Annotated[int, Field(ge=0)] = 0
    resolution: Annotated[int, Field(ge=0)] = 0


def notes_of(folder: Path) -> Notes | None:
    """The notes of a student; None for any other pipeline. Raises UserError for broken ones."""
    path = folder / NOTES
    if not path.is_file():
        return None
    try:
        said = Said.model_validate_json(path.read_bytes())
    except ValidationError as e:
        wrong = "; ".join(describe(error) for error in e.errors())
        raise UserError(f"{path} cannot be read as a student's notes: {wrong}") from e
    return Notes(
        said.student_timesteps,
        said.teacher_guidance_scale,
        said.averaged_updates,
        vars(said.teacher) if said.teacher else None,
        said.lora_rank,
        said.resolution,
    )


def scheduler_for(teacher: Teacher, steps: tuple[int, ...]) -> Any:
    """A diffusers scheduler with which the pipeline's plain call walks `steps`.

    Raises UserError when no setting of the stock scheduler does.
    """
    return stock_scheduler(teacher.family, teacher.pipeline, steps)


def stock_scheduler(family: Family, pipeline: Any, steps: tuple[int, ...]) -> Any:
    """As `scheduler_for`, of a pipeline whose configurations alone are looked at."""
    scheduler = family.scheduler(pipeline, steps)
    got = family.grid(pipeline, scheduler, len(steps))
    if len(got) != len(steps) or max(abs(a - b) for a, b in zip(got, steps, strict=True)) > NEAR:
        raise UserError(
            f"student_timesteps={steps} cannot be written as a stock scheduler's grid, that would "
            f"be {tuple(round(t, 3) for t in got)}; steps that are equally spaced, or those "
            "shifted, can"
        )
    return scheduler


def notes_for(teacher: Teacher, student: NetworkDenoiser, method: Method, averaged: int) -> Notes:
    source = None if teacher.source is None else vars(teacher.source)
    loads = hasattr(teacher.pipeline, "load_lora_weights")  # PixArt's does not
    rank = student.adapter.rank if isinstance(student, AdapterDenoiser) and loads else 0
    steps, guidance = method.student_timesteps, method.teacher_guidance_scale
    return Notes(steps, guidance, averaged, source, rank, teacher.resolution)


def write_student(
    teacher: Teacher,
    student: NetworkDenoiser,
    method: Method,
    folder: Path,
    note: str = "",
    averaged: int = 0,
) -> Path:
    """Writes `folder` whole or not at all: the teacher's pipeline with the student's network, or
    with LoRA the adapter alone, which `load_lora_weights` reads; both where there is no such
    method.

    `note` goes into its card; `averaged` are the updates in the weights, where a run from this
    student counts on. The weights are float32 as trained.
    """
    notes = notes_for(teacher, student, method, averaged)
    network = None if notes.rank else student.merged()
    if not distributed.first():
        distributed.barrier()
        return folder
    with replace_folder(folder) as beside:
        if isinstance(student, AdapterDenoiser):
            adapter = student.adapter
            file = to_diffusers(
                student.state_dict(), student.family.network, adapter.alpha / adapter.rank
            )
            save_file(file.tensors, beside / LORA, metadata=file.metadata)
        if network is not None:
            whole(teacher, network, method.student_timesteps).save_pretrained(beside)
            forget_origins(beside)
        lora = LORA if notes.rank else ""
        (beside / "README.md").write_text(model_card(folder.name, teacher, notes, note, lora))
        notes.write(beside)
    distributed.barrier()
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
    for part in parts.values():  # how a prompt was padded last is no part of a tokenizer
        if (tokenizer := getattr(part, "backend_tokenizer", None)) is not None:
            tokenizer.no_padding()
            tokenizer.no_truncation()
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    return type(teacher.pipeline)(**parts, **extra)


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


def model_card(name: str, teacher: Teacher, notes: Notes, note: str, lora: str = "") -> str:
    """README.md of a student: how to call it, what it was trained from, what it cannot do.

    `lora` is the file of a student that is a LoRA on the teacher.
    """
    steps, folder = notes.steps, teacher.folder
    base = folder.name if folder.is_absolute() else str(folder)  # homes are nobody's business
    guidance = plain_guidance(teacher, notes.guidance)
    asked = {"num_inference_steps": len(steps), "guidance_scale": guidance} | teacher.family.call
    if notes.resolution not in (0, teacher.family.resolution(teacher.pipeline)):
        asked |= {"height": notes.resolution, "width": notes.resolution}
    said = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in asked.items())
    call = f'pipe(prompt="your prompt", {said})'
    swap = teacher.family.scheduler(teacher.pipeline, steps)
    changed = {k: v for k, v in swap.config.items() if not k.startswith("_") and differs(swap, k)}
    shift = comfy_shift(teacher, steps)
    load = f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base if lora else name)})"
    if lora:
        load += (
            f'\npipe.load_lora_weights({json.dumps(name)}, weight_name="{lora}")\n'
            f"pipe.scheduler = {type(swap).__name__}.from_config(\n"
            f"    pipe.scheduler.config, **{changed!r}\n)"
        )
    names = f"DiffusionPipeline, {type(swap).__name__}" if lora else "DiffusionPipeline"
    tags = ["text-to-image", "diffusers", "distillation", "flash-dmd", *(["lora"] if lora else [])]
    head = {"base_model": base, "license": "other", "library_name": "diffusers", "tags": tags}
    return f"""---
{yaml.safe_dump(head, sort_keys=False, width=10**6)}---

# {prose(name)}

A {len(steps)}-step student of {prose(folder.name)}, distilled with FlashDMD.

```python
from diffusers import {names}

{load}
image = {call}.images[0]
```

Guidance is part of the weights: leave `guidance_scale` at {guidance:g}; negative prompts have no
effect. {note}

- Trained steps (network times): {", ".join(map(str, steps))}; others are off the trained grid.
- ComfyUI: sampler `lcm`, scheduler `simple`, cfg 1, {len(steps)} steps{shift}.
- Teacher guidance while distilling: {notes.guidance}.
- The licence of the base model applies.
"""


def prose(name: str) -> str:
    """A name in Markdown, on one line; nothing in it is markup."""
    return re.sub(r"([\\`*\[\]<>&|~])", r"\\\1", " ".join(name.split()))


def differs(scheduler: Any, key: str) -> bool:
    """Whether a setting of a scheduler is another than its class has by default."""
    default = inspect.signature(type(scheduler).__init__).parameters.get(key)
    return default is not None and default.default != scheduler.config[key]


def comfy_shift(teacher: Teacher, steps: tuple[int, ...]) -> str:
    """The node that sets a flow's shift: both multiply times by what the network is fed, SD3's by
    1000 and AuraFlow's, which serves the others, by 1.
    """
    if teacher.family.kind == "score":
        return ""
    node = "SD3" if "StableDiffusion3Pipeline" in teacher.family.pipelines else "AuraFlow"
    return f", shift {teacher.family.fitting_shift(steps):g} (ModelSampling{node})"
