"""`flashdmd export`: a student in the format of those who are to use it."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashdmd import checkpoint, export
from flashdmd.config import Recipe
from flashdmd.errors import UserError
from flashdmd.export import Notes
from flashdmd.files import forget_origins, replace_file, replace_folder
from flashdmd.loading import load_base, load_teacher, teacher_of
from flashdmd.models import lora_keys, single_file
from flashdmd.models.families.silent import is_silent
from flashdmd.models.teacher import Teacher
from flashdmd.session import learning
from flashdmd.trainer import State

Format = Literal["diffusers", "lora", "comfyui", "single-file"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NOT_DENOISING = ("safety_checker", "image_encoder")


def export_run(
    run: Path, form: str, output: Path, dtype: str = "fp32", rank: int = 64
) -> tuple[Path, str]:
    """Writes the last student of a run, or the one in a student's or a checkpoint's folder; says
    what was lost.

    diffusers: a whole pipeline, a LoRA merged into it. lora: for `load_lora_weights`. comfyui: a
    LoRA by the names that ComfyUI's loader has. single-file: all networks in one file. A LoRA of a
    full fine-tuning is the best one of `rank`. Raises UserError for a format that this student or
    its family cannot have.
    """
    if form not in get_args(Format):
        raise UserError(f"--format {form}: there are {', '.join(get_args(Format))}")
    if output.exists():
        raise UserError(f"--output {output} is there already; name another")
    if (run / checkpoint.STATE).is_file():
        with tempfile.TemporaryDirectory() as beside:
            written = student_at(run, Path(beside) / run.name)
            return export_run(written, form, output, dtype, rank)
    folder, notes = student_in(run)
    note = "" if (folder / lora_keys.FILE_NAME).is_file() else "Every weight was trained."
    student = load_teacher(str(folder), merged=True)
    if form in ("lora", "comfyui"):
        adapter, lost = adapter_of(folder, notes, student, rank)
        name = type(student.pipeline).__name__
        if form == "lora":
            if not hasattr(student.pipeline, "load_lora_weights"):
                raise UserError(
                    f"diffusers loads no LoRA into a {name}; export the whole pipeline with "
                    "--format diffusers"
                )
            file = lora_keys.to_diffusers(adapter, student.family.network)
        else:
            file = lora_keys.to_comfyui(adapter, name)
        tensors = {k: v.to(DTYPES[dtype]) for k, v in file.tensors.items()}
        write_lora(output, tensors, file.metadata, student, notes, note)
        return output, lost
    if dtype != "fp32":  # as they are
        cast(student, dtype)
    if form == "diffusers":
        whole = export.whole(student, student.denoiser.network, notes.steps)
        with replace_folder(output) as beside:
            whole.save_pretrained(beside)
            forget_origins(beside)
            card = export.model_card(output.name, student, notes, note)
            (beside / "README.md").write_text(card, "utf-8")
            replace(notes, rank=0).write(beside)
        return output, ""
    tensors = in_one(student)
    write_file(output, tensors, {"format": "pt"})
    return output, ""


def student_in(run: Path) -> tuple[Path, Notes]:
    """The last student of a run. Raises UserError when there is none."""
    for folder in (run, run / "student", run / "student-stage1"):
        if notes := export.notes_of(folder):
            return folder, notes
    raise UserError(
        f"{run} holds no student; give the output_dir of a run, one of its checkpoints, or a "
        f"student's folder, in which is {export.NOTES}"
    )


def student_at(point: Path, folder: Path) -> Path:
    """Writes `folder`, the student as it was at a checkpoint. Raises UserError for a damaged one,
    or one of other weights than its recipe's.
    """
    if reason := checkpoint.damage(point):
        raise UserError(f"the checkpoint {point} is damaged: {reason}; export another one")
    told = checkpoint.state_of(point)
    recipe = Recipe.model_validate(told["about"]["recipe"])
    state = State(**{name: told[name] for name in State.__dataclass_fields__})
    teacher = teacher_of(recipe)
    student = learning(recipe, teacher).student
    name = "student" if recipe.train.ema_decay else "generator"
    checkpoint.load_weights(point, name, student)
    note = how_made(told["stage"], state)
    return export.write_student(teacher, student, recipe.method, folder, note, state.in_average)


def how_made(stage: str, state: State) -> str:
    """What a student's card says of its training."""
    distilled = state.updates if stage == "distill" else state.before
    updates = distilled.get("generator", 0)
    note = f"Trained by `flashdmd train` for {updates} generator updates."
    if stage == "distill":
        return note
    unit = "preference" if stage == "rl" else "generator"
    done = state.updates.get(unit, 0)
    return f"{note} Then refined (stage 2, {stage}) for {done} {unit} updates."


def adapter_of(
    folder: Path, notes: Notes, student: Teacher, rank: int
) -> tuple[dict[str, Tensor], str]:
    """A LoRA's factors by layer; of a full fine-tuning the best ones, and what they miss."""
    network, lora = student.family.network, folder / lora_keys.FILE_NAME
    if lora.is_file():
        stored = load_file(lora)
        return {k.removeprefix(f"{network}."): v for k, v in stored.items()}, ""
    if notes.teacher is None:
        raise UserError(
            f"{folder} does not say which model it is a student of, so there is no difference to "
            "take; export it with --format diffusers or single-file"
        )
    teacher = load_base(notes.teacher)
    base, tuned = teacher.denoiser.network.state_dict(), student.denoiser.network.state_dict()
    found = lora_keys.from_full(base, tuned, rank)
    worst = max(found.errors, key=lambda name: found.errors[name])
    return dict(found.adapter), (
        f"of what was trained, {found.error:.1%} (norm) is not in this LoRA of rank {rank}; worst: "
        f"{worst}, {found.errors[worst]:.1%}"
    )


def cast(student: Teacher, dtype: str) -> None:
    for part in student.pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(DTYPES[dtype])


def write_lora(
    output: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    student: Teacher,
    notes: Notes,
    note: str,
) -> None:
    """A folder with the LoRA and its card; a name that ends in .safetensors is the file alone."""
    if output.suffix == ".safetensors":
        write_file(output, tensors, metadata)
        return
    with replace_folder(output) as beside:
        save_file(tensors, beside / lora_keys.FILE_NAME, metadata=metadata)
        card = export.model_card(output.name, student, notes, note, lora_keys.FILE_NAME)
        (beside / "README.md").write_text(card, "utf-8")


def write_file(output: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the name of a single file ends in .safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(output) as beside:
        save_file(tensors, beside, metadata=metadata)


def in_one(student: Teacher) -> dict[str, Tensor]:
    """All networks of a pipeline in the layout that was first published."""
    pipeline, network = student.pipeline, student.family.network
    parts = {
        name: part.state_dict()
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) and name not in NOT_DENOISING and not is_silent(part)
    }
    kind = pipeline.scheduler.config.get("prediction_type") if network == "unet" else None
    return single_file.to_single_file(type(pipeline).__name__, parts, kind or "epsilon")
