"""`flashdmd emoji reward`: a latent reward model trained on pairs of real pictures.

Its trunk starts as the encoder half of the score-based teacher's UNet and its words are that
teacher's, frozen: the text encoder is not stored with the reward but read from the teacher.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdmd.emoji import pairs
from flashdmd.emoji.fit import Fit, Losses, fit
from flashdmd.emoji.teacher import tokens
from flashdmd.emoji.vae import pixels
from flashdmd.emoji.world import ASSETS, Split, World
from flashdmd.errors import UserError
from flashdmd.models.reward_unet import EncoderHalf
from flashdmd.reward import LatentReward, as_trained, pair_loss
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS, Process, VariancePreserving
from flashdmd.seeds import seed_of

PAIRS = 24_000
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
    world = World()
    chunks = []
    rng = np.random.default_rng(seed_of(seed, "reward pairs"))
    if path.exists():
        stored, notes = load_file(path), json.loads(path.with_suffix(".json").read_text())
        return Latents(stored["win"].float(), stored["lose"].float(), *notes)
    for start in range(0, n, 1000):
        drawn = [pairs.draw(world, "train", rng) for _ in range(min(1000, n - start))]
        chunks.append(encoded(vae, drawn))
    joined = Latents(
        torch.cat([c.win for c in chunks]),
        torch.cat([c.lose for c in chunks]),
        [x for c in chunks for x in c.captions],
        [x for c in chunks for x in c.kinds],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {"win": joined.win, "lose": joined.lose}
    save_file({k: v.half().contiguous() for k, v in halves.items()}, path)
    path.with_suffix(".json").write_text(json.dumps([joined.captions, joined.kinds]))
    return joined


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
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder, dtype=torch.float32)
    words, process = Words(pipeline), Process(VariancePreserving(), "v")
    data = cached(pipeline.vae, folder / "pairs.safetensors", n, seed)
    network = build(pipeline.unet)

    def loss(step: int) -> Losses:
        rows = torch.randint(len(data.win), (batch,))
        t = torch.randint(STEPS, (batch,)).float()
        both = torch.cat([data.win[rows], data.lose[rows]])
        x_t = process.add_noise(both, torch.randn_like(both), t.repeat(2))
        cond = words([data.captions[i] for i in rows.tolist()])
        doubled = {k: torch.cat([v, v]) for k, v in cond.items()}
        with torch.autocast("cpu", torch.bfloat16):
            win, lose = network(x_t, t.repeat(2), doubled).float().chunk(2)
        return {"pair": pair_loss(win, lose)}

    plan = Fit(max_train_steps, 2e-4, folder, seed, weight_decay=0.05, ema_decay=0.998)
    fit(network, loss, plan)
    shipped = teacher_folder == ASSETS / "score"
    write(network, folder / "reward", SHIPPED if shipped else str(teacher_folder.resolve()))
    return network


def write(network: LatentReward, folder: Path, teacher: str) -> None:
    """Weights, and the name of the teacher whose words and widths they were trained with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"teacher": teacher}))
    state = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    save_file(state, folder / "reward.safetensors")


def load(folder: Path, process: Process, channels: int) -> EmojiReward:
    """The reward in `folder` for latents of `process`; its words come from its own teacher.

    Raises UserError when it is missing, cannot be read, or scores latents of other `channels`.
    """
    try:
        name = json.loads((folder / "config.json").read_text())["teacher"]
        teacher_folder = ASSETS / "score" if name == SHIPPED else Path(name)
        pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder, dtype=torch.float32)
        network = build(pipeline.unet)
        state = load_file(folder / "reward.safetensors")
        network.load_state_dict({k: v.float() for k, v in state.items()})
    except Exception as e:
        raise UserError(
            f"the reward model in {folder} cannot be read ({e}); give a folder written by "
            "`flashdmd emoji reward`"
        ) from e
    if channels != pipeline.unet.config.in_channels:
        raise UserError(
            f"the reward model in {folder} scores latents of {pipeline.unet.config.in_channels} "
            f"channels and this teacher's have {channels}; name a reward trained on its latents, "
            "or none: model.reward_model_name_or_path=null with train.joint_train_steps=0, or "
            "--reward none of `flashdmd evaluate`"
        )
    network.eval().requires_grad_(False)
    return EmojiReward(network, Words(pipeline), process)


@torch.no_grad()
def accuracy(
    network: LatentReward,
    teacher_folder: Path,
    split: Split = "test",
    n: int = 300,
    levels: tuple[int, ...] = LEVELS,
    seed: int = 1,
) -> dict[str, dict[int, float]]:
    """Share of pairs put in order, by kind and noise level; n pairs of each kind."""
    pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder, dtype=torch.float32)
    words, process = Words(pipeline), Process(VariancePreserving(), "v")
    rng = np.random.default_rng(seed_of(seed, "held-out pairs"))
    world = World()
    draw = torch.Generator().manual_seed(seed)
    score: Callable[[Tensor, Tensor, Cond], Tensor] = network
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
