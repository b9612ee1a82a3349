"""A batch is a function of seed, stage and iteration, whoever draws which rows of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_data_buckets
import test_data_tars
import tiny
import torch
from torch import Tensor

from flashdmd.algorithm import Method
from flashdmd.batches import Batches, EmojiSource, as_tensor
from flashdmd.cache import Latents
from flashdmd.data import PictureSource, open_data
from flashdmd.models.teacher import Teacher, load_pipeline
from flashdmd.seeds import seed_of
from flashdmd.session import cropped
from flashdmd.trainer import Batch

DISTIL, FOLLOW, PREFER = ("generator", "score", "discriminator"), ("score",), ("preference",)
PROMPTS = tuple(f"a cat number {i}" for i in range(50))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_pipeline(tiny.score_folder(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def world() -> EmojiSource:
    return EmojiSource()


def folder(path: Path, broken: int = 0) -> PictureSource:
    """Of two shapes; `broken` pictures of each cannot be read any more."""
    source = open_data(test_data_buckets.folder(path, wide=9, square=9), 64, multiple=16)
    for i in range(broken):
        (path / f"wide{i}.png").unlink()
        (path / f"square{i}.png").write_bytes(b"no picture")
    return source


def tars(path: Path) -> PictureSource:
    members = []
    for i in range(7):
        colour = (30 * i, 255 - 30 * i, 9)
        members += [(f"{i}.png", test_data_tars.picture(colour)), (f"{i}.txt", f"colour {i}")]
    return open_data(test_data_tars.tar(path / "x.tar", members), 64)


def cached(teacher: Teacher, source: PictureSource, path: Path) -> Batches:
    latents = Latents(path, "x")
    source = latents.make(source, lambda pictures: teacher.encode(as_tensor(pictures)))
    return Batches(teacher, source, Method(), 8, 0, latents=latents)


Make = Callable[[Teacher, EmojiSource, Path], Batches]
MADE: dict[str, Make] = {
    "emoji": lambda t, world, _: Batches(t, world, Method(), 8, 0),
    "emoji and prompts": lambda t, world, _: Batches(t, world, Method(), 8, 0, prompts=PROMPTS),
    "buckets": lambda t, _, path: Batches(t, folder(path / "x"), Method(), 8, 0),
    "broken": lambda t, _, path: Batches(t, folder(path / "x", 4), Method(), 8, 0, prompts=PROMPTS),
    "tars": lambda t, _, path: Batches(t, tars(path), Method(real_images="raw"), 8, 0),
    "latents": lambda t, _, path: cached(t, folder(path / "x"), path / "cache"),
    "dmd2": lambda t, world, _: Batches(t, world, Method(), 8, 0, in_latents=True),
    "crop": lambda t, world, _: Batches(
        t, world, Method(), 8, 0, decode=lambda z: t.decode(cropped(z, 3))
    ),
    "parts": lambda t, world, _: Batches(
        t, world, Method(), 8, 0, parts=2, decode=lambda z: t.decode(cropped(z, 3))
    ),
}


def drawn(batches: Batches, n: int, updates: tuple[str, ...]) -> tuple[Batch, Tensor]:
    """And what torch's generator gives after it: the rest of an iteration."""
    torch.manual_seed(seed_of(n))
    return batches(n, updates), torch.rand(1)


def joined(parts: list[Batch]) -> Batch:
    found = {}
    for name, value in vars(parts[0]).items():
        values = [getattr(part, name) for part in parts]
        if isinstance(value, dict):
            found[name] = {k: torch.cat([v[k] for v in values]) for k in value}
        else:
            found[name] = None if value is None else torch.cat(values)
    return Batch(**found)


def same(a: Batch, b: Batch, tolerance: float = 0.0) -> bool:
    def close(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.shape == y.shape and bool((x.float() - y.float()).abs().max() <= tolerance)

    dicts = ("cond", "reward_cond")
    return all(close(getattr(a, k), getattr(b, k)) for k in vars(a) if k not in dicts) and all(
        close(getattr(a, k).get(name), getattr(b, k).get(name))
        for k in dicts
        for name in getattr(a, k).keys() | getattr(b, k).keys()
    )


@pytest.mark.parametrize("name", MADE)
def test_rows_of_all_processes_are_the_batch_of_one(
    name: str, teacher: Teacher, world: EmojiSource, tmp_path: Path
) -> None:
    whole = replace(MADE[name](teacher, world, tmp_path), reward_encoder=teacher.encode_prompts)
    for n, updates in enumerate((DISTIL, FOLLOW, PREFER)):
        alone, after = drawn(replace(whole, preferring=12), n, updates)
        assert len(alone.noise) == (12 if updates == PREFER else 8)
        assert bool(alone.reward_cond) == (updates == PREFER)
        for ranks in (2, 4):
            parts = [
                drawn(replace(whole, preferring=12, rank=rank, ranks=ranks), n, updates)
                for rank in range(ranks)
            ]
            assert same(joined([part for part, _ in parts]), alone, 1e-4)
            assert all(torch.equal(after, theirs) for _, theirs in parts)


def test_one_process_decodes_all_alike_in_parts(teacher: Teacher, world: EmojiSource) -> None:
    once = replace(MADE["parts"](teacher, world, Path()), parts=1)
    for parts in (2, 4, 8):
        assert same(*(drawn(replace(once, parts=p), 3, DISTIL)[0] for p in (1, parts)), 1e-4)


def test_batches_differ_by_stage_seed_and_iteration(teacher: Teacher, world: EmojiSource) -> None:
    made = Batches(teacher, world, Method(real_images="raw"), 4, 0)
    torch.manual_seed(0)
    first = made(0, DISTIL)
    assert torch.equal(made(0, DISTIL).real, first.real)
    for other, n in ((made, 1), (replace(made, stage="joint"), 0), (replace(made, seed=1), 0)):
        assert not torch.equal(other(n, DISTIL).real, first.real)


def test_only_the_own_rows_are_opened(teacher: Teacher, tmp_path: Path) -> None:
    source = folder(tmp_path / "x")
    opened: list[int] = []
    stream = source.catalogue.listing.stream

    def counted(place: str) -> object:
        opened.append(1)
        return stream(place)

    source.catalogue.listing.stream = counted
    for ranks, each in ((1, 8), (4, 2)):
        opened.clear()
        replace(Batches(teacher, source, Method(), 8, 0), ranks=ranks, rank=ranks - 1)(0, DISTIL)
        assert len(opened) == each


def test_a_picture_drawn_for_a_broken_one_moves_no_other(tmp_path: Path) -> None:
    source = folder(tmp_path / "x")
    draw = partial(source.draw, n=12)
    rngs = [np.random.default_rng(5) for _ in range(2)]
    before = draw(rngs[0])
    lost = int(before.indices[3])
    (tmp_path / "x" / source.catalogue.name(lost)).unlink()
    after = draw(rngs[1])
    kept = before.indices != lost
    assert 0 < kept.sum() < 12
    assert np.array_equal(after.indices[kept], before.indices[kept])
    assert np.array_equal(after.pictures[kept], before.pictures[kept])
    assert lost not in after.indices
    assert after.captions == [source.catalogue.caption(i) for i in after.indices.tolist()]
    assert rngs[0].integers(2**60) == rngs[1].integers(2**60)
