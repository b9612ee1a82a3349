"""From a recipe to networks, learners and trainers, and through the stages of a run."""

import copy
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashdmd import checkpoint, distributed, draws, export, notfinite
from flashdmd.algorithm import FlashDMD, Stage, cycle
from flashdmd.augment import diff_augment
from flashdmd.baselines import DMD2, dmd2_cycle
from flashdmd.batches import Batches, Source, ended
from flashdmd.beforehand import check_steps
from flashdmd.cache import Latents, fingerprint
from flashdmd.config import Recipe
from flashdmd.discriminator import Discriminator, FeatureHead
from flashdmd.errors import FULL, Interrupted, UserError
from flashdmd.files import cut_torn_line, digest, stoppable, sync, write_text
from flashdmd.loading import RewardModel, load_reward, teacher_of
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.models.denoiser import Adapter, AdapterDenoiser, NetworkDenoiser, save_memory
from flashdmd.models.quantise import quantise_base
from flashdmd.models.teacher import DTYPES, Teacher
from flashdmd.models.vision import load_backbone
from flashdmd.optimizers import make_optimizer
from flashdmd.sampler import Sampler
from flashdmd.sources import (
    cache_embeddings,
    cache_latents,
    described,
    identity,
    known_prompts,
    of_teacher,
    open_source,
    prompts_of,
)
from flashdmd.stopwatch import Stopwatch
from flashdmd.trainer import Learner, State, Trainer

PLAIN = "efficientnet-lite0"  # the backbone that is shipped
SPARE = 10**5  # iterations of stage 1 that may have been made beside those that count
Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, done, of, last record


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
    latents: Latents | None = None  # of the real pictures, where they were encoded before
    reward: RewardModel | None = None  # of stage 2
    anchor: NetworkDenoiser | None = None  # outline of the reference of stage 2; None: a twin is it
    prompts: tuple[str, ...] = ()  # none: the captions
    data: dict[str, Any] = field(default_factory=dict)  # what the report says of the pictures
    identity: str = ""  # of pictures and prompts
    frozen: dict[str, str] = field(default_factory=dict)  # fingerprints of what no run trains
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    start: State = field(default_factory=State)  # what the next stage takes over
    reference: str | None = None  # fingerprint of what stage 2 is held to
    measure: Callable[[str], dict[str, Any]] | None = None  # the student, in a stage
    worth: Callable[[Path], float | None] | None = None  # of a checkpoint that was measured

    @property
    def output(self) -> Path:
        return Path(self.recipe.output_dir)

    def trainer(self, stage: Stage) -> Trainer:
        """The trainer of a stage, with everything that was learned before it."""
        recipe, teacher = self.recipe, self.teacher
        method = recipe.method
        sampler = Sampler(teacher.process, method.student_timesteps)
        shared: dict[str, Any] = {
            "sampler": sampler,
            "teacher": teacher.guided(method.teacher_guidance_scale),
            "generator": self.generator,
            "score": self.score,
            "discriminator": self.discriminator,
        }
        reward = None if stage == "distill" else self.reward
        algorithm: FlashDMD | DMD2
        if recipe.train.arm == "dmd2":
            algorithm, order = DMD2(method=method, **shared), dmd2_cycle(method, stage)
        else:
            reference = self.reference_of_stage_2() if reward else None
            decode = self.decode
            critic = recipe.discriminator
            algorithm = FlashDMD(
                method=method,
                decode=decode,
                reward=reward,
                reference=reference,
                augment=partial(diff_augment, policy=critic.augment),
                r1_weight=critic.r1_weight,
                r1_sigma=critic.r1_sigma,
                **shared,
            )
            order = cycle(method, stage)
        batches = Batches(
            teacher,
            self.source,
            method,
            recipe.train.train_batch_size,
            recipe.train.seed,
            preferring=recipe.train.preference_batch_size,
            rank=distributed.rank(),
            ranks=distributed.ranks(),
            prompts=self.prompts,
            reward_encoder=reward.encode_prompts if reward else None,
            stage=stage,
            in_latents=recipe.train.arm == "dmd2",
            decode=self.decode,
            latents=self.latents,
            parts=recipe.train.gradient_accumulation_steps,
            order=order,
            workers=recipe.data.dataloader_num_workers,
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
            parts=recipe.train.gradient_accumulation_steps,
            device=teacher.device.type,
        )

    def reference_of_stage_2(self) -> NetworkDenoiser:
        """The generator as it is now, frozen."""
        if self.anchor is None:
            return self.generator.twin("reference")
        return self.anchor.dealt(self.generator)

    def decode(self, latents: Tensor) -> Tensor:
        """What the discriminator sees of latents: all, or a crop of each."""
        crop = self.recipe.discriminator.crop
        return self.teacher.decode(latents if crop is None else cropped(latents, crop))

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
        self.reference = fingerprint(checkpoint.trained(self.student))
        if self.student is not self.generator:
            self.generator.take(self.student)


def cropped(latents: Float[Tensor, "B C h w"], side: int) -> Float[Tensor, "B C a b"]:
    """A square of `side` places of each latent, anywhere; all of one that is no larger."""
    h, w = min(side, latents.shape[2]), min(side, latents.shape[3])
    tops = draws.integers(0, latents.shape[2] - h + 1, latents).tolist()
    lefts = draws.integers(0, latents.shape[3] - w + 1, latents).tolist()
    corners = zip(latents, tops, lefts, strict=True)
    return torch.stack([z[:, top : top + h, left : left + w] for z, top, left in corners])


def open_session(recipe: Recipe) -> Session:
    """Loads all that a run needs, so that what is missing is missed now, and builds what learns."""
    check_shares(recipe)
    torch.manual_seed(recipe.train.seed)
    prompts = prompts_of(recipe)
    teacher = teacher_of(recipe)
    steps = recipe.method.student_timesteps
    check_steps(teacher.family, teacher.pipeline, teacher.process, steps, teacher.folder)
    frozen = of_teacher(teacher)
    if distributed.ranks() > 1:
        said = f"{frozen} {versions()} {recipe.model_dump_json()}"
        distributed.agree(digest(said.encode()), "weights of the teacher, recipe or versions")
    with distributed.first_alone():  # it makes the caches, the others find them
        (source, caveat), latents = open_source(recipe, teacher), None
        if recipe.data.cache_latents:
            source, latents = cache_latents(recipe, teacher, source)
        if recipe.data.cache_text_embeddings:
            # DMD2's head is fitted to the features of one prompt, the empty one
            cache_embeddings(recipe, teacher, [*known_prompts(source, prompts), ""])
    known = identity(source, prompts)
    distributed.agree(known, "pictures, captions or prompts")
    generator, score, student, anchor = learning(recipe, teacher)
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
        optimizer = make_optimizer(
            (p for p in network.parameters() if p.requires_grad),
            lr=rate,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.adam_weight_decay,
            eps=train.adam_epsilon,
            eight_bit=train.use_8bit_adam,
        )
        learners[name] = Learner(network, optimizer, rate, train.lr_warmup_steps, clip)
    judged_by = recipe.model.reward_model_name_or_path
    scored = load_reward(judged_by, teacher) if judged_by else None  # it measures stage 1 as well
    reward = scored if recipe.train.joint_train_steps else None
    started_from = recipe.model.student_model_name_or_path
    notes = export.notes_of(Path(started_from)) if started_from else None
    networks = generator, score, discriminator, learners
    session = Session(
        recipe,
        teacher,
        *networks,
        source=source,
        latents=latents,
        student=student,
        reward=reward,
        anchor=anchor,
        prompts=prompts,
        data=described(source, caveat),
        identity=known,
        frozen=frozen | of_critics(discriminator, scored),
        start=State(averaged=notes.averaged if notes else 0),
    )
    for module, part in (
        (generator, "student"),
        (score, "score"),
        (teacher.denoiser, "teacher"),
        (discriminator, "discriminator"),
        *((part, "decode") for part in teacher.pipeline.vae.children()),  # and the way there
    ):
        session.stopwatch.attach(module, part)
    for name, encoder in teacher.pipeline.components.items():
        if name.startswith("text_encoder") and encoder is not None:
            session.stopwatch.attach(encoder, "prompts")
    if reward:
        session.stopwatch.attach(reward.network, "reward")
    return session


def of_critics(discriminator: nn.Module, reward: RewardModel | None) -> dict[str, str]:
    """Fingerprints of what is frozen beside the teacher."""
    told = {"reward": fingerprint(reward.network.state_dict())} if reward else {}
    if isinstance(discriminator, Discriminator):
        told["backbone"] = fingerprint(discriminator.backbone.state_dict())
    return told


def check_shares(recipe: Recipe) -> None:
    """Raises UserError for batches that the processes of this run cannot share equally."""
    train, ranks = recipe.train, distributed.ranks()
    for name in ("train_batch_size", "preference_batch_size"):
        if (size := getattr(train, name)) % (ranks * train.gradient_accumulation_steps):
            raise UserError(
                f"train.{name}={size} is the batch of all processes together, and {ranks} of them "
                f"in gradient_accumulation_steps={train.gradient_accumulation_steps} parts each "
                "cannot share it equally; give a multiple of both, or another number of processes"
            )


class Learning(NamedTuple):
    """What learns, and what is made of it: all as the teacher's network is."""

    generator: NetworkDenoiser
    score: NetworkDenoiser
    student: NetworkDenoiser
    anchor: NetworkDenoiser | None  # outline of the reference of stage 2: shares have no twin


def learning(recipe: Recipe, teacher: Teacher) -> Learning:
    """Copies of the teacher's network, or with LoRA adapters on it, equal from the start (so their
    factors may be coupled, see docs/paper.md).

    A process of a sharded run holds one whole network, the teacher's, until the others are dealt
    out, and then its share of all.
    """
    lora, frozen = recipe.lora, teacher.denoiser
    if lora.rank:
        layers = lora.lora_layers or teacher.family.lora_layers
        adapter = Adapter(lora.rank, float(lora.lora_alpha or lora.rank), layers)
        quantise_base(frozen.network, recipe.model.quantize_base)
        teacher.denoiser = AdapterDenoiser(frozen.network, frozen.family, frozen.process, adapter)
    sharded = recipe.train.sharded and distributed.ranks() > 1
    saves = recipe.train.gradient_checkpointing
    if saves and teacher.pipeline.vae._supports_gradient_checkpointing:  # Qwen's and Sana's cannot
        save_memory(teacher.pipeline.vae)

    def twin(of: NetworkDenoiser, name: str) -> NetworkDenoiser:
        other = frozen.outline().dealt(of) if sharded else of.twin(name)
        if saves:
            save_memory(other.network)
        return other

    generator = twin(teacher.denoiser, "student").requires_grad_(True)
    if start := recipe.model.student_model_name_or_path:
        export.read_student(generator, Path(start))  # mu_psi estimates its score, whoever that is
    score = twin(generator, "score").requires_grad_(True)
    student = twin(generator, "average") if recipe.train.ema_decay > 0 else generator
    anchor = frozen.outline() if sharded and recipe.train.joint_train_steps > 0 else None
    if not lora.rank:
        teacher.hold(recipe.model.frozen_dtype)
    if sharded:
        distributed.shard(teacher.denoiser.network)
    return Learning(generator, score, student, anchor)


def build_discriminator(recipe: Recipe, teacher: Teacher, score: NetworkDenoiser) -> nn.Module:
    """Heads on a frozen backbone of pictures, or for DMD2 on the score estimator's middle."""
    if recipe.train.arm == "dmd2":
        nothing = torch.zeros(1, *teacher.latent_shape, device=teacher.device)
        with torch.no_grad():
            middle = score.bottleneck(
                nothing, torch.ones_like(nothing[:, 0, 0, 0]), teacher.encode_prompts([""])
            )
        return FeatureHead(middle.shape[1], middle.shape[-1]).to(teacher.device)
    seen, critic = teacher.image_size, recipe.discriminator
    if critic.crop is not None:
        seen = min(seen, critic.crop * teacher.family.factor(teacher.pipeline))
    backbone: nn.Module = EfficientNetLite(0)
    if critic.backbone != PLAIN:
        dtype = DTYPES[recipe.model.frozen_dtype]
        saving = recipe.train.gradient_checkpointing
        backbone = load_backbone(critic.backbone, dtype, blocks=critic.blocks, checkpointing=saving)
    return Discriminator(backbone.to(teacher.device), seen, critic.width).to(teacher.device)


def run_stage(
    session: Session, trainer: Trainer, target: int, progress: Progress, unmeasured: bool = False
) -> None:
    """Iterates to `target` generator updates, of stage "rl" preference updates; saves on the way,
    when stopped, and at the end. With `unmeasured`, what it goes on from was due and is measured.

    While updates are skipped nothing is saved but the end of the stage, which then removes no
    older checkpoint. Raises Interrupted when stopped.
    """
    train, output = session.recipe.train, session.output
    counted = "preference" if trainer.stage == "rl" else "generator"
    log = output / "metrics.jsonl"

    def ends() -> bool:
        return trainer.state.updates.get(counted, 0) >= target and trainer.at_boundary

    def due() -> bool:
        done, every = trainer.state.updates.get(counted, 0), train.checkpointing_steps
        well = trainer.state.bad_in_a_row == 0  # else an earlier checkpoint is the better one
        often = bool(well and every and done and done % every == 0)
        return trainer.at_boundary and (often or ends())

    with stoppable() as asked, ended(trainer.batches):
        if unmeasured and due():
            save(session, trainer, measured=True)
        while not ends():
            record = trainer.iterate()
            done = trainer.state.updates.get(counted, 0)
            append(log, where(trainer) | record)
            progress(trainer.stage, done, target, record)
            if trainer.bad:
                in_a_row, most = trainer.state.bad_in_a_row, train.max_bad_iterations
                notfinite.keep(trainer.bad, output / "not-finite", in_a_row, most)
            stop = distributed.any_of(asked())
            if due() or (stop and trainer.state.bad_in_a_row == 0):
                save(session, trainer, measured=due() and not stop)  # to measure can take long
            if stop:
                raise stopped(trainer, output)
        if distributed.any_of(asked()):  # while it was saved for the last time
            raise stopped(trainer, output)


def stopped(trainer: Trainer, output: Path) -> Interrupted:
    saved = f"saved in {output}"
    if trainer.state.bad_in_a_row:
        saved = f"losses were not finite, so what is saved in {output} is from before them"
    done, stage = trainer.generator_updates, trainer.stage
    return Interrupted(f"stopped after {done} generator updates of stage {stage}; {saved}")


def where(trainer: Trainer) -> dict[str, Any]:
    """What a line of a log begins with."""
    before = trainer.state.before.get("generator", 0)
    return {
        "iteration": trainer.state.iteration,
        "stage": trainer.stage,
        "arm": "dmd2" if isinstance(trainer.algorithm, DMD2) else "flash-dmd",
        "generator_updates": before + trainer.generator_updates,
        "images": trainer.state.images,
    }


def append(log: Path, line: dict[str, Any]) -> None:
    if distributed.first():
        with log.open("a") as f:
            f.write(json.dumps(line) + "\n")


def save(session: Session, trainer: Trainer, measured: bool = False) -> None:
    """Writes checkpoint-{iterations}, of stage 2 a million later, and prunes older ones.

    On a full disk these make room for it, unless all are to be kept. With `measured` the student
    is measured first, if it is to be. Raises FloatingPointError for weights that are not finite.
    """
    if odd := trainer.not_finite():
        raise FloatingPointError(f"weights of {odd} after iteration {trainer.state.iteration}")
    metrics: dict[str, Any] = {}
    if measured and session.measure:
        row = session.measure(trainer.stage)
        row["student"] = row.pop("arm")
        append(session.output / "validation.jsonl", where(trainer) | row)
        metrics = {name: v for name, v in row.items() if not name.startswith("seconds")}
    limit = session.recipe.train.checkpoints_total_limit
    folder = session.output / f"checkpoint-{number_of(trainer)}"
    about = {
        "recipe": json.loads(session.recipe.model_dump_json()),
        "versions": versions(),
        "reference": session.reference,
        "data": session.identity,
        "frozen": session.frozen,
        "metrics": metrics,
    }
    if distributed.first() and (log := session.output / "metrics.jsonl").exists():
        sync(log)
    try:
        trainer.save(folder, about)
    except OSError as e:
        room = limit is not None and len(checkpoint.all_of(session.output)) > 1
        if e.errno not in FULL or not room or distributed.ranks() > 1:
            raise
        checkpoint.prune(session.output, 1, session.worth)
        trainer.save(folder, about)
    if distributed.first() and trainer.state.bad_in_a_row == 0:
        checkpoint.prune(session.output, limit, session.worth)


def number_of(trainer: Trainer) -> int:
    """Of a checkpoint: its iterations, of stage 2 a million later, or as many as lie behind it."""
    if trainer.stage == "distill":
        return trainer.state.iteration
    before = trainer.state.before.get("generator", 0) * trainer.algorithm.method.ttur
    return trainer.state.iteration + 10**6 * (1 + (before + SPARE) // 10**6)


def cut_log(log: Path, stage: str, iteration: int) -> None:
    """Takes out the lines after an iteration, of later stages too: they are logged again."""
    cut_torn_line(log)
    at = 0
    for line in log.read_bytes().splitlines(keepends=True) if log.exists() else ():
        try:
            told = dict(json.loads(line))
        except (ValueError, TypeError):  # not of ours
            told = {}
        here = told.get("stage", stage)
        if told.get("iteration", 0) > iteration if here == stage else stage == "distill":
            os.truncate(log, at)
            return
        at += len(line)


def versions() -> dict[str, str]:
    """Of what decides the numbers of a run."""
    packages = ("flashdmd", "torch", "diffusers", "transformers", "numpy")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
