"""What the commands do: train through both stages, demo, sample, evaluate, report."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from flashdmd import beforehand, best, checkpoint, config, distributed, export
from flashdmd.config import Recipe
from flashdmd.data.prompts import sound
from flashdmd.drawing import Arm
from flashdmd.emoji import judge
from flashdmd.emoji.teacher import SHOWN
from flashdmd.emoji.world import ASSETS, SIZE, Split
from flashdmd.errors import UserError
from flashdmd.evaluate.own import LEAST, OwnBench
from flashdmd.evaluate.protocol import Bench, Protocol, Score, batches
from flashdmd.files import alone_in, mend_all, remove_folder, write_text
from flashdmd.loading import RewardModel, device_of, load_reward, load_teacher, teacher_of
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.models.teacher import Teacher
from flashdmd.publish import how_made
from flashdmd.report.sheet import comparison, contact_sheet
from flashdmd.resuming import (
    check_data,
    check_first_student,
    check_frozen,
    check_progress,
    check_reference,
    check_same,
    tell_versions,
)
from flashdmd.rules import MADE
from flashdmd.sampler import times
from flashdmd.schedule import STEPS
from flashdmd.seeds import seed_of
from flashdmd.session import (
    Progress,
    Session,
    cut_log,
    open_session,
    run_stage,
    versions,
    write_json,
)
from flashdmd.sources import EMOJI, open_source, prompts_of
from flashdmd.trainer import Trainer

GUIDANCE, TEACHER_STEPS = 3.0, 50  # of a teacher, where nothing says otherwise
PICTURES = (".png", ".webp")
REAL = "real pictures"
COMPARED = 8  # prompts of comparison.png

log = logging.getLogger(__name__)
WATCHED = ("matching", "adversarial", "diffusion", "hinge", "preference", "reward/best")


def train(recipe: Recipe, resume: bool = True, progress: Progress | None = None) -> Path:
    """Stage 1, then stage 2 if the recipe has one; leaves the students in `output_dir`.

    A run that was stopped goes on from its newest checkpoint unless `resume` is False. Raises
    UserError when another process runs in the same folder.
    """
    output = Path(recipe.output_dir)
    best.check_metric(recipe)
    beforehand.check_output(output)
    with alone_in(output) if distributed.first() else nullcontext():
        point = distributed.told(beginning(recipe, resume) if distributed.first() else None)
        beforehand.check(recipe)
        session = open_session(recipe)
        if point:
            was = checkpoint.state_of(point)["about"]
            check_data(point, was.get("data"), session.identity)
            check_frozen(point, was.get("frozen", {}), session.frozen)
        if recipe.validation.best_metric:
            session.measure = best.measure_of(session, *judged_by(session))
            session.worth = best.worth_of(recipe)
        if distributed.first():
            prepare(recipe, resume)
            write_json(output / "data.json", session.data)
        distributed.barrier()
        both_stages(session, point, progress or bar())
    return output


def beginning(recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint that the run goes on from, after mending what a kill left; None: the start.

    Raises UserError when the recipe does not go on from it.
    """
    output = Path(recipe.output_dir)
    mend_all(output)
    if not resume:
        return None
    point = checkpoint.latest(output)
    changed = check_same(recipe, point)
    if point:
        state = checkpoint.state_of(point)
        check_progress(recipe, state, changed)
        tell_versions(state["about"].get("versions", {}), versions())
        if state["stage"] != "distill":
            check_first_student(point)
    return point


def both_stages(session: Session, point: Path | None, show: Progress) -> None:
    """From the checkpoint `point`, or from the start, to the students."""
    recipe, output = session.recipe, session.output
    start: dict[str, Any] = {"stage": "distill", "iteration": 0}
    at = checkpoint.state_of(point) if point else start
    if distributed.first():
        for name in ("metrics.jsonl", "validation.jsonl"):
            cut_log(output / name, at["stage"], at["iteration"])
        if point and not at.get("skipped"):  # a kill may have come before it was seen to
            checkpoint.prune(output, recipe.train.checkpoints_total_limit, session.worth)
    unmeasured = bool(point and session.measure and not at["about"].get("metrics"))
    if at["stage"] == "distill":
        trainer = session.trainer("distill")
        if point:
            trainer.restore(point)
        run_stage(session, trainer, recipe.train.max_train_steps, show, unmeasured)
        session.start = trainer.state.for_next_stage()
        write_student(session, trainer, "student-stage1")
        point, unmeasured = None, False
    # back from the file, also where it has just been written: a LoRA's scale is divided out again
    export.read_student(session.student, output / "student-stage1")
    session.take_over()
    if point:
        check_reference(point, at["about"].get("reference"), session.reference)
    if recipe.train.joint_train_steps:
        trainer = session.trainer(recipe.train.stage2)
        if point:
            trainer.restore(point)
        run_stage(session, trainer, recipe.train.joint_train_steps, show, unmeasured)
    write_student(session, trainer, "student")
    if (stopwatch := session.stopwatch).iterations and distributed.first():
        write_json(
            output / "timing.json",
            {"milliseconds": stopwatch.milliseconds(), "iterations": stopwatch.iterations},
        )


def prepare(recipe: Recipe, resume: bool) -> None:
    """Makes the run folder and writes down what is run, and with which versions."""
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not resume:
        for path in (*checkpoint.all_of(output), *(output / name for name in MADE)):
            remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(output / "recipe.yaml", config.dump(recipe))
    write_json(output / "versions.json", versions())


def write_student(session: Session, trainer: Trainer, name: str) -> Path:
    """The student as a diffusers folder, with a card that says how it was made and is called."""
    note = how_made(trainer.stage, trainer.state)
    teacher, student, folder = session.teacher, session.student, session.output / name
    return export.write_student(
        teacher, student, session.recipe.method, folder, note, trainer.state.in_average
    )


def bar() -> Progress:
    """A progress bar for each stage, with the time left and the numbers that matter."""
    bars: dict[str, tqdm[object]] = {}

    def show(stage: str, done: int, of: int, record: dict[str, float]) -> None:
        if stage not in bars:
            for earlier in bars.values():
                earlier.close()  # else it counts the time of this stage as its own
            bars[stage] = tqdm(total=of, initial=done, desc=stage, unit="update", mininterval=1)
        numbers = {k: f"{record[k]:.3g}" for k in WATCHED if k in record}
        bars[stage].set_postfix(numbers, refresh=False)
        bars[stage].update(done - bars[stage].n)

    return show


def full(recipe: Recipe, resume: bool = True) -> Path:
    """Train, measure all arms side by side, and write the report; returns its path."""
    from flashdmd import report

    output = train(recipe, resume)
    measure(recipe)
    if distributed.first():
        report.write(output)
    distributed.barrier()
    return output / "report.html"


DEMO = {  # the shipped recipes, measured on fewer pictures: a quarter of an hour on two cores
    "validation.num_prompts": 96,
}


def demo(family: str, output_dir: Path, overrides: list[str]) -> Path:
    """Both stages on the shipped teacher of a family; returns the report's path."""
    short = [f"{key}={value}" for key, value in DEMO.items()]
    return full(config.read(f"emoji-{family}", [*short, *overrides], output_dir))


def measure(recipe: Recipe) -> Path:
    """metrics.json and the sample sheets of a finished run: teachers and students side by side."""
    output, teacher = Path(recipe.output_dir), teacher_of(recipe)
    guidance, steps = recipe.method.teacher_guidance_scale, len(recipe.method.student_timesteps)
    many = recipe.validation.teacher_steps
    arms: dict[str, Callable[[], Arm]] = {  # of students one at a time: each is a pipeline
        f"teacher-{many}": lambda: Arm(teacher, many, guidance),
        f"teacher-{steps}": lambda: Arm(teacher, steps, guidance),
        "student-stage1": lambda: student_arm(output / "student-stage1", recipe),
    }
    if recipe.train.joint_train_steps:
        arms[f"student-{recipe.train.stage2}"] = lambda: student_arm(output / "student", recipe)
    bench = bench_of(recipe, teacher)
    name = recipe.model.reward_model_name_or_path
    reward = load_reward(name, teacher) if name else None
    score = scorer(reward, teacher) if reward else None
    embedded = isinstance(bench, Bench)
    prompts = list(
        recipe.validation.prompts or (SHOWN if embedded else bench.prompts[: len(SHOWN)])
    )
    rows, shown = [], {}
    for arm, made in tqdm(arms.items(), desc="measure", unit="arm"):
        one = made()
        rows.append(bench.measure(arm, one.nfe, one.draw, score))
        shown[arm] = one.draw(prompts, recipe.validation.seed)
    path = output / "metrics.json"
    if not distributed.first():
        return path
    for arm, images in shown.items():
        for i, image in enumerate(images):
            picture(output / "samples" / arm / f"{i:02d}.png", image)
    first = {arm: images[:COMPARED] for arm, images in shown.items()}
    comparison(first, prompts[:COMPARED]).save(output / "samples/comparison.png")
    notes = {"prompts": prompts, "arms": list(arms), "columns": len(prompts)}
    write_json(output / "samples" / "samples.json", notes)
    fingerprint = bench.fingerprint(reward.network if reward else None)
    write_json(path, {"fingerprint": fingerprint, "rows": rows})
    return path


def student_arm(folder: Path, recipe: Recipe) -> "Arm":
    """A student of this run, called plainly."""
    student = load_teacher(str(folder), device_of(recipe))
    guidance = export.plain_guidance(student, recipe.method.teacher_guidance_scale)
    return Arm(student, len(recipe.method.student_timesteps), guidance)


def bench_of(recipe: Recipe, teacher: Teacher) -> Bench | OwnBench:
    """What a run is measured by: the embedded judge where it is of the embedded pictures, else
    distances to pictures of its own.
    """
    said = recipe.validation
    if recipe.data.train_data_dir == EMOJI:
        protocol = Protocol(num_prompts=said.num_prompts, seed=said.seed)
        return Bench(protocol, judge.load(ASSETS / "judge"))
    square = recipe.data.model_copy(update={"aspect_ratio_buckets": False})  # as all arms draw
    source, caveat = open_source(recipe.model_copy(update={"data": square}), teacher)
    rng = np.random.default_rng(seed_of("measured", said.seed))
    drawn = source.draw(rng, said.num_prompts)
    captions = drawn.captions
    if known := prompts_of(recipe):
        n = min(said.num_prompts, max(len(known), LEAST))  # of too few, some again
        captions = [known[i] for i in np.resize(rng.permutation(len(known)), n)]
    if len(said.prompts) >= LEAST:
        captions = list(said.prompts)
    assert drawn.pictures is not None
    _, once = np.unique(drawn.indices, return_index=True)  # one met twice is no pair to compare
    called = "samples of the teacher" if caveat else "real pictures"
    return OwnBench(captions, said.seed, EfficientNetLite(2), called, drawn.pictures[once])


def judged_by(session: Session) -> tuple[Bench | OwnBench, Score | None]:
    """What a run is measured by while it goes on: as when it ends."""
    teacher, name = session.teacher, session.recipe.model.reward_model_name_or_path
    reward = session.reward or (load_reward(name, teacher) if name else None)
    return bench_of(session.recipe, teacher), scorer(reward, teacher) if reward else None


def scorer(reward: RewardModel, teacher: Teacher) -> Score:
    """The trained-against reward of finished pictures: of their latents, at the lowest noise."""

    @torch.no_grad()
    def score(pictures: np.ndarray, prompts: list[str]) -> torch.Tensor:
        latents = torch.cat([teacher.encode(b) for b in batches(pictures)])
        cond = {k: v.to(latents.device) for k, v in reward.encode_prompts(prompts).items()}
        return reward(latents, times(1, latents), cond).cpu()

    return score


def evaluate(
    models: list[str],
    output: Path,
    num_prompts: int = 276,
    reward: str | None = "emoji-reward",
    guidance: float | None = None,
    split: Split = "test",
    seed: int = Protocol.seed,
) -> Path:
    """Any models in one table: students as trained, teachers at 50 steps and at the students'.

    Teachers are guided by `guidance`; if it is not given, as the students' were. Beside no student
    it is 3 and the few steps are 4. The first row is of real pictures. Without a `reward` its
    column is empty. On the prompts of `split` "train" a teacher shows what its steps do, on
    held-out ones also what it never saw.
    """
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file to write")
    teachers = {model: load_teacher(model) for model in models}  # what is missing is missed now
    for model, teacher in teachers.items():
        if teacher.image_size != SIZE:
            raise UserError(
                f"{model} draws pictures of {teacher.image_size} pixels, and the judge that is "
                f"asked here knows the embedded ones, emoji of {SIZE}; runs on other pictures are "
                "measured as they end: see metrics.json and report.html in their folders"
            )
    arms = ways({model: export.notes_of(Path(model)) for model in models}, guidance)
    rewards = {m: load_reward(reward, teacher) for m, teacher in teachers.items() if reward}
    output.parent.mkdir(parents=True, exist_ok=True)
    protocol = Protocol(num_prompts=num_prompts, split=split, seed=seed)
    bench = Bench(protocol, judge.load(ASSETS / "judge"))
    rows = [bench.measure(REAL, 0, bench.draw_real, None)]
    for name, (model, steps, scale) in tqdm(arms.items(), desc="measure", unit="arm"):
        arm = Arm(teachers[model], steps, scale)
        score = scorer(rewards[model], arm.teacher) if reward else None
        rows.append(bench.measure(name, arm.nfe, arm.draw, score))
    fingerprint = bench.fingerprint(rewards[models[0]].network if reward else None)
    if distributed.first():
        write_json(output, {"fingerprint": fingerprint, "rows": rows})
    distributed.barrier()
    return output


def ways(
    models: Mapping[str, export.Notes | None], guidance: float | None
) -> dict[str, tuple[str, int, float]]:
    """How each model is drawn, by arm: (model, steps, guidance); what has no notes is a teacher.

    Raises UserError when the students were not distilled at one guidance and none is given.
    """
    students = [notes for notes in models.values() if notes]
    theirs = sorted({s.guidance for s in students})
    if guidance is None and len(theirs) > 1:
        raise UserError(
            f"these students were distilled at guidance {' and '.join(map(str, theirs))}; say with "
            "--guidance which one the teachers beside them are drawn at"
        )
    scale = guidance if guidance is not None else theirs[0] if theirs else GUIDANCE
    few = sorted({len(s.steps) for s in students} or {4})
    arms = {}
    for model, notes in models.items():
        if notes:
            arms[model] = (model, len(notes.steps), 0.0)
        else:
            arms |= {f"{model}-{n}": (model, n, scale) for n in (TEACHER_STEPS, *few)}
    return arms


def sample(
    model: str,
    prompts: list[str],
    steps: int | None,
    seed: int,
    guidance: float | None,
    output: Path,
) -> Path:
    """A sheet of one picture a prompt, written to `output` as PNG.

    Students are called plainly, at the steps they were trained for; `guidance` and `steps` are for
    teachers, 3 and 50 unless given.
    """
    for number, prompt in enumerate(prompts, 1):
        sound(prompt, f"prompt {number}")
    check_output(output)
    teacher, notes = load_teacher(model), export.notes_of(Path(model))
    trained = notes.steps if notes else None
    steps = steps or (len(trained) if trained else TEACHER_STEPS)
    if trained is None and steps > STEPS:
        raise UserError(f"--steps {steps}: a teacher has {STEPS}")
    if guidance is None:
        guidance = export.plain_guidance(teacher, notes.guidance) if notes else GUIDANCE
    elif trained or not 0 <= guidance < math.inf:
        raise UserError(
            f"--guidance {guidance} is for teachers, 0 or more; a student's is part of its weights"
        )
    if trained and len(trained) != steps:
        raise UserError(
            f"{model} is a student of {len(trained)} steps {trained}, not {steps}; sample it with "
            f"--steps {len(trained)}"
        )
    images = Arm(teacher, steps, guidance).draw(prompts, seed)
    if distributed.first():
        contact_sheet(images, min(len(prompts), 8)).save(output)
    return output


def check_output(path: Path) -> None:
    """Makes the folder that `path` is to be written in. Raises UserError for no picture's name."""
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise UserError(f"--output {path}: give a file name that ends in {' or '.join(PICTURES)}")
    path.parent.mkdir(parents=True, exist_ok=True)


def picture(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)
