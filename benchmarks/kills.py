"""Killed runs begun again, and what saving and resuming cost: docs/evidence/kills.json.

    OMP_NUM_THREADS=1 python benchmarks/kills.py [--kills 200] [--seed 0]

Each kind of run is killed with SIGKILL until its share of the kills has hit, half of them at random
times and half while something is written (tests/kills.py), begun again until it ends, and compared
with a run that was never killed: every file of checkpoints and students by its bytes, the logs line
by line but for seconds. Then the embedded default at its own size: seconds to save and to resume,
and their share of the seconds between two checkpoints.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import kills  # noqa: E402

from flashdmd import checkpoint, config  # noqa: E402
from flashdmd.config import Train  # noqa: E402
from flashdmd.session import append, open_session, save, versions, where  # noqa: E402

OUTPUT = ROOT / "docs/evidence/kills.json"
SHARES = {
    "stage 1": 0.15,
    "both stages": 0.25,
    "accumulation": 0.175,
    "LoRA": 0.2,
    "no average": 0.1,
    "best by metric": 0.05,
    "embedded default": 0.075,
}
PERIODS = 4  # generator updates that are timed, after one that is not


def killed(total: int, seed: int, folder: Path) -> dict[str, Any]:
    parts, tallies = kills.ingredients(folder / "parts"), {}
    for name, share in SHARES.items():
        here, rng = folder / name.replace(" ", "-"), random.Random(f"{seed} {name}")
        tallies[name] = kills.kill_runs(name, round(total * share), parts, here, rng)
        print(name, tallies[name], flush=True)
    stages = sum((Counter(t.in_stage) for t in tallies.values()), Counter[str]())
    counted = ("kills", "survived", "while_writing", "survived_while_writing", "runs", "equal")
    most = ("most_lost", "most_lost_while_writing")
    return {
        **{key: sum(asdict(t)[key] for t in tallies.values()) for key in counted},
        **{key: max(asdict(t)[key] for t in tallies.values()) for key in most},
        "in_stage": dict(stages),
        "by_kind": {name: asdict(t) for name, t in tallies.items()},
    }


def cost(folder: Path) -> dict[str, Any]:
    """Seconds to save and to resume the embedded default, and what share of a run saving takes."""
    recipe = config.read("emoji-score", [], folder)
    started = time.perf_counter()
    session = open_session(recipe)
    opened = time.perf_counter() - started
    trainer = session.trainer("distill")
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / "metrics.jsonl", where(trainer))
    updates, saves = [], []
    for _ in range(1 + PERIODS):  # by turns: what else the machine does slows both
        started = time.perf_counter()
        for _updates in trainer.order:
            trainer.iterate()
        updates.append(time.perf_counter() - started)
        started = time.perf_counter()
        save(session, trainer)
        saves.append(time.perf_counter() - started)
    checkpoint.sha256.cache_clear()
    started = time.perf_counter()
    newest = checkpoint.latest(folder)
    assert newest is not None
    trainer.restore(newest)
    restored = time.perf_counter() - started
    update, saved = statistics.median(updates[1:]), statistics.median(saves[1:])
    default = Train.model_fields["checkpointing_steps"].default
    return {
        "seconds_to_save": saved,
        "seconds_to_check_and_restore": restored,
        "seconds_to_resume": opened + restored,
        "seconds_per_generator_update": update,
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "checkpointing_steps": default,
        "share_of_training": saved / (saved + default * update),
        "share_at_the_interval_of_emoji_score": saved
        / (saved + recipe.train.checkpointing_steps * update),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--cost", action="store_true", help="Measure that alone, anew, in a file.")
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if asked.cost:
            figures = json.loads(asked.output.read_text())
        else:
            figures = killed(asked.kills, asked.seed, Path(folder))
            figures |= {"seed": asked.seed, "seconds": time.monotonic() - started}
        figures |= {"cost": cost(Path(folder) / "cost"), "versions": versions()}
    asked.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"Wrote {asked.output}")


if __name__ == "__main__":
    main()
