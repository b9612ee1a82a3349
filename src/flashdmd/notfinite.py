"""What was not finite is kept for a replay; a run that stays so is stopped."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flashdmd import distributed
from flashdmd.files import remove_folder, replace_folder
from flashdmd.trainer import Bad

KEPT = 5  # the newest; a batch of SDXL's real pictures is 0.8 GB

log = logging.getLogger(__name__)


def keep(bad: Bad, folder: Path, in_a_row: int, most: int) -> None:
    """Writes the batch, seed, stage, iteration and values of an iteration that skipped an update.

    Every process writes its own rows of the batch. Raises FloatingPointError when `most` updates
    of one kind were skipped `in_a_row`.
    """
    facts = bad.facts
    name = f"{facts['stage']}-{facts['iteration']}-process-{distributed.rank()}"
    with replace_folder(folder / name) as beside:
        save_file(dict(tensors(bad)), beside / "batch.safetensors")
        told = facts | {"not_finite": texts(facts["not_finite"])}
        (beside / "facts.json").write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    old = sorted(folder.glob(f"*-process-{distributed.rank()}"), key=made)
    for path in old[:-KEPT]:
        remove_folder(path)
    said = f"iteration {facts['iteration']} of stage {facts['stage']}: {texts(facts['not_finite'])}"
    log.warning("skipped what is not finite in %s; kept in %s", said, folder / name)
    if in_a_row >= most:
        raise FloatingPointError(f"{said}, {in_a_row} of these updates in a row; see {folder}")


def made(kept: Path) -> tuple[bool, int]:
    """When, of two that were kept: by stage and iteration, for clocks go back."""
    stage, iteration, *_ = kept.name.split("-")
    return stage != "distill", int(iteration)


def tensors(bad: Bad) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(bad.batch).items():
        if isinstance(value, Tensor):
            yield name, value.cpu().contiguous()
        elif value:
            yield from ((f"{name}.{k}", v.cpu().contiguous()) for k, v in value.items())


def texts(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no name for, as words."""
    return {
        update: {name: str(value) for name, value in odd.items()} for update, odd in values.items()
    }
