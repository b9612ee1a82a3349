"""The flow-matching teacher: a StableDiffusion3Pipeline folder, an MMDiT on straight paths.

Its first text encoder is the score-based teacher's, frozen but for a last layer and a projection
of its own; the second is smaller and learns with the transformer; the third, a T5, says nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from flashdmd.emoji.fit import Losses, fit, fused
from flashdmd.emoji.teacher import (
    LATENT_SHAPE,
    LATENT_SIZE,
    RENDERINGS,
    TEXT_WIDTH,
    Batches,
    cache_latents,
    contact_sheet,
    planned,
    text_config,
    tokens,
    training_times,
    write,
)
from flashdmd.emoji.tutor import Tutor
from flashdmd.emoji.vae import LATENT_CHANNELS
from flashdmd.emoji.world import World
from flashdmd.models.families.silent import LENGTH, silent_t5
from flashdmd.models.padding import RepeatLast
from flashdmd.schedule import Process, RectifiedFlow

SECOND_WIDTH = 64
JOINT_WIDTH = TEXT_WIDTH + SECOND_WIDTH


def build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=JOINT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )


def own_sampler() -> DPMSolverMultistepScheduler:
    """Fresh noise at each step, in the first order: what DDPM is to a score-based teacher.

    docs/log.md compares it with Euler's straight steps. Small latents need no shift.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
    )


def with_a_last_layer(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> CLIPTextModelWithProjection:
    """`encoder`, frozen, under one more layer that adds nothing yet and a projection that learn.

    Stable Diffusion 3 reads the states before the last layer; these are the ones that were taught.
    """
    width, layers = encoder.config.hidden_size, encoder.config.num_hidden_layers
    deeper = CLIPTextModelWithProjection(text_config(tokenizer, width, layers + 1))
    last = deeper.text_model.encoder.layers[layers]
    own = {f"encoder.layers.{layers}.{name}": p for name, p in last.state_dict().items()}
    deeper.text_model.load_state_dict(encoder.state_dict() | own)
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return learns_last(deeper)


def learns_last(encoder: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """`encoder`, frozen but for its last layer and its projection."""
    encoder.requires_grad_(False)
    encoder.text_model.encoder.layers[-1].requires_grad_(True)
    encoder.text_projection.requires_grad_(True)
    return encoder


class Trained(nn.Module):
    """The networks that the flow teacher trains together."""

    def __init__(self, first: nn.Module, second: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.network = first, second, network

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As the pipeline does: penultimate states side by side, one zero token for all padding."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second)]
        hidden = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
        return hidden, torch.cat([o.text_embeds for o in outputs], dim=-1)


def train_flow(
    folder: Path,
    start: Path,
    max_train_steps: int,
    batch: int = 128,
    rate: float = 1.0,
    seed: int = 0,
    tutors: Sequence[Path] = (),
) -> StableDiffusion3Pipeline:
    """Trains the flow-matching teacher and writes it to `folder / "pipeline"`.

    Autoencoder, tokenizer and the first text encoder come from the score-based pipeline in `start`;
    or that is a flow-matching one of this kind, which is trained on. With `tutors`, pipelines of
    either kind on the same autoencoder, their means are learned instead of the pictures.
    """
    plan = planned("flow", folder, start, max_train_steps, batch, rate, seed, tutors)
    torch.manual_seed(seed)
    world = World()
    earlier = DiffusionPipeline.from_pretrained(start, dtype=torch.float32, use_safetensors=True)
    tokenizer, vae = earlier.tokenizer, earlier.vae.eval()
    if isinstance(earlier, StableDiffusion3Pipeline):
        first, second = learns_last(earlier.text_encoder), earlier.text_encoder_2
        transformer = earlier.transformer
    else:
        first = with_a_last_layer(earlier.text_encoder, tokenizer)
        second = CLIPTextModelWithProjection(text_config(tokenizer, SECOND_WIDTH, layers=3))
        transformer = build_transformer()
    networks = Trained(first, second, transformer).train()
    latents = cache_latents(world, vae, folder / "latents.safetensors", RENDERINGS, seed)
    batches, process = Batches(world, latents, batch, seed), Process(RectifiedFlow(), "flow")
    tutor = Tutor.load(tutors, process, LATENT_SHAPE)
    network = fused(networks.network)

    def loss(step: int) -> Losses:
        x0, captions = batches(step)
        eps, t = torch.randn_like(x0), training_times(len(x0), 0.4, 1.0)
        if tutor:
            t = tutor.times(t)
        x_t = process.add_noise(x0, eps, t)
        with torch.autocast("cpu", torch.bfloat16):
            if tutor:
                x0, eps = tutor(x_t, t, x0, captions)
            hidden, pooled = networks.encode(tokens(tokenizer, captions))
            with RepeatLast(LATENT_SIZE**2 + hidden.shape[1], LENGTH):
                v = network(x_t, hidden, pooled, t).sample
        return {"flow": (v.float() - process.target(x0, eps, t)).square().mean()}

    third, third_tokenizer = silent_t5(JOINT_WIDTH)
    pipeline = StableDiffusion3Pipeline(
        transformer=networks.network,
        scheduler=own_sampler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)

    def show(_: nn.Module, step: int) -> None:
        contact_sheet(pipeline, folder / "samples" / f"{step:06d}.png", columns=2)

    fit(networks, loss, plan, show, show_every=1000)
    write(pipeline, folder / "pipeline")
    return pipeline
