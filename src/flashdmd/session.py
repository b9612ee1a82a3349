"""From a recipe to networks, learners and trainers, and through the stages of a run."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashdmd import checkpoint, export
from flashdmd.algorithm import FlashDMD, Stage, cycle
from flashdmd.baselines import DMD2, dmd2_cycle
from flashdmd.batches import Batches, EmojiSource, Source
from flashdmd.config import Recipe
from flashdmd.data import open_folder, read_prompts
from flashdmd.discriminator import Discriminator, FeatureHead
from flashdmd.emoji import reward as emoji_reward
from flashdmd.emoji.reward import EmojiReward
from flashdmd.emoji.world import ASSETS, SIZE
from flashdmd.errors import FULL, Interrupted, UserError
from flashdmd.files import cut_torn_line, stoppable, write_text
from flashdmd.models import families
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.models.families import NetworkDenoiser, Teacher
from flashdmd.sampler import Sampler, guided
from flashdmd.stopwatch import Stopwatch
from flashdmd.trainer import Learner, State, Trainer

EMBEDDED = {"emoji-score": "score", "emoji-flow": "flow"}
Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, done, of, last record


def load_teacher(name: str) -> Teacher:
    """A teacher by folder, or one of the embedded ones by name."""
    if name not in EMBEDDED:
        return families.load(Path(name))
    folder = ASSETS / EMBEDDED[name]
    if not folder.is_dir():
        raise UserError(
            f"{name} is not shipped with this version; make it with `flashdmd emoji teacher "
            f"--family {EMBEDDED[name]}` and name the pipeline folder that this writes"
        )
    teacher = families.load(folder)
    teacher.folder = Path(name)  # what cards and reports call it
    return teacher


@dataclass
class Session:
    """One run: its networks live here from stage to stage."""

    recipe: Recipe
    teacher: Teacher
    generator: NetworkDenoiser
    score: NetworkDenoiser
    discriminator: nn.Module
    learners: dict[str, Learner]
    source: Source  # real pictures and their captions
    student: NetworkDenoiser  # what a stage leaves: the generator, averaged unless ema_decay is 0
    reward: EmojiReward | None = None  # of stage 2
    prompts: tuple[str, ...] = ()  # none: the captions
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    start: State = field(default_factory=State)  # what the next stage takes over

    @property
    def output(self) -> Path:
        return Path(self.recipe.output_dir)

    def trainer(self, stage: Stage) -> Trainer:
        """The trainer of a stage, with everything that was learned before it."""
        recipe, teacher = self.recipe, self.teacher
        method = recipe.method
        sampler = Sampler(teacher.process, method.student_timesteps)
        real = guided(teacher.denoiser, teacher.unconditional, method.teacher_guidance_scale)
        shared: dict[str, Any] = {
            "sampler": sampler,
            "teacher": real,
            "generator": self.generator,
            "score": self.score,
            "discriminator": self.discriminator,
        }
        reward = None if stage == "distill" else self.reward
        algorithm: FlashDMD | DMD2
        if recipe.train.arm == "dmd2":
            algorithm, order = DMD2(method=method, **shared), dmd2_cycle(method, stage)
        else:
            reference = copy.deepcopy(self.generator).requires_grad_(False) if reward else None
            algorithm = FlashDMD(
                method=method, decode=teacher.decode, reward=reward, reference=reference, **shared
            )
            order = cycle(method, stage)
        batches = Batches(
            teacher,
            self.source,
            method,
            recipe.train.train_batch_size,
            recipe.train.seed,
            preferring=recipe.train.preference_batch_size,
            prompts=self.prompts,
            reward_encoder=reward.encode_prompts if reward else None,
            stage=stage,
            in_latents=recipe.train.arm == "dmd2",
        )
        return Trainer(
            algorithm,
            order,
            batches,
            self.learners_of(stage),
            seed=recipe.train.seed,
            precision=torch.bfloat16 if recipe.train.mixed_precision == "bf16" else None,
            calibration=recipe.train.gan_calibration_steps
            if stage == recipe.first_stage
            else (0, 0),
            stage=stage,
            state=copy.deepcopy(self.start),
            stopwatch=self.stopwatch,
            student=None if self.student is self.generator else self.student,
            ema_decay=recipe.train.ema_decay,
        )

    def learners_of(self, stage: Stage) -> dict[str, Learner]:
        """Those of the run; in stage 2 the generator may distil at a rate of its own."""
        rate = self.recipe.train.stage2_learning_rate
        if stage == "distill" or rate is None:
            return self.learners
        return self.learners | {
            "generator": replace(self.learners["generator"], learning_rate=rate)
        }

    def take_over(self) -> None:
        """Stage 2 refines the student that stage 1 left, and is held to it as the reference."""
        if self.student is not self.generator:
            self.generator.load_state_dict(self.student.state_dict())


def load_reward(name: str, teacher: Teacher) -> EmojiReward:
    """A latent reward model for latents of `teacher`, by folder or as emoji-reward."""
    folder = ASSETS / "reward" if name == "emoji-reward" else Path(name)
    return emoji_reward.load(folder, teacher.process, teacher.pipeline.vae)


def open_session(recipe: Recipe) -> Session:
    """Loads all that a run needs, so that what is missing is missed now, and builds what learns."""
    torch.manual_seed(recipe.train.seed)
    prompts = tuple(read_prompts(Path(recipe.data.prompts))) if recipe.data.prompts else ()
    teacher = load_teacher(recipe.model.pretrained_model_name_or_path)
    if export.trained_steps(teacher.folder):
        raise UserError(
            f"model.pretrained_model_name_or_path={str(teacher.folder)!r} is a few-step student; "
            "name its teacher there, and the student as model.student_model_name_or_path"
        )
    check_steps(teacher, recipe.method.student_timesteps)
    source = open_source(recipe, teacher)
    generator, score = teacher.trainable_copy(), teacher.trainable_copy()
    if student := recipe.model.student_model_name_or_path:
        for copied in (generator, score):  # mu_psi estimates the student's score, whoever that is
            checkpoint.load_network(copied.network, Path(student), teacher.family.network)
    discriminator = build_discriminator(recipe, teacher, score)
    train = recipe.train
    rates = {
        "generator": (generator, train.learning_rate, train.max_grad_norm),
        "score": (score, train.fake_score_learning_rate, train.max_grad_norm),
        "discriminator": (
            discriminator,
            train.discriminator_learning_rate,
            train.discriminator_max_grad_norm,
        ),
        "preference": (generator, train.preference_learning_rate, train.preference_max_grad_norm),
    }
    learners = {}
    for name, (network, rate, clip) in rates.items():
        optimizer = torch.optim.AdamW(
            (p for p in network.parameters() if p.requires_grad),
            lr=rate,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.adam_weight_decay,
            eps=train.adam_epsilon,
        )
        learners[name] = Learner(network, optimizer, rate, train.lr_warmup_steps, clip)
    judged_by = recipe.model.reward_model_name_or_path
    scored = load_reward(judged_by, teacher) if judged_by else None  # it measures stage 1 as well
    reward = scored if recipe.train.joint_train_steps else None
    notes = export.notes_of(Path(student)) if student else None
    networks = generator, score, discriminator, learners
    averages = train.ema_decay > 0
    session = Session(
        recipe,
        teacher,
        *networks,
        source=source,
        student=copy.deepcopy(generator).requires_grad_(False) if averages else generator,
        reward=reward,
        prompts=prompts,
        start=State(averaged=notes.averaged if notes else 0),
    )
    for module, part in (
        (generator, "student"),
        (score, "score"),
        (teacher.denoiser, "teacher"),
        (discriminator, "discriminator"),
        (teacher.pipeline.vae.decoder, "decode"),
        (teacher.pipeline.vae.encoder, "decode"),  # of the real pictures: the way there and back
    ):
        session.stopwatch.attach(module, part)
    for name, encoder in teacher.pipeline.components.items():
        if name.startswith("text_encoder") and encoder is not None:
            session.stopwatch.attach(encoder, "prompts")
    if reward:
        session.stopwatch.attach(reward.network, "reward")
    return session


def check_steps(teacher: Teacher, steps: tuple[int, ...]) -> None:
    """Raises UserError for steps that the teacher does not know, or that no stock scheduler walks.

    Now, and not when a student that was trained on them is to be written.
    """
    try:
        Sampler(teacher.process, steps)
        export.scheduler_for(teacher, steps)
    except ValueError as e:
        raise UserError(
            f"method.student_timesteps: {e}; {teacher.folder} is a {teacher.family.kind} teacher, "
            f"whose four steps are {teacher.default_steps}"
        ) from e


def open_source(recipe: Recipe, teacher: Teacher) -> Source:
    """The real pictures: the embedded world's, or a folder's at the teacher's size."""
    name = recipe.data.train_data_dir
    if name != "emoji":
        return open_folder(Path(name), teacher.image_size, captions=not recipe.data.prompts)
    if teacher.image_size != SIZE:
        raise UserError(
            f"data.train_data_dir=emoji has pictures of {SIZE} pixels and "
            f"{teacher.folder} draws {teacher.image_size}; name a folder of pictures of your own"
        )
    return EmojiSource()


def build_discriminator(recipe: Recipe, teacher: Teacher, score: NetworkDenoiser) -> nn.Module:
    """Heads on a frozen backbone of pictures, or for DMD2 on the score estimator's middle."""
    if recipe.train.arm == "dmd2":
        nothing = torch.zeros(1, *teacher.latent_shape)
        with torch.no_grad():
            middle = score.bottleneck(nothing, torch.ones(1), teacher.unconditional(1))
        return FeatureHead(middle.shape[1], middle.shape[-1])
    return Discriminator(EfficientNetLite(0), teacher.image_size, recipe.train.discriminator_width)


def run_stage(session: Session, trainer: Trainer, target: int, progress: Progress) -> None:
    """Iterates to `target` generator updates, of stage "rl" preference updates; saves on the way,
    when stopped, and at the end.
    """
    saved = trainer.state.iteration
    train, output = session.recipe.train, session.output
    counted = "preference" if trainer.stage == "rl" else "generator"
    log = output / "metrics.jsonl"
    cut_torn_line(log)
    with stoppable() as asked_to_stop:
        while trainer.state.updates.get(counted, 0) < target or not trainer.at_boundary:
            record = trainer.iterate()
            done = trainer.state.updates.get(counted, 0)
            before = trainer.state.before.get("generator", 0)
            facts = {
                "iteration": trainer.state.iteration,
                "stage": trainer.stage,
                "arm": train.arm,
                "generator_updates": before + trainer.generator_updates,
                "images": trainer.state.images,
            }
            with log.open("a") as f:
                f.write(json.dumps(facts | record) + "\n")
            progress(trainer.stage, done, target, record)
            due = train.checkpointing_steps and done % train.checkpointing_steps == 0
            if asked_to_stop() or (due and trainer.at_boundary):
                save(session, trainer)
                saved = trainer.state.iteration
            if asked_to_stop():
                raise stopped(trainer, output)
        if trainer.state.iteration > saved:
            save(session, trainer)
        if asked_to_stop():
            raise stopped(trainer, output)


def stopped(trainer: Trainer, output: Path) -> Interrupted:
    return Interrupted(
        f"stopped after {trainer.generator_updates} generator updates of stage {trainer.stage}; "
        f"saved in {output}"
    )


def save(session: Session, trainer: Trainer) -> None:
    """Writes checkpoint-{iterations}, of stage 2 a million later, and prunes older ones.

    On a full disk these make room for it, unless all are to be kept.
    """
    limit = session.recipe.train.checkpoints_total_limit
    step = trainer.state.iteration + (10**6 if trainer.stage != "distill" else 0)
    folder = session.output / f"checkpoint-{step}"
    try:
        trainer.save(folder)
    except OSError as e:
        if e.errno not in FULL or limit is None or len(checkpoint.all_of(session.output)) < 2:
            raise
        checkpoint.prune(session.output, 1)
        trainer.save(folder)
    checkpoint.prune(session.output, limit)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
