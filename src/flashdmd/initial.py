"""`flashdmd config init`: a complete, commented recipe for a model, right for its family.

What each key means is read from the comments beside the fields, so it is said in one place.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flashdmd import algorithm, config
from flashdmd.config import SECTIONS, Recipe
from flashdmd.errors import UserError
from flashdmd.models.families import Family
from flashdmd.models.teacher import family_of, index_of, part_config
from flashdmd.plain import written
from flashdmd.reference import comments

PROMPTS = "prompts.txt"
LORA_RANK = 64  # [DEF] LPO's and DMD2's for SDXL


def initial(model: str, full: bool = False) -> str:
    """YAML of a recipe that lacks nothing but prompts in prompts.txt.

    LoRA on a frozen base, or `full` fine-tuning. Raises UserError for a model that is not to be
    found or of a family that is not supported.
    """
    entries = index_of(model)
    family = family_of(model, entries)
    scheduler = part_config(model, "scheduler")
    plan = values(model, family, scheduler, full)
    recipe = config.build(plan, f"the recipe for {model}")
    head = (
        f"# FlashDMD for {model}, a {entries['_class_name']}: a start, not a result of ours.\n"
        f"# Put one prompt a line into {PROMPTS}, look at `flashdmd doctor` of this file, then\n"
        "# `flashdmd train` it. [DEF] marks a number that the paper does not give.\n"
    )
    return head + commented(recipe)


def values(model: str, family: Family, scheduler: dict[str, Any], full: bool) -> dict[str, Any]:
    """What a recipe for this family says otherwise than the defaults."""
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(config=scheduler))
    flow = family.kind == "flow"
    method: dict[str, Any] = {
        **algorithm.split(family.steps(pipeline)),
        "teacher_guidance_scale": family.guidance,
    }
    if flow:
        method |= {"score_times": "logit_normal", "renoise_shift": family.shift(pipeline)}
    batch = 32 if flow else 64
    return {
        "model": {
            "pretrained_model_name_or_path": model,
            "reward_model_name_or_path": None,
            "frozen_dtype": "bf16",
        },
        "lora": {"rank": 0 if full else LORA_RANK},
        "discriminator": {"backbone": "facebook/sam-vit-base", "width": 256, "crop": 64},
        "data": {"train_data_dir": "teacher", "prompts": PROMPTS, "cache_text_embeddings": True},
        "method": method,
        "train": {
            "joint_train_steps": 0,
            "train_batch_size": batch,
            "gradient_accumulation_steps": batch,
            "preference_batch_size": batch,
            "gradient_checkpointing": True,
            "lr_warmup_steps": 50,
        },
        "output_dir": f"runs/{Path(model).name}",
    }


def commented(recipe: Recipe) -> str:
    """YAML of every key, each with the comment of its field; loads back to an equal recipe."""
    lines = []
    for section, content in json.loads(recipe.model_dump_json()).items():
        if section not in SECTIONS:
            lines.append(f"{section}: {json.dumps(content)}")
            continue
        lines.append(f"{section}:")
        said = comments(SECTIONS[section])
        if section == "method":
            said["teacher_guidance_scale"] = "[DEF] this family's (docs/families.md)"
        if section == "train" and recipe.lora.rank:
            said |= LORA_COMMENTS
        for key, value in content.items():
            text = written(value, default_flow_style=True, width=1000).strip()
            line = f"  {key}: {text.removesuffix('...').strip()}"
            about = said.get(key, "").replace("None", "null")
            lines.append(f"{line:<48}  # {about}" if about else line)
    return "\n".join(lines) + "\n"


LORA_COMMENTS = {  # beside `config.LORA_DEFAULTS`
    "learning_rate": "[DEF] G, LoRA of SD3-medium: RTDMD's (DMD2's LoRA: 5e-5)",
    "fake_score_learning_rate": "[DEF] psi: as G",
    "preference_learning_rate": "[DEF] G in stage 2: LPO's LoRA; own moments",
    "max_grad_norm": "[DEF] of student and score estimator: RTDMD's",
}


def write(model: str, path: Path, full: bool = False) -> Path:
    """Raises UserError for a file that is there already."""
    if path.exists():
        raise UserError(f"{path} is there already; name another file with --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(initial(model, full), "utf-8")
    return path
