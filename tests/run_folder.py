"""A run folder such as training and evaluation leave, with real emoji for pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFilter

from flashdmd.emoji.world import World
from flashdmd.report.sheet import contact_sheet, picture_of

ARMS = ("teacher-50", "teacher-4", "student-stage1", "student-joint")
ROWS: list[dict[str, Any]] = [
    {"arm": "teacher-50", "nfe": 100, "kid": 0.0123, "kid_ci": [0.0108, 0.0139], "retrieval": 0.412,
     "reward": 0.18, "held_out_reward": 0.243, "diversity": 0.561, "seconds_per_image": 1.92},
    {"arm": "teacher-4", "nfe": 8, "kid": 0.0571, "kid_ci": [0.0534, 0.0607], "retrieval": 0.207,
     "reward": -0.31, "held_out_reward": 0.164, "diversity": 0.433, "seconds_per_image": 0.154},
    {"arm": "student-stage1", "nfe": 4, "kid": 0.0131, "kid_ci": [0.0115, 0.0148],
     "retrieval": 0.401, "reward": 0.11, "held_out_reward": 0.236, "diversity": 0.538,
     "seconds_per_image": 0.081},
    {"arm": "student-joint", "nfe": 4, "kid": 0.0128, "kid_ci": [0.0112, 0.0145],
     "retrieval": 0.437, "reward": 0.47, "held_out_reward": 0.259, "diversity": 0.529,
     "seconds_per_image": 0.081},
]  # fmt: skip
RECIPE = """\
model:
  pretrained_model_name_or_path: embedded:score
data:
  prompts: embedded:train
method:
  student_timesteps: [999, 749, 499, 249]
  teacher_guidance_scale: 3.0
  ttur: 2
train:
  max_train_steps: 1000
  train_batch_size: 32
  seed: 0
output_dir: runs/demo
"""


def pictures(world: World, n: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Prompts and real renderings, (n, 3, 64, 64), of held-out emoji."""
    rng = np.random.default_rng(seed)
    chosen = [int(i) for i in rng.choice(world.indices("test"), n, replace=False)]
    return [world.emoji[i].prompt for i in chosen], np.stack([world.render(i, rng) for i in chosen])


def blurred(images: np.ndarray, radius: float) -> np.ndarray:
    soft = [picture_of(image).filter(ImageFilter.GaussianBlur(radius)) for image in images]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in soft])


def training_log(distill: int = 600, joint: int = 900) -> list[dict[str, Any]]:
    """Lines in the order of the real cycles: TTUR 2, then five preference updates to two others."""
    rng = np.random.default_rng(0)

    def wobble(size: float, spread: float = 0.15) -> float:
        return float(size * np.exp(spread * rng.standard_normal()))

    lines: list[dict[str, Any]] = []
    images = updates = 0
    for n in range(distill + joint):
        stage, at = ("distill", n) if n < distill else ("joint", n - distill)
        turn = at % 2 if stage == "distill" else at % 7
        line: dict[str, Any] = {"iteration": at, "stage": stage, "arm": "flash-dmd"}
        settled = 1 - np.exp(-n / 150)
        if turn < 2:
            images += 32
            line |= {
                "diffusion": wobble(0.11 - 0.02 * settled, 0.25),
                "score/grad_norm": wobble(0.6),
                "hinge": wobble(2 - 0.7 * settled, 0.08),
                "discriminator/real": wobble(0.42 * settled + 0.02),
                "discriminator/fake": -wobble(0.38 * settled + 0.02),
                "discriminator/grad_norm": wobble(1.4),
            }
        if turn == 0:
            updates += 1
            line |= {
                "matching": float(0.05 * rng.standard_normal()),
                "adversarial": wobble(0.04 * settled + 0.001),
                "generator/grad_norm": wobble(1.6 - 0.9 * settled),
                "generator/grad_norm_matching": wobble(1.5 - 0.9 * settled),
                "generator/grad_norm_adversarial": wobble(0.22),
                "latent/mean": float(0.06 + 0.01 * rng.standard_normal()),
                "latent/std": wobble(0.93 + 0.05 * settled, 0.02),
            }
        if turn >= 2:
            line |= {
                "preference": wobble(0.693 - 0.06 * (1 - np.exp(-at / 400)), 0.05),
                "reward/best": float(0.55 + 0.25 * at / joint + 0.12 * rng.standard_normal()),
                "reward/worst": float(-0.25 + 0.2 * at / joint + 0.12 * rng.standard_normal()),
            }
        lines.append(
            line | {"generator_updates": updates, "images": images, "seconds": wobble(1.9)}
        )
    return lines


def write_samples(run: Path, world: World, n: int, arms: Sequence[str] = ARMS) -> list[str]:
    prompts, real = pictures(world, n)
    _, other = pictures(world, n, seed=1)
    quick = blurred((0.7 * real + 0.3 * other).astype(np.uint8), 1.2)
    stage1 = blurred(real, 0.3)
    by_arm = {"teacher-50": real, "teacher-4": quick, "student-stage1": stage1}
    for arm in arms:
        images = by_arm.get(arm, real[:, :, :, ::-1])
        (run / "samples" / arm).mkdir(parents=True)
        contact_sheet(images, 4).save(run / "samples" / f"{arm}.png")
        for i, image in enumerate(images):
            picture_of(image).save(run / "samples" / arm / f"{i:02d}.png")
    index = {"prompts": prompts, "arms": list(arms), "columns": 4}
    (run / "samples/samples.json").write_text(json.dumps(index))
    return prompts


def write_run(run: Path, world: World, n: int = 12, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A finished run of both stages."""
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in training_log()))
    write_samples(run, world, n)
    metrics = {
        "fingerprint": {
            "judge": "EfficientNet-Lite2",
            "images": 1000,
            "seed": 0,
            "prompts": "3f9c1d",
        },
        "rows": rows,
        "health": [],
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    milliseconds = {"student": 612.0, "teacher": 498.0, "score": 431.0, "discriminator": 176.0,
                    "decode": 121.0, "optimizers": 38.0, "everything else": 41.0}  # fmt: skip
    (run / "timing.json").write_text(json.dumps({"milliseconds": milliseconds, "iterations": 1500}))
    counts = {"total": 1000, "used": 995, "broken": 5, "upscaled": 12}
    says = ["pictures: 995 of 1000 pictures are used; 5 broken; 12 scaled up."]
    (run / "data.json").write_text(json.dumps({"caveat": "", "says": says, "counts": counts}))
    versions = {
        "flashdmd": "0.1.0",
        "torch": "2.13.0+cpu",
        "diffusers": "0.42.1",
        "python": "3.11.2",
    }
    (run / "versions.json").write_text(json.dumps(versions))
    return run
