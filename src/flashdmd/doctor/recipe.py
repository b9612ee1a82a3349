"""What a recipe decides of its run's memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from flashdmd.config import Recipe
from flashdmd.doctor.advice import advice, table
from flashdmd.doctor.estimate import Networks, Plan, estimate
from flashdmd.emoji.world import ASSETS
from flashdmd.models import meta
from flashdmd.models.families import FAMILIES, Family
from flashdmd.models.teacher import family_of, index_of
from flashdmd.rules import EMBEDDED


def examine(recipe: Recipe) -> Iterator[str]:
    """The table of a recipe's memory, then line by line what to change, each of which is estimated
    anew. Nothing is loaded but configurations.

    Raises UserError for a model that is neither here nor among those that are known.
    """
    name = recipe.model.pretrained_model_name_or_path
    where = str(ASSETS / EMBEDDED[name]) if name in EMBEDDED else name
    networks, plan = Networks(meta.parts_of(where), *seen_by(recipe)), plan_of(recipe, where)
    yield f"{name}, {'LoRA' if plan.rank else 'full fine-tuning'}\n"
    yield table(estimate(networks, plan))
    yield from (f"- {said}" for said in advice(networks, plan))


def plan_of(recipe: Recipe, where: str) -> Plan:
    model, train, lora = recipe.model, recipe.train, recipe.lora
    family = kind_of(where)
    denoiser: Any = meta.parts_of(where).denoiser
    told = denoiser.config.get("guidance_embeds", False)
    return Plan(
        resolution=recipe.data.resolution,
        train_batch_size=train.train_batch_size,
        preference_batch_size=train.preference_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        gradient_checkpointing=train.gradient_checkpointing,
        use_8bit_adam=train.use_8bit_adam,
        ema_decay=train.ema_decay,
        mixed_precision=train.mixed_precision,
        frozen_dtype=model.frozen_dtype,
        vae_precision=model.vae_precision,
        quantize_base=model.quantize_base,
        rank=lora.rank,
        lora_layers=lora.lora_layers or family.lora_layers,
        width=recipe.discriminator.width,
        crop=recipe.discriminator.crop,
        cache_text_embeddings=recipe.data.cache_text_embeddings,
        arm=train.arm,
        joint_train_steps=train.joint_train_steps,
        preference_timesteps=len(recipe.method.preference_timesteps),
        guided=recipe.method.teacher_guidance_scale > 1 and not told,
        device="cpu" if train.device == "cpu" else "cuda",
    )


def kind_of(where: str) -> Family:
    known = meta.table("pipelines")
    if where in known and not Path(where).is_dir():
        return FAMILIES[known[where]["class"]]()
    return family_of(where, index_of(where))


def seen_by(recipe: Recipe) -> tuple[nn.Module | None, int]:
    """The discriminator's backbone, and the bytes of the reward's weights."""
    critic, saving = recipe.discriminator, recipe.train.gradient_checkpointing
    backbone = None
    if recipe.train.arm == "flash-dmd":
        plain = critic.backbone == "efficientnet-lite0"
        backbone = meta.backbone(critic.backbone, critic.blocks, saving and not plain)
    reward = recipe.model.reward_model_name_or_path
    folder = ASSETS / "reward" if reward == "emoji-reward" else Path(reward or ".")
    return backbone, meta.stored_bytes(folder) if reward and folder.is_dir() else 0
