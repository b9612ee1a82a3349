"""A text encoder's first lesson: what the picture of each caption looks like.

Through the diffusion loss alone a small text encoder learns names slowly: at every noise level that
decides a shape, most of the error is the noise's. Here it is asked for the picture outright, so the
denoiser that is trained on its words afterwards has only to learn how to draw them.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from flashdmd.emoji.fit import Fit, Losses, fit
from flashdmd.emoji.vae import LATENT_CHANNELS, latents_digest, pixels
from flashdmd.emoji.world import World
from flashdmd.seeds import seed_of


class Painter(nn.Module):
    """Token states (B, L, D) -> latents (B, C, S, S): every place asks the words what is there."""

    def __init__(self, width: int, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.places = nn.Parameter(torch.randn(size**2, width))
        self.ask = nn.MultiheadAttention(width, width // 32, batch_first=True)
        self.draw = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.out = nn.Linear(width, channels)

    def forward(self, words: Tensor) -> Tensor:
        places = self.places.expand(len(words), -1, -1)
        seen, _ = self.ask(places, words, words, need_weights=False)
        seen = seen + self.draw(seen)
        return self.out(seen).transpose(1, 2).unflatten(2, (self.size, self.size))


class Lesson(nn.Module):
    def __init__(self, text_encoder: nn.Module, painter: Painter) -> None:
        super().__init__()
        self.text_encoder, self.painter = text_encoder, painter


@torch.no_grad()
def plain_latents(world: World, vae: AutoencoderKL) -> Tensor:
    """(N, C, S, S): every training picture as it was drawn."""
    images = pixels(np.stack([world.plain(i) for i in world.indices("train")]))
    return torch.cat([vae.encode(b).latent_dist.mode() for b in images.split(128)])


def learn_words(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    folder: Path,
    max_train_steps: int,
    seed: int = 0,
    batch: int = 256,
) -> None:
    """Trains `text_encoder` in place on captions of all levels; state is kept in `folder`."""
    arguments = {"--start": latents_digest(vae), "batch": batch}
    plan = Fit(
        max_train_steps, 1e-3, folder, seed, ema_decay=0.998, muon_rate=4e-3, arguments=arguments
    )
    plan.check()
    torch.manual_seed(seed)
    world = World()
    indices, x0 = world.indices("train"), plain_latents(world, vae)
    width = text_encoder.config.hidden_size
    lesson = Lesson(text_encoder, Painter(width, x0.shape[-1], LATENT_CHANNELS))

    def loss(step: int) -> Losses:
        rng = np.random.default_rng(seed_of(seed, "words", step))
        rows = rng.integers(len(indices), size=batch)
        captions = [world.caption(indices[r], rng) for r in rows]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            x0_hat = lesson.painter(text_encoder(ids.input_ids).last_hidden_state)
        return {"x0": (x0_hat.float() - x0[rows]).square().mean()}

    fit(lesson, loss, plan)
