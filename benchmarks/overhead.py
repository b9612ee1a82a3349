"""What it costs that a run can be trusted: docs/evidence/overhead.json.

    OMP_NUM_THREADS=2 python benchmarks/overhead.py [--pairs 40]

The embedded default trains on in one process, period by period of its cycle, by turns as `flashdmd
train` does it and with all of that off: lines of the log, looking for a signal and at other
processes, tests for what is not finite, draws that do not depend on parts. Pairs begin with either
way by turns. What is compared is the seconds of the processor, which what else a machine does
touches little; those of the clock are told beside them. What a checkpoint costs (hashes, manifest,
waiting for the disk, pruning) is timed by the clock and spread over the updates between two. The
ratio is the mean over pairs with Student's 95 %.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from flashdmd import config, distributed, draws, session, trainer
from flashdmd.compare import T_95
from flashdmd.files import stoppable

OUTPUT = Path(__file__).parents[1] / "docs/evidence/overhead.json"


def trusted(run: session.Session, training: trainer.Trainer, asked: Any) -> None:
    """A period of the cycle as run_stage makes it, but for checkpoints."""
    for _ in training.order:
        record = training.iterate()
        session.append(run.output / "metrics.jsonl", session.where(training) | record)
        assert training.bad is None
        distributed.any_of(asked())


@contextmanager
def off() -> Iterator[None]:
    """Without what makes an update the same in any number of parts, and tests of numbers."""
    plain = {
        "part": lambda number, of: nullcontext(),
        "normal": lambda like, rng=None: torch.randn(
            like.shape, generator=rng, dtype=like.dtype, device=like.device
        ),
        "uniform": lambda like: torch.rand(len(like), dtype=like.dtype, device=like.device),
        "integers": lambda low, high, like: torch.randint(
            low, high, (len(like),), device=like.device
        ),
    }
    with (
        patch.multiple(draws, **plain),
        patch.multiple(distributed, mean=lambda record: record, average=lambda grads: None),
        patch.object(trainer, "math", NoTests),
    ):
        yield


class NoTests:
    isfinite = staticmethod(lambda number: True)


def bare(training: trainer.Trainer) -> None:
    for _ in training.order:
        training.iterate()


def measured(pairs: int, folder: Path) -> dict[str, Any]:
    recipe = config.read("emoji-score", [], folder)
    run = session.open_session(recipe)
    training = run.trainer("distill")
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}  # processor, clock
    saves = []
    with stoppable() as asked:
        for pair in range(-1, pairs):  # the first is not counted
            for way in ("on", "off") if pair % 2 else ("off", "on"):
                started = time.process_time(), time.perf_counter()
                if way == "on":
                    trusted(run, training, asked)
                else:
                    with off():
                        bare(training)
                spent = time.process_time() - started[0], time.perf_counter() - started[1]
                seconds[way].append(spent)
            if pair % 8 == 0:
                started = time.perf_counter()
                session.save(run, training)
                saves.append(time.perf_counter() - started)
            print(f"pair {pair + 1} of {pairs}", flush=True)
    (on, on_clock), (without, without_clock) = (
        torch.tensor(seconds[way][1:], dtype=torch.float64).unbind(1) for way in ("on", "off")
    )
    periods = recipe.train.checkpointing_steps  # of one generator update each
    save = statistics.median(saves)
    saving = save / periods / float(without_clock.median())
    ratios = (on / without + saving).log()
    wide = T_95[min(pairs - 2, len(T_95) - 1)] * float(ratios.std()) / math.sqrt(pairs)
    mean = float(ratios.mean())
    iterations = len(training.order)
    return {
        "on_ms": 1000 * (float(on_clock.median()) + save / periods) / iterations,
        "off_ms": 1000 * float(without_clock.median()) / iterations,
        "ratio": math.exp(mean),
        "ci95": [math.exp(mean - wide), math.exp(mean + wide)],
        "pairs": pairs,
        "iterations_a_period": iterations,
        "seconds_to_save": save,
        "share_of_saving": saving,
        "checkpointing_steps": periods,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(asked.pairs, Path(folder)) | {"versions": session.versions()}
    asked.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"Wrote {asked.output}")


if __name__ == "__main__":
    main()
