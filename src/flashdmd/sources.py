"""What a run learns on: real pictures or the teacher's, and what is computed of them once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flashdmd.batches import EmojiSource, Source, as_tensor
from flashdmd.cache import Embeddings, Latents, fingerprint
from flashdmd.config import Recipe
from flashdmd.data import PictureSource, TeacherSamples, open_data, read_prompts
from flashdmd.data.listing import names
from flashdmd.data.prompts import sound
from flashdmd.drawing import Arm
from flashdmd.emoji.world import SIZE
from flashdmd.errors import UserError
from flashdmd.files import digest
from flashdmd.models.teacher import DTYPES, Teacher
from flashdmd.schedule import STEPS

EMOJI, OWN = "emoji", "teacher"  # as data.train_data_dir: the embedded world, the teacher's samples
LATENTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of an autoencoder


def prompts_of(recipe: Recipe) -> tuple[str, ...]:
    """Those of data.prompts; none: the captions. Raises UserError for those that are none, also
    among validation.prompts.
    """
    for i, prompt in enumerate(recipe.validation.prompts):
        sound(prompt, f"validation.prompts[{i}]")
    return tuple(read_prompts(Path(recipe.data.prompts))) if recipe.data.prompts else ()


def cache_of(recipe: Recipe) -> Path:
    return Path(recipe.data.cache_dir or Path(recipe.output_dir) / "cache")


def open_source(recipe: Recipe, teacher: Teacher) -> tuple[Source, str]:
    """The real pictures: the embedded world's, or at the teacher's size those of a folder, tars, a
    data set; or the teacher's own samples. And what a run on them has to say of itself, or "".
    """
    data, name = recipe.data, recipe.data.train_data_dir
    if name != EMOJI:
        where, caveat = teacher_pool(recipe, teacher) if name == OWN else (name, "")
        source = open_data(
            where,
            teacher.image_size,
            captions=not data.prompts,
            multiple=teacher.family.multiple(teacher.pipeline)
            if data.aspect_ratio_buckets
            else None,
            cache=cache_of(recipe),
            image_column=data.image_column,
            caption_column=data.caption_column,
        )
        return source, caveat
    if teacher.image_size != SIZE:
        raise UserError(
            f"data.train_data_dir=emoji has pictures of {SIZE} pixels and "
            f"{teacher.folder} draws {teacher.image_size}; name a folder of pictures of your own, "
            "or teacher for samples of the teacher"
        )
    return EmojiSource(), ""


def described(source: Source, caveat: str) -> dict[str, Any]:
    """data.json: what a run learns on, and what was left out of it, in sentences and in counts."""
    if not isinstance(source, PictureSource):
        endless = "The pictures are emoji of the embedded world, rendered anew for every batch."
        return {"caveat": caveat, "says": [endless], "counts": {}}
    says, lost = [f"{source.report}."], source.catalogue.listing.left_out
    if lost:
        says.append(f"Left out: {names(lost)}.")
    if n := len(source.without):
        says.append(f"Of those that are used, {n} could not be read when they were encoded.")
    return {"caveat": caveat, "says": says, "counts": asdict(source.report)}


def identity(source: Source, prompts: tuple[str, ...]) -> str:
    """Of the data: names, sizes and captions of the pictures in their order, which of them are
    never drawn, and the prompts. Not of dates or places: a copy elsewhere is the same data.
    """
    told: list[Any] = [*prompts]
    if isinstance(source, PictureSource):
        all_of = source.catalogue
        told += [[all_of.name(i), all_of.caption(i), all_of.size(i)] for i in range(len(all_of))]
        told += sorted(source.without)
    return digest(json.dumps(told).encode())


def of_teacher(teacher: Teacher) -> dict[str, str]:
    """Fingerprints of what a teacher is made of, part by part: the weights, and beside them the
    noise schedule and the scale of latents. Of values and not of files or the libraries' settings,
    so that a copy elsewhere, or a newer library, has the same.
    """
    kind, every = teacher.process.kind, torch.arange(STEPS)
    alpha, sigma = teacher.process.schedule(every)
    told = {"noise schedule": fingerprint({"alpha": alpha, "sigma": sigma}, kind)}
    for name, part in teacher.pipeline.components.items():
        if isinstance(part, nn.Module):
            config = dict(getattr(part, "config", {})) if name == "vae" else {}
            scale = {key: config[key] for key in LATENTS if key in config}
            told["network" if name == teacher.family.network else name] = fingerprint(
                part.state_dict(), str(scale)
            )
    return told


def teacher_pool(recipe: Recipe, teacher: Teacher) -> tuple[Path, str]:
    """A folder of samples of the teacher for data.prompts, drawn once, and what these are."""
    prompts = prompts_of(recipe)
    steps, scale = recipe.validation.teacher_steps, recipe.method.teacher_guidance_scale
    arm = Arm(teacher, steps, scale)
    said = f"{steps} {scale} {teacher.image_size}"
    parts = teacher.pipeline.components.values()
    key = fingerprint(*(p.state_dict() for p in parts if isinstance(p, nn.Module)), said)
    samples = TeacherSamples(
        arm.draw, prompts, recipe.data.teacher_samples, key, recipe.train.seed, arm.at_once
    )
    return samples.make(cache_of(recipe)), samples.statement


def known_prompts(source: Source, prompts: tuple[str, ...]) -> list[str]:
    """Everything that a run will ask its encoders."""
    if prompts:
        return list(prompts)
    assert isinstance(source, PictureSource)  # see rules.of_pictures
    return [source.catalogue.caption(i) for i in range(len(source.catalogue))]


def cache_embeddings(recipe: Recipe, teacher: Teacher, prompts: list[str]) -> None:
    """Encodes all prompts once, kept on the disk, and lets the text encoders go."""
    parts = teacher.pipeline.components.items()
    encoders = [m for name, m in parts if name.startswith("text_encoder") and m is not None]
    key = fingerprint(*(m.state_dict() for m in encoders), type(teacher.family).__name__)
    dtype = DTYPES[recipe.model.frozen_dtype]  # the encoders', so nothing is lost
    kept = Embeddings(cache_of(recipe) / "embeddings", key, dtype)
    with torch.no_grad():
        kept.make(prompts, teacher.read)
    teacher.words = kept
    teacher.forget_encoders()


def cache_latents(
    recipe: Recipe, teacher: Teacher, source: Source
) -> tuple[PictureSource, Latents]:
    """Encodes all pictures once."""
    assert isinstance(source, PictureSource)  # see rules.of_pictures
    vae = teacher.pipeline.vae
    key = fingerprint(vae.state_dict(), str(dict(vae.config)))

    def encode(pictures: np.ndarray) -> torch.Tensor:
        return teacher.encode(as_tensor(pictures)).cpu()

    kept = Latents(cache_of(recipe) / "latents", key)
    return kept.make(source, encode), kept
