"""Measuring the student while a run goes on, so that its best checkpoint is kept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashdmd import checkpoint
from flashdmd.config import Recipe
from flashdmd.drawing import Standing
from flashdmd.errors import UserError
from flashdmd.evaluate.own import OwnBench
from flashdmd.evaluate.protocol import Bench, Score
from flashdmd.sampler import Sampler
from flashdmd.session import Session
from flashdmd.sources import EMOJI

SIGNS = {"kid": -1, "retrieval": 1, "reward": 1, "held_out_reward": 1, "diversity": 1}  # 1: more
JUDGED = {"retrieval", "held_out_reward"}  # by the embedded judge alone


def check_metric(recipe: Recipe) -> None:
    """Raises UserError for a best_metric that this run will not be measured by."""
    asked, reward = recipe.validation.best_metric, recipe.model.reward_model_name_or_path
    missing = set() if recipe.data.train_data_dir == EMOJI else set(JUDGED)
    if reward is None:
        missing.add("reward")
    if asked in missing:
        why = (
            "there is no model.reward_model_name_or_path"
            if asked == "reward"
            else f"it is the judge's of the embedded pictures, and data.train_data_dir is "
            f"{recipe.data.train_data_dir!r}"
        )
        given = ", ".join(name for name in SIGNS if name not in missing)
        raise UserError(f"validation.best_metric={asked}: {why}; this run can have {given}")


def measure_of(
    session: Session, bench: Bench | OwnBench, score: Score | None
) -> Callable[[str], dict[str, Any]]:
    """Measures the student as it stands, in a stage: a row of the table that ends the run."""
    sampler = Sampler(session.teacher.process, session.recipe.method.student_timesteps)
    student = Standing(session.teacher, session.student, sampler)

    def measure(stage: str) -> dict[str, Any]:
        arm = "student-stage1" if stage == "distill" else f"student-{stage}"
        with session.stopwatch.stopped():
            return bench.measure(arm, student.nfe, student.draw, score)

    return measure


def worth_of(recipe: Recipe) -> Callable[[Path], float | None] | None:
    """By what the best checkpoint is the best: more is better; None for one that was measured
    otherwise, or not at all.
    """
    metric = recipe.validation.best_metric
    if metric is None:
        return None
    name, now = metric, measured_on(recipe.model_dump(mode="json"))

    def worth(folder: Path) -> float | None:
        about = checkpoint.state_of(folder)["about"]
        value = about["metrics"].get(name)
        if value is None or not math.isfinite(value) or measured_on(about["recipe"]) != now:
            return None
        return SIGNS[name] * float(value)

    return worth


def measured_on(recipe: dict[str, Any]) -> list[Any]:
    said = recipe["validation"]
    return [said[name] for name in ("prompts", "num_prompts", "seed")]
