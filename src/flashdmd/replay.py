"""An iteration that was not finite, made again from the checkpoint before it."""

import json
from pathlib import Path
from typing import Any

import torch

from flashdmd import checkpoint, config, export
from flashdmd.errors import UserError
from flashdmd.notfinite import texts
from flashdmd.session import Session, open_session
from flashdmd.trainer import Trainer


def replay(kept: Path) -> dict[str, Any]:
    """Makes the iteration of `kept`, a folder in OUTPUT/not-finite, again: what is not finite then,
    and which operation of a backward pass was the first.

    Nothing of the run is changed. Raises UserError where no checkpoint before it is left.
    """
    stage, iteration = where(kept)
    run = kept.parent.parent
    session = open_session(config.load(run / "recipe.yaml", []))
    trainer = before(session, run, stage, iteration)
    while trainer.state.iteration < iteration:
        trainer.iterate()
    first = None
    try:
        with torch.autograd.set_detect_anomaly(True):
            trainer.iterate()
    except RuntimeError as e:
        if "returned nan" not in str(e):
            raise
        first = str(e)
    bad = trainer.bad.facts["not_finite"] if trainer.bad and first is None else {}
    return {
        "stage": stage,
        "iteration": iteration,
        "finite": first is None and not bad,
        "not_finite": texts(bad),
        "first_operation": first,
    }


def where(kept: Path) -> tuple[str, int]:
    """Stage and iteration of what was kept. Raises UserError for another folder."""
    try:
        facts = json.loads((kept / "facts.json").read_text("utf-8"))
        return str(facts["stage"]), int(facts["iteration"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{kept} holds no iteration that was kept ({e!r}); give a folder in not-finite of a run"
        ) from e


def before(session: Session, run: Path, stage: str, iteration: int) -> Trainer:
    """The trainer of a stage at the newest checkpoint that is not after an iteration."""
    points = []
    for folder in checkpoint.all_of(run):
        if checkpoint.damage(folder) is None:
            told = checkpoint.state_of(folder)
            if told["stage"] == stage and told["iteration"] <= iteration:
                points.append(folder)
    if not points and stage != "distill":
        raise UserError(
            f"{run} has no checkpoint of stage {stage} up to iteration {iteration}; more are kept "
            "with train.checkpoints_total_limit"
        )
    if stage == "distill":
        trainer = session.trainer("distill")
    else:
        export.read_student(session.student, run / "student-stage1")
        session.take_over()
        trainer = session.trainer(session.recipe.train.stage2)
    if points:
        trainer.restore(points[-1])
    return trainer
