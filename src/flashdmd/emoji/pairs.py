"""Preference pairs made of real pictures: why one is better is known, so rewards can be checked."""

import io
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from flashdmd.emoji.world import Split, World, with_article

Kind = Literal["caption", "clean", "shaded", "alike"]
KINDS: tuple[Kind, ...] = ("caption", "clean", "shaded")  # whose pairs have a better picture
VISIBLE = 1.0  # mean difference in 8-bit levels; saturation moves nothing in a grey picture


@dataclass(frozen=True)
class Pair:
    """`win` is to be preferred to `lose` for `caption`, or of a pair alike neither is; `name` is
    the concept it names.
    """

    kind: Kind
    caption: str
    name: str
    win: np.ndarray  # (3, 64, 64) uint8
    lose: np.ndarray


def draw(world: World, split: Split, rng: np.random.Generator, kind: Kind | None = None) -> Pair:
    """One pair of a split; a function of `rng`.

    caption: the picture that is asked for, against one of another concept in the same style, half
    the time of the same subcategory. clean: a rendering against itself, corrupted. shaded: the
    shaded (fluent) drawing against a flat one of the same concept; the caption names no style.
    alike, only when asked for: two renderings of one picture, whose backgrounds no caption decides.
    """
    kind = kind or KINDS[rng.integers(len(KINDS))]
    groups = index(world, split)
    if kind == "shaded":
        concept = groups.shaded[rng.integers(len(groups.shaded))]
        styles = groups.by_concept[concept]
        better = styles["fluent"]
        flat = [
            i
            for style, i in sorted(styles.items())
            if style != "fluent" and split in (world.emoji[i].split, world.emoji[better].split)
        ]
        worse = flat[rng.integers(len(flat))]
        name = world.emoji[better].name
        pair = world.render(better, rng), world.render(worse, rng)
        return Pair(kind, f"{with_article(name)} emoji", name, *pair)
    hard = kind == "caption" and rng.random() < 0.5
    among = groups.with_kin if hard else groups.indices
    chosen = among[rng.integers(len(among))]
    e = world.emoji[chosen]
    picture = world.render(chosen, rng)
    if kind == "alike":
        return Pair(kind, e.prompt, e.name, picture, world.render(chosen, rng))
    if kind == "clean":
        return Pair(kind, e.prompt, e.name, picture, corrupt(picture, rng))
    near = groups.by_kin[e.style, e.subcategory] if hard else groups.by_style[e.style]
    others = [i for i in near if i != chosen]
    wrong = others[rng.integers(len(others))]
    return Pair(kind, e.prompt, e.name, picture, world.render(wrong, rng))


def corrupt(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurs, compresses, adds noise or shifts the saturation, strongly enough to be seen."""
    while True:
        spoilt = damage(picture, rng)
        if np.abs(spoilt.astype(int) - picture).mean() >= VISIBLE:
            return spoilt


def damage(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    image = Image.fromarray(picture.transpose(1, 2, 0))
    how = rng.integers(4)
    if how == 0:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.9, 2.5)))
    elif how == 1:
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=int(rng.integers(4, 20)))
        image = Image.open(jpeg).convert("RGB")
    elif how == 2:
        noise = rng.normal(0, rng.uniform(15, 45), picture.shape)
        return np.clip(picture + noise, 0, 255).astype(np.uint8)
    else:
        strong = rng.random() < 0.5
        factor = rng.uniform(1.8, 3.0) if strong else rng.uniform(0.0, 0.45)
        image = ImageEnhance.Color(image).enhance(factor)
    return np.asarray(image).transpose(2, 0, 1)


@dataclass(frozen=True)
class Groups:
    """Pictures of a split by what a pair needs; flat drawings of any split may lose a pair."""

    indices: list[int]
    by_style: dict[str, list[int]]
    by_kin: dict[tuple[str, str], list[int]]
    with_kin: list[int]  # whose style and subcategory have another picture
    by_concept: dict[str, dict[str, int]]
    shaded: list[str]


@lru_cache(maxsize=4)
def index(world: World, split: Split) -> Groups:
    indices = world.indices(split)
    by_style: defaultdict[str, list[int]] = defaultdict(list)
    by_kin: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for i in indices:
        e = world.emoji[i]
        by_style[e.style].append(i)
        by_kin[e.style, e.subcategory].append(i)
    by_concept: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for i, e in enumerate(world.emoji):
        # a held-out pair has one held-out picture; its opposite is necessarily of another style
        if split == "test" or e.split == "train":
            by_concept[e.concept][e.style] = i
    mine = {world.emoji[i].concept for i in indices}
    shaded = [
        c
        for c, styles in by_concept.items()
        if c in mine and "fluent" in styles and len(styles) > 1
    ]
    with_kin = sorted(i for kin in by_kin.values() if len(kin) > 1 for i in kin)
    return Groups(indices, by_style, by_kin, with_kin, by_concept, sorted(shaded))
