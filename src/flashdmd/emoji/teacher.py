"""`flashdmd emoji teacher`: text-to-image teachers of the embedded world, one of each kind.

The score-based teacher is a StableDiffusionPipeline folder: a small CLIP text encoder with a BPE
of its own, which learns what names look like first and is frozen then, and a UNet that predicts v
under Stable Diffusion's betas.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from flashdmd.emoji.fit import Fit, Losses, fit, kept, weights_of
from flashdmd.emoji.tutor import Tutor
from flashdmd.emoji.vae import LATENT_CHANNELS, latents_digest, pixels
from flashdmd.emoji.words import learn_words
from flashdmd.emoji.world import World, world_digest
from flashdmd.files import forget_origins, replace_file, replace_folder
from flashdmd.schedule import STEPS, Process, VariancePreserving
from flashdmd.seeds import seed_of

LATENT_SIZE = 8
LATENT_SHAPE = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
TEXT_WIDTH = 160
TEXT_LENGTH = 24  # tokens: the longest caption of the world
VOCABULARY = 3000  # and both forms of each byte
NO_CAPTION = 0.1  # share of examples trained without a caption, for guidance
ADAM_RATE, MUON_RATE = 5e-4, 4e-3  # learning rates at batch 128
RENDERINGS = 16  # of each training picture, encoded once


def train_tokenizer(world: World, folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, learned on the world's own captions; written to `folder`."""
    rng = np.random.default_rng(0)
    captions = (world.caption(i, rng) for _ in range(30) for i in range(len(world.emoji)))
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m) for m in model["merges"]]
    tokens = dict.fromkeys(
        [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges), *special]
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with replace_folder(folder) as beside:
        (beside / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
        (beside / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges), "utf-8"
        )
        CLIPTokenizer.from_pretrained(beside, model_max_length=TEXT_LENGTH).save_pretrained(beside)
    return CLIPTokenizer.from_pretrained(folder)


def text_config(
    tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH, layers: int = 4
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 160),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers reads it as the number of heads
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",  # the words as a whole join the time, beside cross-attention
        addition_embed_type_num_heads=4,
        norm_num_groups=16,
    )


class Conditioned(nn.Module):
    """The networks that a teacher trains together."""

    def __init__(self, text_encoder: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.network = text_encoder, network


@torch.no_grad()
def cache_latents(
    world: World, vae: AutoencoderKL, path: Path, renderings: int, seed: int
) -> Tensor:
    """(renderings, N, C, 8, 8) float16 latents of every training picture, made once."""

    def make() -> dict[str, Tensor]:
        indices = world.indices("train")
        rows = []
        for k in tqdm(range(renderings), desc="encode", unit="rendering"):
            rng = np.random.default_rng(seed_of(seed, "latents", k))
            batches = pixels(np.stack([world.render(i, rng) for i in indices])).split(128)
            rows.append(torch.cat([vae.encode(b).latent_dist.mode() for b in batches]).half())
        return {"latents": torch.stack(rows)}

    key = f"{renderings} {seed} {latents_digest(vae)} {world_digest()}"
    return kept(path, key, make)["latents"]


class Batches:
    """Batch n of cached latents with freshly drawn captions: a function of (seed, n)."""

    def __init__(self, world: World, latents: Tensor, size: int, seed: int) -> None:
        self.world, self.latents, self.size, self.seed = world, latents, size, seed
        self.indices = world.indices("train")

    def __call__(self, step: int) -> tuple[Tensor, list[str]]:
        """((B, C, 8, 8) latents, B captions, a share of them empty)."""
        rng = np.random.default_rng(seed_of(self.seed, "batch", step))
        rows = rng.integers(len(self.latents), size=self.size)
        columns = rng.integers(len(self.indices), size=self.size)
        captions = [
            "" if rng.random() < NO_CAPTION else self.world.caption(self.indices[c], rng)
            for c in columns
        ]
        return self.latents[rows, columns].float(), captions


def tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """(B, TEXT_LENGTH) ids, padded and truncated as the stock pipelines do."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def training_times(n: int, centre: float, spread: float) -> Tensor:
    """(n,) times in 0..1000: a third uniform, the rest logit-normal."""
    uniform = torch.rand(n)
    noisy = (spread * torch.randn(n) + centre).sigmoid()
    return STEPS * torch.where(torch.rand(n) < 1 / 3, uniform, noisy)


def planned(
    family: str,
    folder: Path,
    start: Path,
    max_train_steps: int,
    batch: int,
    rate: float,
    seed: int,
    tutors: Sequence[Path],
) -> Fit:
    """How a teacher is trained. Raises UserError when the one in `folder` was begun otherwise."""
    plan = Fit(
        max_train_steps,
        rate * ADAM_RATE,
        folder,
        seed,
        muon_rate=rate * MUON_RATE,
        arguments={
            "--family": family,
            "--start": weights_of(start),
            "--batch": batch,
            "--rate": rate,
            "--tutor": weights_of(*tutors),
        },
    )
    plan.check()
    return plan


def train_score(
    folder: Path,
    start: Path,
    max_train_steps: int,
    lesson_steps: int = 3500,
    batch: int = 128,
    rate: float = 1.0,
    seed: int = 0,
    tutors: Sequence[Path] = (),
) -> StableDiffusionPipeline:
    """Trains the score-based teacher and writes it to `folder / "pipeline"`.

    `start` is an autoencoder, or a pipeline of this kind whose UNet is trained on; its words stay.
    With `tutors`, pipelines of either kind on the same autoencoder, their means are learned
    instead of the pictures.
    """
    plan = planned("score", folder, start, max_train_steps, batch, rate, seed, tutors)
    torch.manual_seed(seed)
    world = World()
    if (start / "model_index.json").exists():
        earlier = StableDiffusionPipeline.from_pretrained(
            start, dtype=torch.float32, use_safetensors=True
        )
        vae, tokenizer = earlier.vae.eval(), earlier.tokenizer
        both = Conditioned(earlier.text_encoder, earlier.unet).train()
    else:
        vae = AutoencoderKL.from_pretrained(start, use_safetensors=True).eval()
        tokenizer = train_tokenizer(world, folder / "tokenizer")
        both = Conditioned(CLIPTextModel(text_config(tokenizer)), build_unet())
        learn_words(both.text_encoder, tokenizer, vae, folder / "words", lesson_steps, seed)
    both.text_encoder.requires_grad_(False)  # as Stable Diffusion's
    latents = cache_latents(world, vae, folder / "latents.safetensors", RENDERINGS, seed)
    batches = Batches(world, latents, batch, seed)
    process = Process(VariancePreserving(), "v")
    tutor = Tutor.load(tutors, process, LATENT_SHAPE)

    def loss(step: int) -> Losses:
        x0, captions = batches(step)
        eps, t = torch.randn_like(x0), training_times(len(x0), 0.0, 1.0).long()
        x_t = process.add_noise(x0, eps, t)
        with torch.autocast("cpu", torch.bfloat16):
            if tutor:
                x0, eps = tutor(x_t, t, x0, captions)
            hidden = both.text_encoder(tokens(tokenizer, captions)).last_hidden_state
            v = both.network(x_t, t, encoder_hidden_states=hidden).sample
        return {"v": (v.float() - process.target(x0, eps, t)).square().mean()}

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=both.text_encoder,
        tokenizer=tokenizer,
        unet=both.network,
        scheduler=DDPMScheduler(  # fresh noise mends a step's errors: docs/log.md has both
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
            timestep_spacing="trailing",  # the first step is 999, where training ends
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def show(_: nn.Module, step: int) -> None:
        contact_sheet(pipeline, folder / "samples" / f"{step:06d}.png")

    fit(both, loss, plan, show, show_every=1000)
    write(pipeline, folder / "pipeline")
    return pipeline


def write(pipeline: DiffusionPipeline, folder: Path) -> None:
    """A pipeline in half precision, whole or not at all."""
    with replace_folder(folder) as beside:
        pipeline.to(dtype=torch.float16).save_pretrained(beside)
        forget_origins(beside)


SHOWN = (
    "fluent emoji of a strawberry", "twemoji emoji of a fire engine", "noto emoji of a pizza",
    "fluent emoji of a cat face", "twemoji emoji of a guitar", "noto emoji of a rocket",
    "fluent emoji of a smiling face with sunglasses", "a bird emoji", "twemoji emoji of a tree",
    "fluent emoji of a fruit", "a building emoji", "noto emoji",
)  # fmt: skip


def contact_sheet(pipeline: StableDiffusionPipeline, path: Path, columns: int = 4) -> None:
    """Prompts down, different noises across; 50 steps, guidance 3, always the same noises."""
    prompts = list(itertools.chain.from_iterable([p] * columns for p in SHOWN))
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        prompts, num_inference_steps=50, guidance_scale=3.0, generator=generator, output_type="np"
    ).images
    rows = images.reshape(-1, 4 * columns, 64, 64, 3).transpose(0, 2, 1, 3, 4)
    sheet = (rows.reshape(-1, 4 * columns * 64, 3) * 255).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as beside:
        Image.fromarray(sheet).save(beside)
