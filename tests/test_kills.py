"""Runs killed with SIGKILL at random moments end bit for bit as those that never were."""

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import kills
import pytest
from kills import Tally

KILLS = {"stage 1": 8, "both stages": 5, "accumulation": 2, "LoRA": 3, "embedded default": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def tally(folder: Path) -> Callable[[str], Tally]:
    parts = kills.ingredients(folder / "parts")

    @cache
    def of(name: str) -> Tally:
        here, rng = folder / name.replace(" ", "-"), random.Random(f"0 {name}")
        return kills.kill_runs(name, KILLS[name], parts, here, rng)

    return of


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v == "stage 1" else pytest.mark.slow) for v in KILLS]
)
def test_a_killed_run_ends_as_the_run_that_was_not(
    variant: str, tally: Callable[[str], Tally]
) -> None:
    """Networks, optimizers, state, manifest, students and every line of the log."""
    told = tally(variant)
    assert told.kills == told.survived == KILLS[variant]
    assert told.equal == told.runs >= 1, told.odd


@pytest.mark.slow
def test_twenty_kills_hit_and_some_of_them_while_a_checkpoint_was_written(
    tally: Callable[[str], Tally],
) -> None:
    told = [tally(variant) for variant in KILLS]
    assert sum(one.kills for one in told) == 20
    assert sum(one.while_writing for one in told) >= 1
    assert {"distill", "joint"} <= {stage for one in told for stage in one.in_stage}


def test_the_comparison_sees_a_bit_and_a_line(
    tally: Callable[[str], Tally], folder: Path, tmp_path: Path
) -> None:
    tally("stage 1")
    whole, other = folder / "stage-1/whole", tmp_path / "other"
    shutil.copytree(whole, other)
    assert not kills.differences(whole, other)
    moments = other / "checkpoint-6/score.optimizer.safetensors"
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    log = other / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    (other / ".half").write_text("")
    odd = ["checkpoint-6/score.optimizer.safetensors", "metrics.jsonl", ".half"]
    assert sorted(kills.differences(whole, other)) == sorted(odd)
