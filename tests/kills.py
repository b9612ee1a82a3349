"""Runs that are killed at any moment and begun again with the same recipe, beside one that never
was. One process imports everything and forks each attempt.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tiny
import tiny_data
from faults import lost_iterations

from flashdmd import checkpoint, config, run
from flashdmd.config import Recipe
from flashdmd.emoji import reward as emoji_reward
from flashdmd.models.teacher import load_pipeline

SMALL = (
    "train.train_batch_size=2", "train.preference_batch_size=2", "discriminator.width=8",
    "train.gan_calibration_steps=[0, 2]", "train.mixed_precision=no",
    "train.checkpointing_steps=1", "train.checkpoints_total_limit=2",
    "method.preferences_per_distillation=2",
)  # fmt: skip
TINY = (*SMALL, "method.student_timesteps=[999, 499]", "validation.num_prompts=8")
BOTH = ("train.max_train_steps=2", "train.joint_train_steps=2")
VARIANTS: dict[str, tuple[str, ...]] = {  # beside the tiny teacher, but for the last
    "stage 1": (*TINY, "train.max_train_steps=3", "train.joint_train_steps=0"),
    "both stages": (*TINY, *BOTH),
    "accumulation": (*TINY, *BOTH, "method.ttur=1", "train.gradient_accumulation_steps=2"),
    # a scale that does not divide out
    "LoRA": (*TINY, *BOTH, "method.ttur=1", "lora.rank=4", "lora.lora_alpha=2.8"),
    # the student is the generator
    "no average": (*TINY, *BOTH, "train.ema_decay=0"),
    "best by metric": (*TINY, *BOTH, "validation.best_metric=kid"),
    "embedded default": (
        *SMALL,
        "train.mixed_precision=bf16",
        "train.max_train_steps=1",
        "train.joint_train_steps=1",
        "train.gan_calibration_steps=[0, 1]",
    ),
}
WAITING = 300.0  # seconds that an attempt may take
POLL = 0.001  # seconds; a checkpoint is written in 20 or so milliseconds


def ingredients(folder: Path) -> Path:
    """A tiny teacher, a reward of its latents, random weights both, and pictures."""
    score = tiny.score_folder(folder / "score")
    reward = emoji_reward.build(load_pipeline(score).denoiser.network)
    emoji_reward.write(reward, folder / "reward", str(score))
    tiny_data.pictures(folder / "pictures", (64, 64), n=16)
    return folder


def recipe_of(variant: str, parts: Path, output: Path, *changes: str) -> Recipe:
    own = [] if variant == "embedded default" else [
        f"model.pretrained_model_name_or_path={parts / 'score'}",
        f"model.reward_model_name_or_path={parts / 'reward'}",
        f"data.train_data_dir={parts / 'pictures'}",
    ]  # fmt: skip
    return config.read("emoji-score", [*own, *VARIANTS[variant], *changes], output)


def begin(recipe: Recipe, log: Path) -> int:
    """Trains in a process of its own, in a new session; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(written, stream)
        sys.stdout, sys.stderr = (os.fdopen(n, "w") for n in (1, 2))
        run.train(recipe)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """Its exit code; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def moments(rng: random.Random, output: Path, seconds: float) -> Callable[[float], bool]:
    """When to kill, asked with the seconds since the start: half of them while something is
    written, at its beginning or when it is about to get its name, the others anywhere.
    """
    if rng.random() < 0.5:
        at = rng.uniform(0.0, seconds)
        return lambda since: since >= at
    seen: set[str] = set()
    skip, complete = rng.randrange(4), rng.random() < 0.5
    later = rng.choice((0.0, rng.uniform(0, 0.004)))

    def writing(_: float) -> bool:
        for path in half_written(output):
            last = (path / name for name in ("manifest.json", "flashdmd.json"))
            if not complete or any(name.exists() for name in last):
                seen.add(path.name)
        if len(seen) <= skip:
            return False
        time.sleep(later)
        return True

    return writing


def half_written(output: Path) -> Iterator[Path]:
    """Checkpoints and students, and what gives way to them."""
    names = os.listdir(output) if output.is_dir() else []
    kinds = (".checkpoint-", ".student")
    moved = (n for n in names if n.startswith(kinds) and (".writing-" in n or ".retired-" in n))
    return (output / name for name in moved)


@dataclass
class Tally:
    """What was done to runs of one variant, and how they came out."""

    kills: int = 0  # that found the process alive
    while_writing: int = 0
    before_the_first_checkpoint: int = 0
    in_stage: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    equal: int = 0  # runs, bit for bit
    survived: int = 0  # kills of these
    survived_while_writing: int = 0
    most_lost: int = 0  # iterations that were logged and had to be made again, of one kill
    most_lost_while_writing: int = 0
    odd: list[str] = field(default_factory=list)  # files that differ


def run_whole(recipe: Recipe, log: Path) -> float:
    """A run that nobody kills; its seconds."""
    started, child = time.monotonic(), begin(recipe, log)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, log.read_text()
    return time.monotonic() - started


def kill_runs(variant: str, kills: int, parts: Path, folder: Path, rng: random.Random) -> Tally:
    """Runs of a variant until so many kills hit, each begun again until it ends, and compared."""
    output, whole, log = folder / "run", folder / "whole", folder / "log.txt"
    folder.mkdir(parents=True)
    recipe, tally = recipe_of(variant, parts, output), Tally()
    seconds = run_whole(recipe, log)
    output.rename(whole)
    while tally.kills < kills:
        kills_before, writing_before = tally.kills, tally.while_writing
        while True:
            child, started = begin(recipe, log), time.monotonic()
            wanted = moments(rng, output, seconds) if tally.kills < kills else lambda _: False
            while (code := ended(child)) is None and not wanted(time.monotonic() - started):
                assert time.monotonic() - started < WAITING, log.read_text()
                time.sleep(POLL)
            if code is None:
                os.kill(child, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code != -signal.SIGKILL:
                assert code == 0, log.read_text()
                break
            count(tally, output)
        tally.runs += 1
        odd = differences(whole, output)
        if not odd:
            tally.equal += 1
            tally.survived += tally.kills - kills_before
            tally.survived_while_writing += tally.while_writing - writing_before
        tally.odd += odd
        if odd:  # to be looked at
            output.rename(folder / f"odd-{tally.runs}")
        else:
            shutil.rmtree(output)
    return tally


def count(tally: Tally, output: Path) -> None:
    half = [path.name for path in half_written(output)]
    tally.kills += 1
    tally.while_writing += bool(half)
    tally.before_the_first_checkpoint += not checkpoint.all_of(output)
    lost = lost_iterations(output)
    if half:
        tally.most_lost_while_writing = max(tally.most_lost_while_writing, lost)
    else:
        tally.most_lost = max(tally.most_lost, lost)
    log = output / "metrics.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    stage = json.loads(lines[-1])["stage"] if lines else "opening"
    first = any(".student-stage1." in name for name in half)
    where = "between the stages" if first else stage
    tally.in_stage[where] = tally.in_stage.get(where, 0) + 1


def differences(whole: Path, other: Path) -> list[str]:
    """What of two runs is not the same: files of checkpoints and students by their bytes, the log
    by its lines but for seconds, and what else is there.
    """
    a, b = contents(whole), contents(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def contents(folder: Path) -> dict[str, str | list[dict]]:
    found: dict[str, str | list[dict]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "timing.json" or name == ".lock" or path.is_dir():
            continue
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [
                {k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines
            ]
        else:
            found[name] = hashlib.sha256(ordered(path)).hexdigest()
    return found


def ordered(path: Path) -> bytes:
    """The bytes of a file; of safetensors with its metadata, a hash map's, put in order."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return json.dumps(header, sort_keys=True).encode() + content[start:]
