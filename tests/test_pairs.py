"""Preference pairs: a function of the generator, hard as often as promised, never alike."""

import dataclasses

import numpy as np
import pytest

from flashdmd.emoji import pairs
from flashdmd.emoji.world import Emoji, Index, Split, World

SPLITS: tuple[Split, Split] = ("train", "test")


class Watched(World):
    """Remembers what was rendered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Emoji] = []

    def render(self, index: Index, rng: np.random.Generator) -> np.ndarray:
        self.seen.append(self.emoji[index])
        return super().render(index, rng)


@pytest.fixture(scope="module")
def world() -> Watched:
    return Watched()


def drawn(world: Watched, split: Split, kind: pairs.Kind, n: int) -> list[list[Emoji]]:
    """The pictures that each of `n` pairs was made of, the better one first."""
    rng, made = np.random.default_rng(0), []
    for _ in range(n):
        world.seen.clear()
        pair = pairs.draw(world, split, rng, kind)
        assert pair.kind == kind
        assert pair.name == world.seen[0].name
        made.append(list(world.seen))
    return made


@pytest.mark.parametrize("split", SPLITS)
def test_a_pair_is_a_function_of_the_generator(world: Watched, split: Split) -> None:
    a, b, other = (
        [pairs.draw(world, split, rng) for _ in range(12)]
        for rng in (np.random.default_rng(seed) for seed in (3, 3, 4))
    )
    for x, y in zip(a, b, strict=True):
        for field in dataclasses.fields(pairs.Pair):
            assert np.array_equal(getattr(x, field.name), getattr(y, field.name))
    assert [p.caption for p in a] != [p.caption for p in other]
    assert {p.kind for p in a} == set(pairs.KINDS)


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_the_wrong_pictures_are_kin(world: Watched, split: Split) -> None:
    """600 coins: 0.5 within 4 standard errors; a wrong picture at random is kin now and then."""
    made = drawn(world, split, "caption", 600)
    for right, wrong in made:
        assert right.split == wrong.split == split
        assert right.style == wrong.style
        assert right.concept != wrong.concept
    kin = [right.subcategory == wrong.subcategory for right, wrong in made]
    assert 0.42 < np.mean(kin) < 0.61


@pytest.mark.parametrize("split", SPLITS)
def test_shaded_pairs_are_one_concept_in_fluent_and_in_a_flat_style(
    world: Watched, split: Split
) -> None:
    for shaded, flat in drawn(world, split, "shaded", 200):
        assert shaded.concept == flat.concept
        assert shaded.style == "fluent"
        assert flat.style != "fluent"
        assert split in {shaded.split, flat.split}


def test_every_corruption_can_be_seen(world: Watched) -> None:
    """Also in grey pictures, in which no shift of the saturation can."""
    grey = np.full((3, 64, 64), 128, np.uint8)
    grey[:, 16:48, 16:48] = 60
    rng = np.random.default_rng(0)
    for i in range(200):
        picture = grey if i % 2 else world.render(i, rng)
        spoilt = pairs.corrupt(picture, rng)
        assert spoilt.dtype == np.uint8
        assert spoilt.shape == picture.shape
        assert np.abs(spoilt.astype(int) - picture).mean() >= pairs.VISIBLE


def test_a_clean_pair_is_one_rendering(world: Watched) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        world.seen.clear()
        pair = pairs.draw(world, "test", rng, "clean")
        assert [e.name for e in world.seen] == [pair.name]
        assert world.seen[0].split == "test"


def test_a_pair_alike_is_two_renderings_of_one_picture(world: Watched) -> None:
    for one, other in drawn(world, "train", "alike", 20):
        assert one is other
