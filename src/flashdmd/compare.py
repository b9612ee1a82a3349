"""Methods side by side: every arm from the same teacher, several seeds, one protocol, one table.

A seed is one of training, of the noise that pictures are drawn from and of the real renderings
they are compared with, for the teacher as well: the intervals hold all that chance decides.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from flashdmd import run
from flashdmd.baselines import TTUR
from flashdmd.config import Recipe, apply, build
from flashdmd.drawing import Arm
from flashdmd.emoji import judge
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import UserError
from flashdmd.evaluate.protocol import Bench, Protocol
from flashdmd.files import write_text
from flashdmd.loading import load_reward, load_teacher
from flashdmd.models.teacher import Teacher
from flashdmd.report.run import parsed, unrolled
from flashdmd.seeds import seed_of
from flashdmd.session import write_json
from flashdmd.sources import EMOJI

FIGURES = ("kid", "retrieval", "reward", "held_out_reward", "diversity")
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided, 1..9 degrees of freedom
STAGE_1, JOINT = "flash-dmd, stage 1", "flash-dmd, joint RL"
RL, RL_ONLY = "stage 1, then RL alone", "RL alone, no distillation"
DMD2 = "dmd2, equal cost"


@dataclass(frozen=True)
class Planned:
    """A run of the comparison, and which of its students stand in the table under which name."""

    folder: str
    changes: Callable[[Recipe, Path], dict[str, Any]]  # (recipe, folder of this seed) -> overrides
    students: dict[str, str]


def flash(recipe: Recipe, _: Path) -> dict[str, Any]:
    return {"train.arm": "flash-dmd", "train.stage2": "joint"}


def dmd2(recipe: Recipe, _: Path) -> dict[str, Any]:
    """As many images as stage 1 of Flash-DMD: fewer generator updates, at DMD2's ttur."""
    iterations = recipe.train.max_train_steps * recipe.method.ttur
    if iterations % TTUR:
        raise UserError(
            f"train.max_train_steps={recipe.train.max_train_steps} at method.ttur="
            f"{recipe.method.ttur} is {iterations} iterations, which DMD2 cannot match: it makes a "
            f"generator update in {TTUR}; choose max_train_steps so that {TTUR} divides it"
        )
    return {
        "train.arm": "dmd2",
        "train.max_train_steps": iterations // TTUR,
        "train.joint_train_steps": 0,
    }


def rl(recipe: Recipe, seed: Path) -> dict[str, Any]:
    """As many preference updates as the joint stage makes, on the same student, without it."""
    student = str(seed / "flash-dmd/student-stage1")
    return rl_only(recipe, seed) | {"model.student_model_name_or_path": student}


def rl_only(recipe: Recipe, _: Path) -> dict[str, Any]:
    """The same preference updates on the teacher itself, walking the student's few steps."""
    updates = recipe.train.joint_train_steps * recipe.method.preferences_per_distillation
    return {"train.max_train_steps": 0, "train.stage2": "rl", "train.joint_train_steps": updates}


PLAN = {
    "flash-dmd": Planned("flash-dmd", flash, {STAGE_1: "student-stage1", JOINT: "student"}),
    "rl": Planned("rl", rl, {RL: "student"}),
    "rl-only": Planned("rl-only", rl_only, {RL_ONLY: "student"}),
    "dmd2": Planned("dmd2", dmd2, {DMD2: "student"}),
}


def compare(recipe: Recipe, seeds: Sequence[int], arms: Sequence[str], output: Path) -> Path:
    """Trains each arm with each seed, measures students and teacher by seed, writes comparison.md.

    Training that is finished is not done again, so a comparison that was stopped goes on. Raises
    UserError for an unknown arm, or one that needs another which is not there.
    """
    if unknown := [a for a in arms if a not in PLAN]:
        raise UserError(f"there is no arm {unknown[0]!r}; there are {', '.join(PLAN)}")
    if "rl" in arms and "flash-dmd" not in arms:
        raise UserError("the arm 'rl' starts from the students of 'flash-dmd': name both")
    stage_2 = recipe.train.joint_train_steps * recipe.method.preferences_per_distillation
    if not recipe.train.max_train_steps:
        raise UserError(
            "train.max_train_steps=0: a comparison starts with stage 1; name the generator updates"
        )
    if recipe.data.train_data_dir != EMOJI:
        raise UserError(
            f"data.train_data_dir={recipe.data.train_data_dir}: arms are compared by a judge "
            "of the embedded pictures; `flashdmd train` each, which measures by its own pictures"
        )
    if (preferring := [a for a in arms if a in ("rl", "rl-only")]) and not stage_2:
        raise UserError(
            f"the arm {preferring[0]!r} makes as many preference updates as stage 2, which makes "
            f"none: train.joint_train_steps={recipe.train.joint_train_steps}, "
            f"method.preferences_per_distillation={recipe.method.preferences_per_distillation}"
        )
    recipes = {
        (arm, seed): variant(recipe, PLAN[arm], seed, output / f"seed-{seed}")
        for seed in seeds
        for arm in PLAN  # in this order: "rl" takes over from "flash-dmd"
        if arm in arms
    }
    for one in recipes.values():
        run.train(one)
    teacher = load_teacher(recipe.model.pretrained_model_name_or_path)
    reward_name = recipe.model.reward_model_name_or_path
    reward = load_reward(reward_name, teacher) if reward_name else None
    score = run.scorer(reward, teacher) if reward else None
    rows, fingerprints = [], []
    for seed in seeds:
        mine = {arm: one for (arm, s), one in recipes.items() if s == seed}
        bench = bench_of(recipe, seed)
        rows.append(bench.measure(run.REAL, 0, bench.draw_real, None) | {"seed": seed})
        drawers = teachers(recipe, teacher) | students(recipe, mine)
        for name, (drawer, spent) in tqdm(drawers.items(), desc=f"measure seed {seed}", unit="arm"):
            rows.append(
                bench.measure(name, drawer.nfe, drawer.draw, score) | spent | {"seed": seed}
            )
        fingerprints.append(bench.fingerprint(reward.network if reward else None))
    write_json(output / "comparison.json", {"fingerprints": fingerprints, "rows": rows})
    write_text(output / "comparison.md", table(rows))
    return output / "comparison.md"


def bench_of(recipe: Recipe, seed: int) -> Bench:
    """The recipe's protocol with noise and real renderings of this seed."""
    validation = recipe.validation
    protocol = Protocol(num_prompts=validation.num_prompts, seed=seed_of(validation.seed, seed))
    return Bench(protocol, judge.load(ASSETS / "judge"))


def teachers(recipe: Recipe, teacher: Teacher) -> dict[str, tuple[Arm, dict[str, int]]]:
    """The teacher at the steps it is known for and at the student's, guided as it is distilled."""
    guidance = recipe.method.teacher_guidance_scale
    few = len(recipe.method.student_timesteps)
    return {
        f"teacher, {n} steps": (Arm(teacher, n, guidance), {})
        for n in (recipe.validation.teacher_steps, few)
    }


def students(recipe: Recipe, trained: dict[str, Recipe]) -> dict[str, tuple[Arm, dict[str, int]]]:
    """The students that the runs of one seed left, each with what it cost."""
    few = len(recipe.method.student_timesteps)
    return {
        name: (Arm(load_teacher(str(folder)), few, 0.0), cost(folder.parent, name))
        for arm, one in trained.items()
        for name, part in PLAN[arm].students.items()
        if (folder := Path(one.output_dir) / part).is_dir()
        and (name != JOINT or one.train.joint_train_steps)
    }


def variant(recipe: Recipe, planned: Planned, seed: int, folder: Path) -> Recipe:
    """The recipe of one arm and seed."""
    own = {"train.seed": seed, "output_dir": str(folder / planned.folder)}
    changes = planned.changes(recipe, folder) | own
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    content = apply(json.loads(recipe.model_dump_json()), overrides)
    return build(content, f"{planned.folder}, a part of the comparison")


def cost(folder: Path, name: str) -> dict[str, int]:
    """What a student cost from the teacher on, as the logs of its runs counted it."""
    records = unrolled(parsed((folder / "metrics.jsonl").read_text("utf-8"))[0])
    if name == STAGE_1:
        records = [r for r in records if r["stage"] == "distill"]
    last = {k: int(records[-1][k]) for k in ("images", "generator_updates")}
    counts = last | {"preference_updates": sum("preference" in r for r in records)}
    if name == RL:  # its stage 1 is another run's
        first = cost(folder.with_name(PLAN["flash-dmd"].folder), STAGE_1)
        counts = {k: v + first[k] for k, v in counts.items()}
    return counts


def spread(values: Sequence[float]) -> str:
    """Mean and, from two seeds on, the half width of its 95 % interval (Student's t)."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    quantile = T_95[min(len(values) - 2, len(T_95) - 1)]  # beyond: a little too wide
    return f"{mean(values):.3f} ± {quantile * stdev(values) / len(values) ** 0.5:.3f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line an arm, over its seeds; without the columns that would be empty."""
    counted = ("images", "generator_updates", "preference_updates")
    names = ("arm", "seeds", "calls", *counted, *FIGURES)
    heads = tuple(name.replace("_", " ") for name in names)
    lines: list[tuple[str, ...]] = [heads, ("---",) * len(heads)]
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        counts = [str(mine[0].get(k, "")) for k in counted]
        figures = [
            spread([row[k] for row in mine]) if mine[0][k] is not None else "" for k in FIGURES
        ]
        lines.append((name, str(len(mine)), str(mine[0]["nfe"]), *counts, *figures))
    told = [i for i in range(len(names)) if any(line[i] for line in lines[2:])]
    return "".join(f"| {' | '.join(line[i] for i in told)} |\n" for line in lines)
