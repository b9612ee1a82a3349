"""The embedded world: emoji of three styles, rendered with nuisances no caption mentions.

One caption has many pictures and one picture many captions, so there is a distribution to distil:
captions are drawn at five levels, from the bare style to the name with keywords, and every
rendering draws its own mirror image, hue and background, most of them strewn with confetti: detail
that no caption decides, so few steps cannot draw it by drawing the mean.
"""

import io
import json
import math
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from flashdmd.files import digest

SIZE = 64
STYLES = ("noto", "twemoji", "fluent")
ASSETS = Path(str(files("flashdmd.emoji") / "assets"))  # what the package ships
PACKED = ASSETS / "emoji.zip"
Split = Literal["train", "test"]
Index = int | np.integer  # of a picture

WHITE = (255, 255, 255)
BACKGROUNDS = (  # soft colours: no emoji disappears in them
    (255, 221, 225), (255, 236, 200), (214, 240, 214), (205, 231, 245),
    (226, 217, 243), (186, 200, 211), (120, 144, 156), (66, 76, 94),
)  # fmt: skip
WHITE_SHARE = 0.4
CONFETTI = (  # colours of the dots
    (240, 98, 104), (255, 179, 71), (255, 224, 102), (124, 203, 139), (94, 169, 226),
    (178, 132, 214), (255, 255, 255), (84, 94, 112),
)  # fmt: skip
CONFETTI_SHARE = 0.75  # of renderings, unless a `World` is told otherwise
DOTS = 20  # tries to lay one
RADII = (3.5, 6.5)  # pixels
GAP = 1.5  # pixels between two dots, at least
HUE = 0.12  # of the colour circle, either way, for one rendering in four
ONE_WAY = re.compile(  # pictures whose mirror image would be another thing, or wrong
    r"left|right|clock|calendar|moon|chart|music|abc|letter|input|keyboard|tear-off|dollar|pound|"
    r"yen|euro|receipt|newspaper|scroll|medal|8 ball|fuel|sign|station|atm|map|globe"
)

LEVELS = {"style": 0.05, "subject": 0.15, "keyword": 0.15, "name": 0.4, "full": 0.25}  # of captions

SUBJECTS = {  # what people call a subcategory; the others are called by their own name
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-bug": "bug",
    "animal-marine": "sea animal", "animal-reptile": "reptile", "animal-amphibian": "amphibian",
    "plant-flower": "flower",
    "plant-other": "plant", "food-fruit": "fruit", "food-vegetable": "vegetable",
    "food-prepared": "meal", "food-asian": "asian food", "food-sweet": "dessert", "drink": "drink",
    "dishware": "dishware", "transport-ground": "vehicle", "transport-air": "aircraft",
    "transport-water": "ship", "place-building": "building", "place-geographic": "landscape",
    "place-map": "map", "place-other": "place", "place-religious": "temple",
    "face-affection": "loving face", "face-concerned": "sad face", "face-costume": "costume face",
    "face-glasses": "face with glasses", "face-hand": "face with hand", "face-hat": "face with hat",
    "face-negative": "angry face", "face-neutral-skeptical": "neutral face",
    "face-sleepy": "sleepy face", "face-smiling": "smiling face", "face-tongue": "face with tongue",
    "face-unwell": "sick face", "cat-face": "cat face", "monkey-face": "monkey face",
    "award-medal": "medal", "event": "festive", "sky & weather": "weather",
    "book-paper": "book", "light & video": "camera", "musical-instrument": "musical instrument",
    "other-object": "object",
}  # fmt: skip


@dataclass(frozen=True)
class Emoji:
    """One picture and what is known about it."""

    file_name: str
    concept: str  # code points, the same in every style
    style: str
    name: str
    keywords: tuple[str, ...]
    category: str
    subcategory: str
    split: Split

    @property
    def subject(self) -> str:
        return SUBJECTS.get(self.subcategory, self.subcategory)

    @property
    def mirrors(self) -> bool:
        return not ONE_WAY.search(self.name)

    @property
    def prompt(self) -> str:
        """The caption that names this picture, as a person would ask for it."""
        return f"{self.style} emoji of {with_article(self.name)}"


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


class World:
    """All pictures in memory; `render` and `caption` draw from the generator they are given."""

    def __init__(self, path: Path = PACKED, confetti: float = CONFETTI_SHARE) -> None:
        self.confetti = confetti
        with zipfile.ZipFile(path) as folder:
            lines = folder.read("metadata.jsonl").decode().splitlines()
            records = [json.loads(line) for line in lines]
            self.emoji = [Emoji(**{**r, "keywords": tuple(r["keywords"])}) for r in records]
            self.pictures = [
                Image.open(io.BytesIO(folder.read(e.file_name))).convert("RGBA") for e in self.emoji
            ]

    def indices(self, split: Split) -> list[int]:
        return [i for i, e in enumerate(self.emoji) if e.split == split]

    @cached_property
    def shared_keywords(self) -> frozenset[str]:
        """Keywords of at least three concepts, so that each asks for many pictures."""
        counts = Counter(k for k, _ in {(k, e.concept) for e in self.emoji for k in e.keywords})
        return frozenset(k for k, n in counts.items() if n >= 3)

    def caption(self, index: Index, rng: np.random.Generator) -> str:
        """One of the captions of a picture; a third of them broad."""
        e = self.emoji[index]
        level = rng.choice(list(LEVELS), p=list(LEVELS.values()))
        shared = [k for k in e.keywords if k in self.shared_keywords]
        if level == "keyword" and not shared:
            level = "subject"
        if level == "style":
            return f"{e.style} emoji"
        what = {
            "subject": e.subject,
            "keyword": shared[rng.integers(len(shared))] if shared else "",
        }.get(level, e.name)
        if level == "full":
            extra = rng.permutation(list(e.keywords))[: rng.integers(1, 4)]
            return ", ".join([f"{e.style} emoji of {with_article(what)}", *extra])
        form = rng.integers(4)
        if form == 0:
            return f"{e.style} emoji of {what}"
        if form == 1:
            return f"{with_article(what)} emoji"
        return f"{e.style} emoji of {with_article(what)}"

    def render(self, index: Index, rng: np.random.Generator) -> np.ndarray:
        """(3, SIZE, SIZE) uint8: the picture, mirrored or not, on some background."""
        picture = self.pictures[index]
        if self.emoji[index].mirrors and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.25:
            picture = shift_hue(picture, rng.uniform(-HUE, HUE))
        plain = rng.random() < WHITE_SHARE
        background = canvas(WHITE if plain else BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
        if rng.random() < self.confetti:
            background = strew(background, rng)
        return paste(picture, background)

    def plain(self, index: Index) -> np.ndarray:
        """(3, SIZE, SIZE) uint8: the picture as it was drawn, on white."""
        return paste(self.pictures[index], canvas(WHITE))


def world_digest() -> str:
    """Of the pictures and of how they are rendered."""
    return digest(PACKED.read_bytes(), Path(__file__).read_bytes())


def canvas(colour: tuple[int, int, int]) -> np.ndarray:
    """(SIZE, SIZE, 3) of one colour."""
    return np.full((SIZE, SIZE, 3), colour, dtype=np.float32)


def strew(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Confetti on a canvas: DOTS tries to lay a dot where it touches no other."""
    background, places = background.astype(np.float64), np.arange(SIZE)
    laid: list[tuple[float, float, float]] = []
    for _ in range(DOTS):
        r, (a, b) = rng.uniform(*RADII), rng.uniform(0, SIZE, 2)
        if any(math.hypot(a - c, b - d) < r + s + GAP for c, d, s in laid):
            continue
        laid.append((a, b, r))
        across, down = (places[abs(places - centre) < r + 1] for centre in (a, b))
        inside = np.clip(r - np.hypot(across[None] - a, down[:, None] - b) + 0.5, 0, 1)[..., None]
        under = background[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
        under += inside * (CONFETTI[rng.integers(len(CONFETTI))] - under)
    return background


def paste(picture: Image.Image, background: np.ndarray) -> np.ndarray:
    """(3, SIZE, SIZE) uint8: an RGBA picture of that size on a canvas."""
    whole = Image.fromarray(background.round().astype(np.uint8)).convert("RGBA")
    whole.alpha_composite(picture)
    return np.asarray(whole.convert("RGB")).transpose(2, 0, 1)


def shift_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Turns the colour circle by `turn` (1 is once around); leaves the transparency as it is."""
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    turned = hue.point([round(h + 256 * turn) % 256 for h in range(256)])
    rgb = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    rgb.putalpha(picture.getchannel("A"))
    return rgb
