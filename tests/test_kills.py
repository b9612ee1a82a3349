"""Runs killed with SIGKILL at random moments end bit for bit as those that never were."""

import random
import shutil
from pathlib import Path

import kills
import pytest
from kills import Tally

KILLS = {"stage 1": 8, "both stages": 5, "accumulation": 2, "LoRA": 3, "embedded default": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def tallies(folder: Path) -> dict[str, Tally]:
    rng = random.Random(0)
    parts = kills.ingredients(folder / "parts")
    return {
        name: kills.kill_runs(name, n, parts, folder / name.replace(" ", "-"), rng)
        for name, n in KILLS.items()
    }


@pytest.mark.parametrize("variant", KILLS)
def test_a_killed_run_ends_as_the_run_that_was_not(variant: str, tallies: dict[str, Tally]) -> None:
    """Networks, optimizers, state, manifest, students and every line of the log."""
    tally = tallies[variant]
    assert tally.kills == KILLS[variant]
    assert tally.equal == tally.runs >= 1, tally.odd


def test_twenty_kills_hit_and_some_of_them_while_a_checkpoint_was_written(
    tallies: dict[str, Tally],
) -> None:
    assert sum(tally.kills for tally in tallies.values()) == 20
    assert sum(tally.while_writing for tally in tallies.values()) >= 1
    assert {"distill", "joint"} <= {s for tally in tallies.values() for s in tally.in_stage}


def test_the_comparison_sees_a_bit_and_a_line(
    tallies: dict[str, Tally], folder: Path, tmp_path: Path
) -> None:
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
