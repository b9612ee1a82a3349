"""Every family on its real classes at tiny size, in one table: docs/evidence/families.md.

    python benchmarks/families.py [kind ...]

A row is of one kind of pipeline with random weights. Parity: the largest difference between our
guided x_0_hat and what the stock pipeline hands to its scheduler, over three steps, relative to the
largest |x_0_hat| or 1. Stages: two
iterations (of stage 2: one distilling and one preference update), in full and with LoRA; the
largest change of a weight is shown. Back: the largest difference, in 255ths, between the picture of
the student in the run and that of the folder loaded by stock diffusers and called plainly.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import test_family_training as training  # noqa: E402
import test_parity as parity  # noqa: E402
import tiny_dits  # noqa: E402
import tiny_export  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from PIL import Image  # noqa: E402

from flashdmd import export  # noqa: E402
from flashdmd.algorithm import split  # noqa: E402
from flashdmd.config import Recipe  # noqa: E402
from flashdmd.models import latent_reward  # noqa: E402
from flashdmd.models.teacher import Teacher, load_pipeline  # noqa: E402
from flashdmd.publish import export_run  # noqa: E402
from flashdmd.session import Session, open_session  # noqa: E402

KINDS = ("sd1", "sd2", "sdxl", "sd3", "sd3-no-t5", "flux", "schnell", *tiny_dits.MAKE)
REWARDED = ("sd1", "sd2", "sdxl", "sd3", "sd3-no-t5")
SIDE = training.SIDE
OUTPUT = ROOT / "docs/evidence/families.md"


@dataclass
class Row:
    kind: str
    pipeline: str = ""
    parity: dict[float, float] = field(default_factory=dict)  # by guidance
    stages: dict[str, float] = field(default_factory=dict)  # largest change of a weight
    back: dict[str, int] = field(default_factory=dict)  # difference of pictures, 255ths


def measured(kind: str, where: Path) -> Row:
    made = (tiny_dits if kind in tiny_dits.MAKE else tiny_export).pipeline(kind)
    made.save_pretrained(where / "teacher")
    pictures(where / "pictures")
    row = Row(kind, type(made).__name__)
    teacher = load_pipeline(where / "teacher")
    teacher.resolution = SIDE
    for guidance in (1.0, 4.0):
        with pytest.MonkeyPatch.context() as patch:
            seen = parity.stock_steps(teacher, guidance, patch)
        teacher.guidance = guidance
        cond, real = teacher.encode_prompts(parity.PROMPTS), teacher.guided(guidance)
        errors = [relative(real(x_t, t, cond), theirs) for x_t, t, theirs in seen]
        row.parity[guidance] = float(torch.stack(errors).max())
    write_reward(kind, teacher, where)
    for rank in (0, 4):
        mode = "LoRA" if rank else "full"
        run = opened(where, rank)
        row.stages[f"1 {mode}"] = stage(run, "distill", 2)
        run.start = run.trainer("distill").state.for_next_stage()
        run.take_over()
        row.stages[f"2 {mode}"] = stage(run, "joint", 3)
        row.back |= loaded_back(run, where / f"run-{mode}", rank)
    return row


def write_reward(kind: str, teacher: Teacher, where: Path) -> None:
    """An untrained latent reward model: the family's own kind, or a UNet's on its latents."""
    base = str(where / "teacher")
    if kind in REWARDED:
        made = latent_reward.open_base(base)
    else:
        channels = teacher.family.channels(teacher.pipeline)
        made = tiny_export.sd1(in_channels=channels, out_channels=channels)
        made.register_modules(vae=teacher.pipeline.vae)
    latent_reward.write(latent_reward.build(made, base), where / "reward")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The largest difference, to 1 or to the largest number, which is larger at high noise."""
    return (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)


def pictures(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, caption in enumerate(("a red apple", "two small hearts", "a ship at sea")):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)


def opened(where: Path, rank: int) -> Session:
    content: dict[str, Any] = {
        "model": {
            "pretrained_model_name_or_path": str(where / "teacher"),
            "reward_model_name_or_path": str(where / "reward"),
        },
        "lora": {"rank": rank},
        "data": {"train_data_dir": str(where / "pictures"), "resolution": SIDE},
        "discriminator": {"width": 8},
        "method": {
            **split(load_pipeline(where / "teacher").default_steps),
            "teacher_guidance_scale": training.GUIDANCE,
            "gan_gradient_ratio": None,
            "ttur": 1,
        },
        "train": {
            "max_train_steps": 2,
            "joint_train_steps": 1,
            "train_batch_size": 2,
            "preference_batch_size": 2,
            "mixed_precision": "no",
            "ema_decay": 0.0,
            "learning_rate": 1e-3,
            "fake_score_learning_rate": 1e-3,
            "preference_learning_rate": 1e-3,
        },
        "output_dir": str(where / "out"),
    }
    return open_session(Recipe.model_validate(content))


def stage(run: Session, name: Any, iterations: int) -> float:
    """The largest change of the student's weights; FloatingPointError when a loss is not finite."""
    before = [p.detach().clone() for p in run.generator.parameters()]
    trainer = run.trainer(name)
    for _ in range(iterations):
        trainer.iterate()
    changes = zip(run.generator.parameters(), before, strict=True)
    return float(max((p.detach() - q).abs().max() for p, q in changes))


def loaded_back(run: Session, folder: Path, rank: int) -> dict[str, int]:
    """Pictures of the exported student against the run's own walk, noise for noise."""
    with torch.no_grad():
        for p in run.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    teacher, method = run.teacher, run.recipe.method
    export.write_student(teacher, run.student, method, folder / "student")
    export_run(folder, "diffusers", folder / "whole")
    pipelines = {f"diffusers, {'merged' if rank else 'full'}": folder / "whole"}
    made: dict[str, Any] = {k: DiffusionPipeline.from_pretrained(v) for k, v in pipelines.items()}
    if rank and hasattr(teacher.pipeline, "load_lora_weights"):
        stacked = load_pipeline(teacher.folder).pipeline
        stacked.load_lora_weights(folder / "student")
        stacked.scheduler = made["diffusers, merged"].scheduler
        made["load_lora_weights"] = stacked
    steps = method.student_timesteps
    return {
        name: parity.difference(teacher, run.student, pipeline, steps, training.GUIDANCE)[0]
        for name, pipeline in made.items()
    }


def table(rows: list[Row]) -> str:
    head = (
        "# Families, on their real classes at tiny size\n\n"
        "Made by `python benchmarks/families.py`, which says what the columns are.\n\n"
        "| kind | pipeline | parity, guidance 1 | guidance 4 | stage 1 full | LoRA | stage 2 full "
        "| LoRA | back: full | merged | LoRA |\n|" + "---|" * 11 + "\n"
    )
    foot = (
        "\n(a) There is no latent reward model of this family; a UNet's on its latents stands in, "
        "untrained like all here.\n"
    )
    return head + "".join(line(row) for row in rows) + foot


def line(row: Row) -> str:
    stages = [row.stages[f"{n} {mode}"] for n in (1, 2) for mode in ("full", "LoRA")]
    ways = ("diffusers, full", "diffusers, merged", "load_lora_weights")
    cells = [
        row.kind,
        row.pipeline,
        *(f"{e:.0e}" for e in row.parity.values()),
        *(f"{s:.1e}" for s in stages[:2]),
        *(f"{s:.1e}" + ("" if row.kind in REWARDED else " (a)") for s in stages[2:]),
        *(str(row.back.get(way, "no loader")) for way in ways),
    ]
    return "| " + " | ".join(cells) + " |\n"


def main() -> None:
    asked = sys.argv[1:] or KINDS
    rows = []
    for kind in asked:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            rows.append(measured(kind, Path(folder)))
        print(line(rows[-1]), end="", flush=True)
    if len(rows) == len(KINDS):
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.write_text(table(rows))
        print(f"Wrote {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
