"""torchrun, `accelerate launch` and the launch files start runs of two processes that work."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
import yaml
from faults import Figure, Lost, lost_iterations
from processes import free_port
from safetensors.torch import load_file

from flashdmd import checkpoint, config, run

pytestmark = pytest.mark.slow  # two or three processes that import everything, in each
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SECONDS = 240
ENDLESS = {"max_train_steps": 10**6, "checkpointing_steps": 0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tiny.score_folder(tmp_path_factory.mktemp("launch") / "teacher")
    return made


def recipe(teacher: Path, output: Path, **train: Any) -> Path:
    numbers = {
        "train_batch_size": 4, "max_train_steps": 2, "gan_calibration_steps": [0, 1],
        "checkpointing_steps": 1, "learning_rate": 1e-4, "fake_score_learning_rate": 1e-4,
        "adam_epsilon": 1e-3,
    }  # fmt: skip
    shown = {"num_prompts": 8, "teacher_steps": 2, "prompts": ["a cat", "a red apple"]}
    return tiny_run.recipe(teacher, output, numbers | train, validation=shown)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join((str(BIN), os.environ["PATH"]))
    lean = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path}
    ours = {"PYTHONPATH": str(ROOT / "src")}
    return os.environ | lean | ours | more


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment(**more), text=True, cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said


def tasks(pid: int) -> list[int]:
    """The processes below one that have none below them."""
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    below = [int(child) for child in told.split()]
    return [task for child in below for task in tasks(child)] if below else [pid]


def iterations(output: Path) -> int:
    log = output / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(done: Any, seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.05)


def standing_in(folder: Path, **programs: str) -> str:
    """A PATH on which programs of a cluster are scripts that do here what those do there."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return os.pathsep.join((str(folder), str(BIN), os.environ["PATH"]))


SRUN = """
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & all+=($!); done
code=0
for one in "${all[@]}"; do wait "$one" || code=$?; done
exit $code
"""


def by_torchrun(two: Path) -> subprocess.Popen[str]:
    """The command of skypilot.yaml, where SkyPilot would start it."""
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert {"RECIPE", "OVERRIDES"} == task["envs"].keys()
    machines = {
        "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "2", "RECIPE": str(two), "OVERRIDES": "",
    }  # fmt: skip
    return start(["bash", "-c", task["run"].replace("29500", str(free_port()))], **machines)


def by_slurm(two: Path, folder: Path) -> subprocess.Popen[str]:
    """slurm.sbatch, with stand-ins for a cluster's programs; what scontrol is asked is kept."""
    asked = folder / "scontrol.log"
    path = standing_in(folder / "bin", srun=SRUN, scontrol=f'echo "$@" >> {asked}; echo 127.0.0.1')
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "here"}
    given = {"PATH": path, "RECIPE": str(two), "OVERRIDES": "train.seed=1"}
    return start(["bash", str(ROOT / "launch/slurm.sbatch")], **job, **given)


def by_kubernetes(two: Path) -> list[subprocess.Popen[str]]:
    """Both pods of kubernetes.yaml."""
    service, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    told = {one["name"]: one["value"] for one in container["env"]}
    assert int(told["WORLD_SIZE"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    host = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert (told["MASTER_ADDR"], service["metadata"]["name"]) == (host, pod["subdomain"])
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given = told | here | {"RECIPE": str(two), "OVERRIDES": ""}
    command = container["command"] + container["args"]
    return [start(command, **given, JOB_COMPLETION_INDEX=str(i)) for i in range(2)]


def test_two_processes_train_measure_and_report(teacher: Path, tmp_path: Path) -> None:
    alone, two = (recipe(teacher, tmp_path / name) for name in ("alone", "two"))
    process = by_torchrun(two)
    run.train(config.read(str(alone), []), progress=lambda *_: None)
    said = finished(process)
    assert process.returncode == 0, said
    output = tmp_path / "two"
    assert said.count("Report: ") == 1
    assert {p.name for p in output.iterdir()} >= {"report.html", "metrics.json", "student"}
    arms = [row["arm"] for row in json.loads((output / "metrics.json").read_text())["rows"]]
    assert arms == ["teacher-2", "teacher-4", "student-stage1"]
    assert iterations(output) == iterations(tmp_path / "alone") == 4
    name = "student/unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(tmp_path / of / name) for of in ("two", "alone"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.fault("processes: a job is told to stop", "slurm.sbatch, SIGTERM to its two processes")
def test_a_job_that_is_told_to_stop_saves_and_is_queued_again(
    teacher: Path, tmp_path: Path, lost: Lost
) -> None:
    output = tmp_path / "run"
    process = by_slurm(recipe(teacher, output, **ENDLESS), tmp_path)
    wait_for(lambda: iterations(output) >= 3 or process.poll() is not None)
    assert process.poll() is None, finished(process)
    for task in tasks(process.pid):  # as --signal=TERM does
        os.kill(task, signal.SIGTERM)
    said = finished(process)
    assert process.returncode == 130, said
    assert "saved in" in said
    lost(lost_iterations(output), "iterations")
    assert lost_iterations(output) == 0
    assert config.load(output / "recipe.yaml", []).train.seed == 1
    asked = (tmp_path / "scontrol.log").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["show", "requeue"]


@pytest.mark.fault("processes: one of them dies", "SIGKILL of the second of two, as in two pods")
def test_a_process_that_dies_ends_the_others(
    teacher: Path, tmp_path: Path, lost: Lost, figure: Figure, chance: random.Random
) -> None:
    """The other says so, soon; one process goes on from what they saved."""
    output = tmp_path / "run"
    first, second = by_kubernetes(recipe(teacher, output, **ENDLESS | {"checkpointing_steps": 1}))
    wait_for(lambda: iterations(output) >= 5 or first.poll() is not None)
    assert first.poll() is None, finished(first)
    time.sleep(chance.uniform(0, 0.5))
    os.kill(second.pid, signal.SIGKILL)
    killed = time.monotonic()
    said = finished(first)
    figure("from the death of a process until the other ends", time.monotonic() - killed, "s")
    assert time.monotonic() - killed < 60
    assert first.returncode == 75, said
    assert "another process of this run has ended" in said
    finished(second)
    lost(lost_iterations(output), "iterations")
    newest = checkpoint.latest(output)
    assert newest is not None
    done = checkpoint.state_of(newest)["updates"]["generator"]
    again = recipe(teacher, output, max_train_steps=done + 1)
    run.train(config.read(str(again), []), progress=lambda *_: None)
    assert iterations(output) == 2 * (done + 1)


def by_accelerate(*words: str) -> subprocess.Popen[str]:
    """The command of docs/runs.md, of two processes and at a port of its own."""
    (line,) = re.findall(r"^ +accelerate (launch .*)$", (ROOT / "docs/runs.md").read_text(), re.M)
    how, module, _ = re.split(r"(-m flashdmd) train .*", line.replace("8", "2"))
    port = ["--main_process_port", str(free_port())]
    return start([str(BIN / "accelerate"), *how.split(), *port, *module.split(), *words])


def test_accelerate_launches_a_run(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = by_accelerate("train", str(recipe(teacher, output, sharded=True, max_train_steps=1)))
    said = finished(process)
    assert process.returncode == 0, said
    assert said.count("Report: ") == 1
    assert (output / "report.html").is_file()
    assert (output / "checkpoint-2/shards").is_dir()  # one process writes none
    assert checkpoint.latest(output) == output / "checkpoint-2"


def test_accelerate_launches_samples(teacher: Path, tmp_path: Path) -> None:
    picture, prompts = tmp_path / "two.png", ("a cat", "a dog")
    words = ("sample", str(teacher), *prompts, "--steps", "2", "--output", str(picture))
    process = by_accelerate(*words)
    said = finished(process)
    assert process.returncode == 0, said
    assert said.count("Wrote ") == 1
    alone = run.sample(str(teacher), list(prompts), 2, 0, None, tmp_path / "one.png")
    assert picture.read_bytes() == alone.read_bytes()


def test_what_is_for_one_process_is_refused_to_several() -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0"}
    process = start([str(BIN / "flashdmd"), "export", "run", "--output", "there"], **given)
    said = finished(process)
    assert process.returncode == 2, said
    assert "process 0: export is work for one process" in said
