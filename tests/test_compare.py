"""The comparison's plan and its table; that its arms run is tested with the other whole runs."""

import json
from pathlib import Path

import pytest

from flashdmd import compare, config
from flashdmd.errors import UserError

SHIPPED = Path(__file__).parents[1] / "recipes/emoji-score.yaml"


def recipe(*changes: str) -> config.Recipe:
    return config.load(SHIPPED, list(changes))


def test_every_arm_costs_what_it_says(tmp_path: Path) -> None:
    """Equal images for DMD2; as many preference updates for RL alone as the joint stage makes."""
    base = recipe("train.max_train_steps=500", "train.joint_train_steps=40", "method.ttur=2")
    dmd2 = compare.variant(base, compare.PLAN["dmd2"], 3, tmp_path)
    assert dmd2.train.max_train_steps * compare.TTUR == 500 * 2
    assert (dmd2.train.arm, dmd2.train.joint_train_steps, dmd2.train.seed) == ("dmd2", 0, 3)
    rl = compare.variant(base, compare.PLAN["rl"], 3, tmp_path)
    assert (rl.train.stage2, rl.train.joint_train_steps) == ("rl", 200)
    assert rl.train.max_train_steps == 0
    assert rl.model.student_model_name_or_path == str(tmp_path / "flash-dmd/student-stage1")
    only = compare.variant(base, compare.PLAN["rl-only"], 3, tmp_path)
    assert only.train == rl.train
    assert only.model.student_model_name_or_path is None
    flash = compare.variant(base, compare.PLAN["flash-dmd"], 3, tmp_path)
    assert flash.output_dir == str(tmp_path / "flash-dmd")
    assert flash.method == base.method


def test_a_cost_that_dmd2_cannot_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_train_steps=57 .* 114 iterations"):
        compare.variant(recipe("train.max_train_steps=57"), compare.PLAN["dmd2"], 0, tmp_path)


def test_what_was_done_again_after_a_resume_costs_once(tmp_path: Path) -> None:
    lines = [
        {"stage": "distill", "iteration": i, "images": 8 * i, "generator_updates": i}
        for i in (1, 2, 3, 2, 3)
    ] + [
        {"stage": "joint", "iteration": i, "images": 24, "generator_updates": 3, "preference": 0.7}
        for i in (1, 2, 1, 2)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"stage": "joint", "iter')
    assert compare.cost(tmp_path, compare.JOINT) == {
        "images": 24,
        "generator_updates": 3,
        "preference_updates": 2,
    }


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (["flash-dmd", "lcm"], "no arm 'lcm'; there are flash-dmd, rl, rl-only, dmd2"),
        (["rl"], "name both"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(arms: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        compare.compare(recipe(), [0], arms, tmp_path)


def test_the_interval_is_students() -> None:
    """1, 2, 3: mean 2, standard error 1 / sqrt 3, t of two degrees of freedom 4.30."""
    assert compare.spread([1.0, 2.0, 3.0]) == "2.000 ± 2.483"
    assert compare.spread([1.5]) == "1.500"
    assert compare.spread([2.0, 2.0]) == "2.000 ± 0.000"


def test_the_table_joins_seeds() -> None:
    figures = dict.fromkeys(compare.FIGURES, 0.5)
    rows = [
        {"arm": "teacher, 50 steps", "seed": None, "nfe": 100, **figures, "reward": None},
        {
            "arm": "a",
            "seed": 0,
            "nfe": 4,
            "images": 64,
            "generator_updates": 9,
            "preference_updates": 3,
            **figures,
        },
        {
            "arm": "a",
            "seed": 1,
            "nfe": 4,
            "images": 64,
            "generator_updates": 9,
            "preference_updates": 3,
            **figures,
        },
    ]
    lines = compare.table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| teacher, 50 steps | 1 | 100 |  |  |  | 0.500 | 0.500 |  |")
    assert lines[3].startswith("| a | 2 | 4 | 64 | 9 | 3 | 0.500 ± 0.000")


def test_the_table_has_no_column_that_would_be_empty() -> None:
    row = {"arm": "real pictures", "nfe": 0, **dict.fromkeys(compare.FIGURES, 0.5), "reward": None}
    head = compare.table([row]).splitlines()[0]
    assert head == "| arm | seeds | calls | kid | retrieval | held out reward | diversity |"
