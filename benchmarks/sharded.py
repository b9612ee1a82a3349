"""Memory of a run on one process and dealt out over two: docs/evidence/sharded.json.

    OMP_NUM_THREADS=1 python benchmarks/sharded.py [--width 192]

Full fine-tuning in float32 of a UNet of Stable Diffusion's shape with random weights, two pictures
together, on one process and with train.sharded=true on two, each a process of its own that was
started by no other of them. Stage 1, and stage 2 with its reference and a latent reward model. One
course opens a run, makes its iterations, saves a checkpoint and writes the student; another one
opens it anew, restores the checkpoint and iterates once.

Peak: VmHWM of /proc/self/status, which the kernel keeps, set back once everything is imported and
again before each part. It counts pages of files that are mapped as well, such as the weights that a
pipeline is loaded from, once in each process. Beside it what is the process's alone (RssAnon), read
every few milliseconds. Memory from a MiB on goes back to the system when it is freed, as sharding
has it, on one process as well. Baseline: what a process holds after its imports, before it opens
anything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import memory  # noqa: E402
from processes import free_port  # noqa: E402
from resident import Course  # noqa: E402

from flashdmd import distributed  # noqa: E402
from flashdmd.export import write_student  # noqa: E402
from flashdmd.memory import held  # noqa: E402
from flashdmd.session import Session, versions  # noqa: E402
from flashdmd.trainer import Trainer  # noqa: E402

OUTPUT = ROOT / "docs/evidence/sharded.json"
STAGES = {"stage 1": "distill", "stage 2": "joint"}
MIB = 2**20


def opened(where: Path, stage: str, sharded: bool) -> Session:
    train = {"train_batch_size": 2, "preference_batch_size": 2, "mixed_precision": "no"}
    train |= {"max_train_steps": 1, "joint_train_steps": int(stage == "joint")}
    train |= {"ema_decay": 0.99}
    return memory.opened(where, {"train": train | {"sharded": sharded}})


def counted(run: Session, trainer: Trainer, gradients: int) -> dict[str, float]:
    """MiB of what is dealt out, tensor by tensor."""
    denoisers = [run.generator, run.score, run.student, run.teacher.denoiser]
    denoisers += [d for d in (getattr(trainer.algorithm, "reference", None),) if d]
    learners = [one for name, one in trainer.optimizers().items() if name != "discriminator"]
    sizes = {"weights": held(*denoisers), "moments": held(*learners), "gradients": gradients}
    return {name: round(size / MIB, 1) for name, size in sizes.items()}


def watch_gradients(trainer: Any) -> list[int]:
    """Bytes of gradients when the generator's two terms are weighed: never are there more."""
    sizes, weigh = [0], trainer.weigh

    def weighed(*taken: Any) -> Any:
        sizes.append(held(*(gradient for one in taken for gradient in one.values())))
        return weigh(*taken)

    trainer.weigh = weighed
    return sizes


def begin(where: Path, stage: Any, sharded: bool) -> dict[str, Any]:
    course = Course()
    with course.part("open"):
        run = opened(where, stage, sharded)
    if stage == "joint":
        with course.part("take over"):
            run.take_over()
    trainer = run.trainer(stage)
    sizes = watch_gradients(trainer)
    with course.part("iterate"):
        for _ in (*trainer.order, *trainer.order):  # in the second all moments are there
            trainer.iterate()
    with course.part("save"):
        trainer.save(where / f"checkpoint-{stage}-{distributed.ranks()}")
    with course.part("write the student"):
        to = where / f"student-{stage}-{distributed.ranks()}"
        write_student(run.teacher, run.student, run.recipe.method, to)
    numbers = sum(p.numel() for p in run.generator.parameters())
    return {"parts": course.parts, "counted_mib": counted(run, trainer, max(sizes))} | {
        "baseline_mib": round(course.baseline),
        "parameters": numbers,
    }


def go_on(where: Path, stage: Any, sharded: bool) -> dict[str, Any]:
    course = Course()
    with course.part("open again"):
        run = opened(where, stage, sharded)
        trainer = run.trainer(stage)
    with course.part("restore"):
        trainer.restore(where / f"checkpoint-{stage}-{distributed.ranks()}")
    with course.part("go on"):
        trainer.iterate()
    return {"parts": course.parts, "baseline_mib": round(course.baseline)}


COURSES: dict[str, Callable[..., dict[str, Any]]] = {"begin": begin, "go on": go_on}


def started(course: str, where: Path, stage: str, ranks: int) -> list[dict[str, Any]]:
    """What a course tells in each of so many processes that know each other."""
    port, running = free_port(), []
    for rank in range(ranks):
        given = [sys.executable, __file__, "--course", course, "--where", str(where)]
        told: dict[str, Any] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_PORT": port,
        }
        told |= {"MASTER_ADDR": "127.0.0.1", "MALLOC_MMAP_THRESHOLD_": MIB}
        env = os.environ | {k: str(v) for k, v in told.items()}
        command = [*given, "--stage", stage]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{course}, {stage}: a process failed")
    return [json.loads(one.splitlines()[-1]) for one in said]


def compared(where: Path, stage: str) -> dict[str, Any]:
    told: dict[int, list[dict[str, Any]]] = {}
    for ranks in (1, 2):
        both = [started(course, where, stage, ranks) for course in COURSES]
        told[ranks] = [
            begun | {"parts": begun["parts"] | again["parts"]}
            for begun, again in zip(*both, strict=True)
        ]
        print(stage, ranks, json.dumps(told[ranks], indent=1), flush=True)
    (whole,), ranked = told[1], told[2]

    def most(one: dict[str, Any], what: str = "peak_mib") -> float:
        return float(max(part[what] for part in one["parts"].values()))

    def ratio(size: Callable[[dict[str, Any]], float]) -> float:
        return round(max(map(size, ranked)) / size(whole), 3)

    def where_most(one: dict[str, Any]) -> str:
        return max(one["parts"], key=lambda name: one["parts"][name]["peak_mib"])

    return {
        "whole_mib": most(whole),
        "rank_mib": [most(one) for one in ranked],
        "ratio": ratio(most),
        "ratio_above_baseline": ratio(lambda one: most(one) - one["baseline_mib"]),
        "ratio_anonymous": ratio(lambda one: most(one, "anonymous_mib")),
        "ratio_counted": ratio(lambda one: sum(one["counted_mib"].values())),
        "most_in": {"whole": where_most(whole), "rank": [where_most(one) for one in ranked]},
        "whole": whole,
        "ranks": ranked,
    }


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--width", type=int, default=192)
    asked.add_argument("--stages", nargs="+", choices=[*STAGES], default=[*STAGES])
    asked.add_argument("--output", type=Path, default=OUTPUT)
    asked.add_argument("--course", choices=[*COURSES])
    asked.add_argument("--where", type=Path)
    asked.add_argument("--stage")
    given = asked.parse_args()
    if given.course:
        with distributed.joined():
            told = COURSES[given.course](given.where, given.stage, distributed.ranks() > 1)
            print(json.dumps(told))
        return
    with tempfile.TemporaryDirectory() as folder:
        where = memory.folder_of(given.width, Path(folder))
        found = {name: compared(where, STAGES[name]) for name in given.stages}
    first = next(iter(found.values()))
    about = {
        "made_by": "python benchmarks/sharded.py",
        "parameters": first["whole"].pop("parameters"),
        "baseline_mib": first["whole"]["baseline_mib"],
        "seconds": {
            name: {
                part: [one["parts"][part]["seconds"] for one in (stage["whole"], *stage["ranks"])]
                for part in ("save", "restore")
            }
            for name, stage in found.items()
        },
        "versions": versions(),
    }
    given.output.write_text(json.dumps(about | found, indent=1) + "\n")
    print(f"Wrote {given.output}")


if __name__ == "__main__":
    main()
