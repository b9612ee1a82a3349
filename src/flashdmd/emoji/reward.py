"""`flashdmd emoji reward`: a latent reward model trained on pairs of real pictures.

Its trunk starts as the encoder half of the score-based teacher's UNet and its words are that
teacher's, frozen: the text encoder is not stored with the reward but read from the teacher.
"""

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flashdmd.emoji import pairs
from flashdmd.emoji.fit import Fit, Losses, fit, kept, weights_of
from flashdmd.emoji.teacher import tokens
from flashdmd.emoji.vae import latents_digest, pixels
from flashdmd.emoji.world import ASSETS, Split, World, world_digest
from flashdmd.errors import UserError
from flashdmd.files import replace_folder, write_text
from flashdmd.models.reward_unet import EncoderHalf
from flashdmd.models.trust import trusted
from flashdmd.plain import json_object
from flashdmd.reward import LatentReward, as_trained, pair_loss
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS, Process, VariancePreserving
from flashdmd.seeds import seed_of

PAIRS = 24_000
ALIKE = 0.5  # of them; with fewer, plain backgrounds are liked better (docs/log.md)
SHIPPED = "emoji-score"
LEVELS = (0, 249, 499, 749, 999)  # where the held-out accuracy is reported


@dataclass
class Words:
    """The frozen text side: a prompt's token states and its feature at the end token."""

    pipeline: StableDiffusionPipeline

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Cond:
        encoder = self.pipeline.text_encoder
        out = encoder(tokens(self.pipeline.tokenizer, prompts))
        nothing = encoder(tokens(self.pipeline.tokenizer, [""])).last_hidden_state
        return {
            "tokens": out.last_hidden_state,
            "pooled": out.pooler_output,
            "no_tokens": nothing.expand(len(prompts), -1, -1).contiguous(),
        }


class EmojiReward:
    """What stage 2 asks: the reward of latents of `process`, at their own noise level."""

    def __init__(self, network: LatentReward, words: Words, process: Process) -> None:
        self.network, self.words, self.process = network, words, process

    def encode_prompts(self, prompts: list[str]) -> Cond:
        with torch.autocast("cpu", enabled=False):
            return self.words(prompts)

    def __call__(self, z_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x_t, time = as_trained(self.process, z_t, t)
        score: Tensor = self.network(x_t, time, cond)
        return score


def build(unet: UNet2DConditionModel) -> LatentReward:
    trunk = EncoderHalf(unet)
    text = unet.config.cross_attention_dim
    return LatentReward(trunk, sum(trunk.channels), trunk.channels[-1], text)


@dataclass(frozen=True)
class Latents:
    """Pairs as latents: (N, C, 8, 8) each, with captions and kinds."""

    win: Tensor
    lose: Tensor
    captions: list[str]
    kinds: list[str]


@torch.no_grad()
def encoded(vae: AutoencoderKL, drawn: list[pairs.Pair]) -> Latents:
    def latents(images: list[np.ndarray]) -> Tensor:
        batches = pixels(np.stack(images)).split(128)
        return torch.cat([vae.encode(b).latent_dist.mode() for b in batches])

    return Latents(
        latents([p.win for p in drawn]),
        latents([p.lose for p in drawn]),
        [p.caption for p in drawn],
        [p.kind for p in drawn],
    )


def cached(vae: AutoencoderKL, path: Path, n: int, seed: int) -> Latents:
    """`n` training pairs, encoded once and kept beside the fit."""

    def make() -> dict[str, Tensor]:
        world, chunks = World(), []
        rng = np.random.default_rng(seed_of(seed, "reward pairs"))
        for start in tqdm(range(0, n, 1000), desc="encode pairs", unit="thousand"):
            kinds: list[pairs.Kind | None] = [
                "alike" if rng.random() < ALIKE else None for _ in range(min(1000, n - start))
            ]
            chunks.append(encoded(vae, [pairs.draw(world, "train", rng, k) for k in kinds]))
        said = [(c.captions, c.kinds) for c in chunks]
        notes = [list(itertools.chain(*part)) for part in zip(*said, strict=True)]
        return {
            "win": torch.cat([c.win for c in chunks]).half(),
            "lose": torch.cat([c.lose for c in chunks]).half(),
            "notes": torch.frombuffer(bytearray(json.dumps(notes), "ascii"), dtype=torch.uint8),
        }

    key = f"{n} {ALIKE} {seed} {latents_digest(vae)} {world_digest()}"
    stored = kept(path, key, make)
    captions, kinds = json.loads(stored["notes"].numpy().tobytes())
    return Latents(stored["win"].float(), stored["lose"].float(), captions, kinds)


def train(
    folder: Path,
    teacher_folder: Path,
    max_train_steps: int = 3000,
    batch: int = 64,
    seed: int = 0,
    n: int = PAIRS,
) -> LatentReward:
    """Trains the reward and writes it to `folder / "reward"`.

    Both pictures of a pair are noised on their own at the same t, drawn from the whole range.
    """
    arguments = {"--start": weights_of(teacher_folder), "batch": batch, "pairs": n, "alike": ALIKE}
    plan = Fit(
        max_train_steps, 2e-4, folder, seed, weight_decay=0.05, ema_decay=0.998, arguments=arguments
    )
    plan.check()
    torch.manual_seed(seed)
    pipeline = read_teacher(teacher_folder)
    words, process = Words(pipeline), Process(VariancePreserving(), "v")
    data = cached(pipeline.vae, folder / "pairs.safetensors", n, seed)
    network = build(pipeline.unet)
    alike = torch.tensor([float(kind == "alike") for kind in data.kinds])

    def loss(step: int) -> Losses:
        rows = torch.randint(len(data.win), (batch,))
        t = torch.randint(STEPS, (batch,)).float()
        both = torch.cat([data.win[rows], data.lose[rows]])
        x_t = process.add_noise(both, torch.randn_like(both), t.repeat(2))
        cond = words([data.captions[i] for i in rows.tolist()])
        doubled = {k: torch.cat([v, v]) for k, v in cond.items()}
        with torch.autocast("cpu", torch.bfloat16):
            win, lose = network(x_t, t.repeat(2), doubled).float().chunk(2)
        return {"pair": pair_loss(win, lose, alike[rows])}

    fit(network, loss, plan)
    write(network, folder / "reward", str(teacher_folder))
    return network


def read_teacher(folder: Path) -> StableDiffusionPipeline:
    check_there(folder)
    trusted(str(folder), json_object((folder / "model_index.json").read_bytes()), {})
    return StableDiffusionPipeline.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def write(network: LatentReward, folder: Path, teacher: str) -> None:
    """Weights, where the teacher is whose words and widths they were trained with, its latents.

    A teacher that is not shipped is named by the way to it from `folder`.
    """
    shipped = Path(teacher).resolve() == (ASSETS / "score").resolve()
    autoencoder = AutoencoderKL.from_pretrained(
        Path(teacher) / "vae", local_files_only=True, use_safetensors=True
    )
    config = {
        "teacher": SHIPPED if shipped else os.path.relpath(teacher, folder),
        "autoencoder": latents_digest(autoencoder),
    }
    state = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    with replace_folder(folder) as beside:
        (beside / "config.json").write_text(json.dumps(config))
        save_file(state, beside / "reward.safetensors")


def load(folder: Path, process: Process, vae: AutoencoderKL) -> EmojiReward:
    """The reward in `folder` for latents of `process` and `vae`; its words are its teacher's.

    Raises UserError when it is missing, cannot be read, or scores latents of another autoencoder.
    """
    check(folder, vae)
    try:
        config = json_object((folder / "config.json").read_bytes())
        name, autoencoder = config["teacher"], config["autoencoder"]
        pipeline = read_teacher(teacher_in(folder, name))
        network = build(pipeline.unet)
        state = load_file(folder / "reward.safetensors")
        network.load_state_dict({k: v.float() for k, v in state.items()})
    except Exception as e:
        raise unreadable(folder, e) from e
    if autoencoder != (own := latents_digest(vae)):
        refuse(
            f"the reward model in {folder} scores latents of the autoencoder {autoencoder} of "
            f"{name}",
            f"are of {own}",
        )
    network.eval().requires_grad_(False)
    return EmojiReward(network, Words(pipeline), process)


def check(folder: Path, vae: Any) -> None:
    """Raises UserError for what configurations alone tell: the reward is not there, or scores
    latents of other channels or another scale than those of `vae`.
    """
    try:
        teacher = teacher_in(folder, json_object((folder / "config.json").read_bytes())["teacher"])
        check_there(teacher)
        own = json_object((teacher / "vae/config.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise unreadable(folder, e) from e
    for key, what in (("latent_channels", "channels"), ("scaling_factor", "scale")):
        scored, given = own.get(key), vae.config.get(key)
        if None not in (scored, given) and scored != given:
            refuse(
                f"the reward model in {folder} scores latents of {scored} {what}", f"have {given}"
            )


def teacher_in(folder: Path, name: str) -> Path:
    return ASSETS / "score" if name == SHIPPED else folder / name


def check_there(teacher: Path) -> None:
    if not (teacher / "model_index.json").is_file():  # diffusers would ask the hub for it
        raise UserError(f"no teacher, a folder with model_index.json, is in {teacher}")


def unreadable(folder: Path, e: Exception) -> UserError:
    return UserError(
        f"the reward model in {folder} cannot be read ({e}); give a folder written by "
        "`flashdmd emoji reward`"
    )


def refuse(scored: str, given: str) -> NoReturn:
    raise UserError(
        f"{scored} and this teacher's {given}; name a reward trained on its latents, or none: "
        "model.reward_model_name_or_path=null with train.joint_train_steps=0, or --reward none of "
        "`flashdmd evaluate`"
    )


def report(network: LatentReward, folder: Path, teacher_folder: Path) -> str:
    """The accuracy on held-out pairs as a table; as numbers in `folder / "accuracy.json"`."""
    figures = accuracy(network.eval(), teacher_folder)
    write_text(folder / "accuracy.json", json.dumps(figures, indent=2) + "\n")
    lines = [["held-out pairs at t =", *map(str, LEVELS)]]
    lines += [[kind, *(f"{x:.3f}" for x in row.values())] for kind, row in figures.items()]
    return "\n".join(f"{name:22}" + "".join(f"{x:>7}" for x in rest) for name, *rest in lines)


@torch.no_grad()
def accuracy(
    score: Callable[[Tensor, Tensor, Cond], Tensor],
    teacher_folder: Path,
    split: Split = "test",
    n: int = 300,
    levels: tuple[int, ...] = LEVELS,
    seed: int = 1,
) -> dict[str, dict[int, float]]:
    """Share of pairs put in order, by kind and noise level; n pairs of each kind."""
    pipeline = read_teacher(teacher_folder)
    words, process = Words(pipeline), Process(VariancePreserving(), "v")
    rng = np.random.default_rng(seed_of(seed, "held-out pairs"))
    world = World()
    draw = torch.Generator().manual_seed(seed)
    table: dict[str, dict[int, float]] = {}
    for kind in pairs.KINDS:
        data = encoded(pipeline.vae, [pairs.draw(world, split, rng, kind) for _ in range(n)])
        cond = words(data.captions)
        table[kind] = {}
        for level in levels:
            t = torch.full((n,), float(level))
            noise = torch.randn((2, *data.win.shape), generator=draw)
            win = score(process.add_noise(data.win, noise[0], t), t, cond)
            lose = score(process.add_noise(data.lose, noise[1], t), t, cond)
            table[kind][level] = float((win > lose).float().mean())
    return table
