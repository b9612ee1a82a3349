"""Whether a run may go on from what is in its folder: with which changes, from which student."""

import json
import logging
from pathlib import Path
from typing import Any

from flashdmd import checkpoint, config, export
from flashdmd.config import Recipe
from flashdmd.errors import UserError
from flashdmd.sources import EMOJI, OWN

RATES = {  # a run that left the finite is gone on with at lower ones
    "train.learning_rate",
    "train.fake_score_learning_rate",
    "train.discriminator_learning_rate",
    "train.preference_learning_rate",
    "train.stage2_learning_rate",
    "train.max_grad_norm",
    "train.discriminator_max_grad_norm",
    "train.preference_max_grad_norm",
}
MAY_CHANGE = RATES | {  # keys that a resumed run may have otherwise than the run it goes on from
    "train.max_train_steps",
    "train.joint_train_steps",
    "train.checkpointing_steps",
    "train.checkpoints_total_limit",
    "data.dataloader_num_workers",
    "data.train_data_dir",  # where they lie; check_data asks what they are
    "data.prompts",
    "data.cache_dir",
    "train.gradient_accumulation_steps",  # memory and machine: they decide no number but roundings
    "train.gradient_checkpointing",
    "train.device",
    "train.sharded",
    "train.max_bad_iterations",
    *(f"validation.{name}" for name in config.Validation.model_fields),
}

log = logging.getLogger(__name__)


def check_first_student(point: Path) -> None:
    """Raises UserError when the student that stage 2 is held to is not there."""
    folder = point.parent / "student-stage1"
    if export.notes_of(folder) is None:
        raise UserError(
            f"{point} is of stage 2, which is held to the student of stage 1, and {folder} is not "
            "there; put it back, or give another output_dir"
        )


def check_reference(point: Path, was: str | None, now: str | None) -> None:
    """Raises UserError when stage 2 would go on from another student of stage 1."""
    if was != now:
        raise UserError(
            f"{point} is of stage 2, which is held to the student of stage 1, and "
            f"{point.parent / 'student-stage1'} is another one than it was (fingerprint {now}, was "
            f"{was}); put the one that was there back, or give another output_dir"
        )


def check_data(point: Path, was: str | None, now: str) -> None:
    """Raises UserError when pictures or prompts are others than they were at the checkpoint."""
    if was not in (None, now):
        raise UserError(
            f"pictures, captions or prompts are not those that {point} learned on (fingerprint "
            f"{now}, was {was}): another run begins there; put back what was (a picture that could "
            "not be read then and can be now is one more), give another output_dir, or start over "
            "in this one: --no-resume of `flashdmd train`"
        )


def check_frozen(point: Path, was: dict[str, str], now: dict[str, str]) -> None:
    """Raises UserError when a network that the run does not train is another than it was."""
    if others := sorted(k for k in was.keys() & now.keys() if was[k] != now[k]):
        raise UserError(
            f"another {' and another '.join(others)} than {point} learned with (fingerprints "
            f"{', '.join(f'{now[k]}, was {was[k]}' for k in others)}): another run begins there; "
            "put back what was, give another output_dir, or start over in this one: --no-resume "
            "of `flashdmd train`"
        )


def tell_versions(was: dict[str, str], now: dict[str, str]) -> None:
    """A run that goes on with other packages goes on, and need not be the same to the bit."""
    for name in sorted(was.keys() & now.keys()):
        if was[name] != now[name]:
            log.warning("the run began with %s %s and goes on with %s", name, was[name], now[name])


def check_progress(recipe: Recipe, state: dict[str, Any], changed: set[str]) -> None:
    """Raises UserError when what was done already is more, or other, than the recipe asks for.

    `changed` are the keys that the recipe has otherwise than the run did.
    """
    train, folder, in_stage_1 = recipe.train, recipe.output_dir, state["stage"] == "distill"
    first = state["updates" if in_stage_1 else "before"].get("generator", 0)
    second = state["updates"].get("preference" if state["stage"] == "rl" else "generator", 0)
    if in_stage_1:
        second = 0
    elif not train.joint_train_steps:
        raise UserError(
            f"train.joint_train_steps=0, but the run in {folder} is in stage 2; give a number of "
            "updates, or another output_dir"
        )
    elif first != train.max_train_steps:
        raise UserError(
            f"train.max_train_steps={train.max_train_steps}, but the run in {folder} is in stage "
            f"2, after {first} generator updates of stage 1; name that number, or give another "
            "output_dir"
        )
    for name, asked, done in (
        ("max_train_steps", train.max_train_steps, first),
        ("joint_train_steps", train.joint_train_steps, second),
    ):
        if done > asked:
            raise UserError(
                f"train.{name}={asked}, but the run in {folder} has made {done} updates; name that "
                "number or a larger one, or give another output_dir"
            )
    over = first == train.max_train_steps and second == train.joint_train_steps
    if over and (late := sorted(changed & RATES)):
        raise UserError(
            f"the run in {folder} is finished, so {', '.join(late)} would change nothing; give "
            "another output_dir, or ask for more updates"
        )


def check_same(recipe: Recipe, point: Path | None = None) -> set[str]:
    """The keys that the run in the folder had otherwise, all of which may change; the log says so.
    Where its recipe is gone, the one that the checkpoint `point` knows is compared.

    Raises UserError when it is a run of another recipe.
    """
    known = Path(recipe.output_dir) / "recipe.yaml"
    if known.exists():
        earlier = config.load(known, [])
    elif point:
        earlier = config.build(checkpoint.state_of(point)["about"].get("recipe", {}), str(point))
    else:
        return set()
    before, now = flat(earlier), flat(recipe)
    changed = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)}
    changed -= {"output_dir"}
    may = MAY_CHANGE
    if recipe.data.train_data_dir == OWN:  # these are the data
        may = may - {"validation.teacher_steps"}
    if {before.get("data.train_data_dir"), recipe.data.train_data_dir} & {EMOJI, OWN}:
        may = may - {"data.train_data_dir"}  # words, and no places
    said = {k: f"{k}: was {before.get(k)!r}, is {now.get(k)!r}" for k in sorted(changed)}
    if refused := "".join(f"  {line}\n" for k, line in said.items() if k not in may):
        fine = "".join(f"  {line}\n" for k, line in said.items() if k in may)
        raise UserError(
            f"{recipe.output_dir} holds a run of another recipe:\n{refused}"
            + (f"with these it would go on:\n{fine}" if fine else "")
            + "give another output_dir, or start over in this one: --no-resume of `flashdmd train`"
        )
    for line in said.values():
        log.warning("%s: the run goes on with it", line)
    return changed


def flat(recipe: Recipe) -> dict[str, object]:
    """Every key of a recipe by its dotted name."""
    dumped = json.loads(recipe.model_dump_json())
    return {
        (f"{section}.{key}" if key else section): value
        for section, content in dumped.items()
        for key, value in (content.items() if isinstance(content, dict) else [("", content)])
    }
