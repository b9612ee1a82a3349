"""A latent reward model from preferences: the recipe, its updates, what it gets right (LPO 3.2).

Update n draws everything from (seed, n), so a fit that was stopped goes on as if it had not been.
"""

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from flashdmd import checkpoint, plain
from flashdmd.config import describe, unknown
from flashdmd.errors import Interrupted, UserError
from flashdmd.files import alone_in, cut_torn_line, mend_all, stoppable, write_text
from flashdmd.models.latent_reward import LRM, build, open_base, write
from flashdmd.preferences import GAPS, Batch, Preferences, divided, filtered, open_preferences
from flashdmd.reward import pair_loss
from flashdmd.sampler import repeat, times
from flashdmd.schedule import STEPS
from flashdmd.sections import Count, Decay, Norm, Rate, Section, Seed, Signed, Text, Whole
from flashdmd.seeds import seed_of

Time = Annotated[int, Field(ge=0, lt=STEPS)]


class RewardRecipe(Section):
    """LRM-XL's numbers, those of LPO's public configuration; in brackets LRM-1.5's."""

    pretrained_model_name_or_path: Text  # the base: a pipeline folder, or a name on the hub
    train_text_encoders: bool | None = None  # None: as LPO, CLIPs of SD and SDXL yes, SD3's no
    text_projection: Text | None = None  # [CLIP-L's model.safetensors]; None: starts as identity
    resolution: Count | None = None  # pixels across; None: the base's [512, XL 1024]

    train_data: Text  # a folder of parquet or arrow files, one of save_to_disk, or a .jsonl
    split: Text = "train"
    held_out_data: Text | None = None  # None: a share of the prompts of train_data
    held_out_split: Text = "validation_unique"  # Pick-a-Pic's
    held_out_share: Annotated[float, Field(ge=0, lt=1)] = 0.01  # [DEF]
    score_gaps: Text | None = None  # a .csv or .jsonl, a line for each row; None: columns, if any
    gap_bounds: dict[Text, tuple[Signed, Signed]] = GAPS  # least lead of a pair, most of a tie

    timesteps: Annotated[tuple[Time, ...], Field(min_length=1)] = tuple(range(1, 952, 50))
    max_train_steps: Whole = 8000  # [4000]
    train_batch_size: Count = 32  # pairs: 4 on each of 8 GPUs [16 on each: 128]
    micro_batch_size: Count | None = None  # pairs in memory at once; None: all
    learning_rate: Rate = 1e-5
    lr_warmup_steps: Whole = 1000  # linear [500]
    lr_decay_steps: Count = 64_000  # where a linear decay ends: 8000 steps x 8 GPUs [32,000]
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_weight_decay: Decay = 0.3
    max_grad_norm: Norm = 1.0
    mixed_precision: Literal["no", "bf16"] = "bf16"  # of the networks; scores and loss are float32
    gradient_checkpointing: bool = False  # less memory, about a third more time
    seed: Seed = 0

    report_timesteps: tuple[Time, ...] = (1, 201, 401, 601, 801, 951)  # of the held-out accuracy
    workers: Count = 8  # threads that read pictures
    checkpointing_steps: Whole = 500  # 0: only at the end
    checkpoints_total_limit: Count | None = 1  # None keeps all
    output_dir: Text = "runs/reward"

    @model_validator(mode="after")
    def _rates(self) -> "RewardRecipe":
        if self.lr_decay_steps <= max(self.lr_warmup_steps, self.max_train_steps - 1):
            raise ValueError(
                f"lr_decay_steps={self.lr_decay_steps} must exceed "
                f"lr_warmup_steps={self.lr_warmup_steps} and reach "
                f"max_train_steps={self.max_train_steps}"
            )
        return self

    def share(self, step: int) -> float:
        """Of the full learning rate: rises over the warm-up, then falls to 0 at lr_decay_steps."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        return (self.lr_decay_steps - step) / (self.lr_decay_steps - self.lr_warmup_steps)


def read(path: Path, overrides: list[str]) -> RewardRecipe:
    """The recipe in a YAML file, `key=value` put in after it. Raises UserError."""
    content = plain.parse(plain.read(path, "the recipe"), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a reward's recipe is keys")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not an override; write key=value")
        content[name] = plain.parse(text, f"the value of {override!r}")
    known = list(RewardRecipe.model_fields)
    for name in content:
        if name not in known:
            raise UserError(unknown(str(name), known, str(path), {"": known}))
    try:
        return RewardRecipe.model_validate(content)
    except ValidationError as e:
        raise UserError(f"{path}: " + "\n".join(map(describe, e.errors()))) from e


FREE = {  # what may change between the parts of a fit
    "max_train_steps", "report_timesteps", "workers", "checkpointing_steps",
    "checkpoints_total_limit", "output_dir",
}  # fmt: skip


@torch.no_grad()
def latents_of(vae: Any, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
    """A draw of the encoder's, as the policy sees latents."""
    device = next(vae.parameters()).device
    pixels = images.to(device, torch.float32) / 127.5 - 1
    drawn: Tensor = vae.encode(pixels).latent_dist.sample()
    return (drawn - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@dataclass(frozen=True)
class Fit:
    """What is trained, on what, and how."""

    recipe: RewardRecipe
    reward: LRM
    vae: Any
    pairs: Preferences
    size: int  # pixels across

    @property
    def device(self) -> torch.device:
        return self.reward.network.logit_scale.device

    @property
    def at_once(self) -> int:
        return self.recipe.micro_batch_size or self.recipe.train_batch_size

    def scores(
        self, batch: Batch, part: Tensor, t: Float[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """(win, lose) of the pairs `part`, each picture noised on its own at its pair's time."""
        both = torch.cat([latents_of(self.vae, images[part]) for images in (batch.win, batch.lose)])
        t = t.repeat(2)
        x_t = self.reward.facts.process.add_noise(both, torch.randn_like(both), t)
        bf16 = self.recipe.mixed_precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            cond = self.reward.words([batch.captions[i] for i in part.tolist()])
            win, lose = self.reward.network(x_t, t, repeat(cond, 2)).float().chunk(2)
        return win, lose

    def gradients(self, n: int, batch: Batch) -> dict[str, float]:
        """Adds up the gradients of update `n`, a part of the batch at a time."""
        torch.manual_seed(seed_of(self.recipe.seed, "reward", n))
        levels = torch.tensor(self.recipe.timesteps, dtype=torch.float32)
        t = levels[torch.randint(len(levels), (len(batch.ties),))]
        loss, right = torch.zeros(2, device=self.device)
        for part in torch.arange(len(t)).split(self.at_once):
            win, lose = self.scores(batch, part, t[part].to(self.device))
            ties, weights = (x[part].to(self.device) for x in (batch.ties, batch.weights))
            term = pair_loss(win, lose, ties, weights)
            term.backward()
            loss, right = loss + term.detach(), right + ((win > lose) * (1 - ties)).sum()
        decided = (1 - batch.ties).sum().clamp_min(1)
        return {"loss": loss.item(), "accuracy": right.item() / decided.item()}

    @torch.no_grad()
    def accuracy(self, held_out: Preferences, readers: Executor) -> dict[int, float]:
        """The share of decided pairs put in order, at each of report_timesteps."""
        decided = held_out.take(~held_out.ties)
        right = dict.fromkeys(self.recipe.report_timesteps, 0)
        rng = np.random.default_rng(seed_of(self.recipe.seed, "held out"))
        for start in range(0, len(decided), self.at_once):
            chosen = list(range(start, min(start + self.at_once, len(decided))))
            batch = decided.read(
                chosen, self.size, readers, lambda: int(rng.integers(len(decided)))
            )
            torch.manual_seed(seed_of(self.recipe.seed, "held out", start))
            for level in right:
                every = torch.arange(len(chosen))
                t = times(level, every).to(self.device)
                win, lose = self.scores(batch, every, t)
                right[level] += int((win > lose).sum())
        return {level: count / len(decided) for level, count in right.items() if len(decided)}


def fit_reward(recipe: RewardRecipe, device: torch.device | None = None) -> dict[str, Any]:
    """Trains the recipe's reward and writes it to `output_dir`/reward; returns what it can do.

    That is also in its accuracy.json: pairs counted before and after the filter, and the share of
    held-out pairs put in order by noise level. Goes on from the newest checkpoint. Raises UserError
    for what a person can mend, and Interrupted when asked to stop, with the state saved.
    """
    output = Path(recipe.output_dir)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with alone_in(output), ThreadPoolExecutor(recipe.workers) as readers:
        mend_all(output)
        pairs, held_out, counts = data_of(recipe)
        fit = prepared(recipe, pairs, device)
        train(fit, output, readers)
        fit.reward.eval()
        accuracy = fit.accuracy(held_out, readers)
        write(fit.reward, output / "reward")
    report = {
        "pairs": counts,
        "held_out_pairs": int((~held_out.ties).sum()),
        "accuracy": accuracy,
        "updates": recipe.max_train_steps,
    }
    write_text(output / "reward/accuracy.json", json.dumps(report, indent=2) + "\n")
    return report


def data_of(recipe: RewardRecipe) -> tuple[Preferences, Preferences, dict[str, Any]]:
    """(to learn from, held out, counts); the held-out pairs are not filtered by their scores."""
    gaps = Path(recipe.score_gaps) if recipe.score_gaps else None
    names = tuple(recipe.gap_bounds)
    pairs, read = open_preferences(Path(recipe.train_data), recipe.split, gaps, names)
    if recipe.held_out_data is None:
        pairs, held_out = divided(pairs, recipe.held_out_share)
    else:
        held_out, _ = open_preferences(Path(recipe.held_out_data), recipe.held_out_split)
    pairs, counts = filtered(pairs, recipe.gap_bounds)
    return pairs, held_out, {**read, "held out": len(held_out), **counts}


def prepared(recipe: RewardRecipe, pairs: Preferences, device: torch.device) -> Fit:
    """A fit at its start; of the base nothing stays in memory but the encoder and the words."""
    base = recipe.pretrained_model_name_or_path
    pipeline = open_base(base)
    torch.manual_seed(seed_of(recipe.seed, "reward"))
    projection = Path(recipe.text_projection) if recipe.text_projection else None
    reward = build(pipeline, base, recipe.train_text_encoders, projection).to(device)
    if recipe.gradient_checkpointing:
        reward.save_memory()
    reward.learned().train()
    places = int(reward.facts.network["sample_size"])
    size = recipe.resolution or places * reward.facts.pixels
    vae = pipeline.vae.requires_grad_(False).eval().to(device)
    return Fit(recipe, reward, vae, pairs, size)


def train(fit: Fit, output: Path, readers: Executor) -> None:
    """Updates to `max_train_steps`; checkpoints and metrics.jsonl in `output`."""
    recipe, learned = fit.recipe, fit.reward.learned()
    parameters = [p for p in learned.parameters() if p.requires_grad]
    optimizer = optimizer_of(recipe, parameters)
    start = resumed(fit, output, learned, optimizer)
    log = output / "metrics.jsonl"
    cut_torn_line(log)

    steps = range(start, recipe.max_train_steps)
    bar = tqdm(steps, initial=start, total=recipe.max_train_steps, desc="reward")
    with stoppable() as asked_to_stop, ahead(fit, steps, readers) as batches:
        for step, batch in zip(bar, batches, strict=True):
            began = time.monotonic()
            facts = update(fit, step, batch, optimizer, parameters)
            facts["seconds"] = time.monotonic() - began
            bar.set_postfix({name: f"{facts[name]:.3f}" for name in ("loss", "accuracy")})
            with log.open("a") as f:
                f.write(json.dumps({"step": step + 1, **facts}) + "\n")
            stop, last = asked_to_stop(), step + 1 == recipe.max_train_steps
            due = recipe.checkpointing_steps and (step + 1) % recipe.checkpointing_steps == 0
            if due or stop or last:
                state = {"step": step + 1, "decided by": decided_by(fit)}
                folder = output / f"checkpoint-{step + 1}"
                checkpoint.save(folder, {"reward": learned}, {"reward": optimizer}, state)
                checkpoint.prune(output, recipe.checkpoints_total_limit)
            if stop:
                raise Interrupted(f"stopped after {step + 1} updates; saved in {output}")


def optimizer_of(recipe: RewardRecipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        weight_decay=recipe.adam_weight_decay,
    )


def update(
    fit: Fit,
    step: int,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = fit.recipe.learning_rate * fit.recipe.share(step)
    facts = fit.gradients(step, batch)
    norm = nn.utils.clip_grad_norm_(parameters, fit.recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    scale = fit.reward.network.logit_scale.exp()
    facts |= {"grad_norm": norm.item(), "logit_scale": scale.item(), "rate": group["lr"]}
    if not math.isfinite(sum(facts.values())):
        raise UserError(
            f"update {step + 1} of the reward is not finite: {facts}; begin anew in another "
            "output_dir, with another seed, a lower learning_rate, or mixed_precision=no"
        )
    return facts


@contextmanager
def ahead(fit: Fit, steps: range, readers: Executor) -> Iterator[Iterator[Batch]]:
    """The batches of `steps`; the next is read while one is used."""
    recipe = fit.recipe

    def draw(n: int) -> Batch:
        return fit.pairs.batch(n, recipe.train_batch_size, fit.size, recipe.seed, readers)

    def each(reader: Executor) -> Iterator[Batch]:
        coming = None
        for n in steps:
            batch = (coming or reader.submit(draw, n)).result()
            coming = reader.submit(draw, n + 1) if n + 1 < steps.stop else None
            yield batch

    with ThreadPoolExecutor(1) as reader:
        yield each(reader)


def decided_by(fit: Fit) -> dict[str, Any]:
    """What a fit cannot go on with another of."""
    return {**fit.recipe.model_dump(mode="json", exclude=FREE), "pairs": len(fit.pairs)}


def resumed(fit: Fit, output: Path, learned: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step that the newest checkpoint stood at, which fills what learns; 0 without one."""
    folder = checkpoint.latest(output)
    if folder is None:
        return 0
    try:
        was = dict(json.loads((folder / "state.json").read_text())["decided by"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"the checkpoint {folder} cannot be read ({e!r}); remove it to go on from an earlier "
            "one"
        ) from e
    for name, now in decided_by(fit).items():
        if was.get(name) != now:
            raise UserError(
                f"{name} is {now!r}, but the fit in {output} was begun with {was.get(name)!r}; "
                f"give that one, or another output_dir, or delete {output}"
            )
    return int(checkpoint.load(folder, {"reward": learned}, {"reward": optimizer})["step"])
