"""The embedded world: what is held out, what captions say, which pairs are drawn."""

import io
import json
import zipfile
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from flashdmd.emoji import pack, pairs
from flashdmd.emoji.teacher import TEXT_LENGTH, tokens, train_tokenizer
from flashdmd.emoji.world import (
    CONFETTI,
    DOTS,
    GAP,
    PACKED,
    RADII,
    STYLES,
    World,
    canvas,
    paste,
    strew,
)
from flashdmd.evaluate.protocol import answers


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_every_held_out_concept_is_seen_in_another_style(world: World) -> None:
    seen = defaultdict(set)
    for e in world.emoji:
        if e.split == "train":
            seen[e.concept].add(e.style)
    held_out = [e for e in world.emoji if e.split == "test"]
    assert 200 < len(held_out) < 400
    assert all(seen[e.concept] - {e.style} for e in held_out)
    assert len({(e.concept, e.style) for e in world.emoji}) == len(world.emoji)


def test_a_rendering_is_a_function_of_its_generator(world: World) -> None:
    first, again = (world.render(5, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, world.render(5, np.random.default_rng(4)))


def test_captions_tell_the_truth_and_no_nuisance(world: World) -> None:
    rng = np.random.default_rng(0)
    broad = 0
    for i in rng.integers(len(world.emoji), size=2000):
        e, caption = world.emoji[i], world.caption(i, rng)
        others = set(STYLES) - {e.style}
        assert not others & set(caption.split())
        known = {e.name, e.subject, *e.keywords}
        assert caption == f"{e.style} emoji" or any(k in caption for k in known)
        broad += e.name not in caption
    assert 0.2 < broad / 2000 < 0.5


def test_no_caption_is_cut(world: World, tmp_path) -> None:
    tokenizer = train_tokenizer(world, tmp_path)
    rng = np.random.default_rng(0)
    captions = [world.caption(i, rng) for i in range(len(world.emoji))]
    longest = max(len(tokenizer(c).input_ids) for c in captions)
    assert longest <= TEXT_LENGTH
    ids = tokens(tokenizer, ["fluent emoji of a strawberry"])
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "fluent emoji of a strawberry"


def test_mirror_images_are_only_made_where_they_are_right(world: World) -> None:
    named = {e.name: e for e in world.emoji}
    assert not named["calendar"].mirrors
    assert named["strawberry"].mirrors


def test_the_plain_picture_is_one_of_the_renderings() -> None:
    world, rng = World(), np.random.default_rng(0)
    renderings = (world.render(7, rng) for _ in range(400))
    assert any(np.array_equal(r, world.plain(7)) for r in renderings)


def test_a_world_may_be_strewn_all_over_or_not_at_all() -> None:
    bare, full = World(confetti=0.0), World(confetti=1.0)
    clear = np.asarray(bare.pictures[2000])[..., 3] == 0
    clear &= clear[:, ::-1]  # whichever way it is mirrored
    for world, strewn in ((bare, False), (full, True)):
        rng = np.random.default_rng(0)
        for _ in range(20):
            colours = np.unique(world.render(2000, rng)[:, clear], axis=1).shape[1]
            assert (colours > 1) == strewn


def dots(marked: np.ndarray) -> list[np.ndarray]:
    """Connected sets of marked pixels, corners counting: (n, 2) each."""
    left, found = {tuple(p) for p in np.argwhere(marked)}, []
    while left:
        edge, whole = [left.pop()], []
        while edge:
            y, x = edge.pop()
            whole.append((y, x))
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge += near
        found.append(np.array(whole))
    return found


def test_confetti_is_dots_of_one_colour_that_touch_no_other() -> None:
    rng, counts = np.random.default_rng(0), []
    for _ in range(20):
        strewn = strew(canvas((128, 128, 128)), rng)
        full = (strewn[:, :, None] == np.array(CONFETTI)).all(-1)  # (H, W, colours), edges apart
        found = dots(full.any(-1))
        counts.append(len(found))
        for dot in found:
            assert np.ptp(dot, axis=0).max() <= 2 * RADII[1]
            assert len({tuple(strewn[y, x]) for y, x in dot}) == 1
    assert 8 < np.mean(counts) < 20


def test_a_dot_is_a_disc_with_a_soft_edge_wherever_it_lies() -> None:
    """The same draws laid over the whole canvas, dots across its border too."""
    for seed in range(10):
        rng, before = np.random.default_rng(seed), canvas((128, 128, 128))
        laid, whole = [], before
        y, x = np.mgrid[: len(whole), : len(whole)]
        for _ in range(DOTS):
            r, (a, b) = rng.uniform(*RADII), rng.uniform(0, len(whole), 2)
            if all(np.hypot(a - c, b - d) >= r + s + GAP for c, d, s in laid):
                laid.append((a, b, r))
                inside = np.clip(r - np.hypot(x - a, y - b) + 0.5, 0, 1)[..., None]
                whole = whole + inside * (CONFETTI[rng.integers(len(CONFETTI))] - whole)
        assert np.array_equal(strew(before, np.random.default_rng(seed)), whole)
        assert np.array_equal(before, canvas((128, 128, 128)))


def test_confetti_lies_behind_the_picture(world: World) -> None:
    picture = world.pictures[10]
    opaque = np.asarray(picture)[..., 3] == 255
    strewn = paste(picture, strew(canvas((128, 128, 128)), np.random.default_rng(0)))
    assert np.array_equal(strewn[:, opaque], world.plain(10)[:, opaque])
    assert not np.array_equal(strewn, paste(picture, canvas((128, 128, 128))))


def test_code_points_have_one_spelling() -> None:
    assert pack.code("0023-FE0F-20E3") == pack.code("23-20e3") == "23-20e3"


def test_the_packed_folder_is_an_image_folder() -> None:
    with zipfile.ZipFile(PACKED) as folder:
        records = [json.loads(x) for x in folder.read("metadata.jsonl").decode().splitlines()]
        names = set(folder.namelist())
        assert {r["file_name"] for r in records} | {"metadata.jsonl"} == names
        assert folder.read(records[0]["file_name"])[8:12] == b"WEBP"


def test_packing_gives_the_same_bytes_and_splits(tmp_path) -> None:
    """On a table of two concepts drawn here, in the layout of the npm packages."""

    def picture(path, colour, size=64):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (size, size), colour).save(path)

    entries = [
        {
            "unified": "1F353",
            "image": "1f353.png",
            "category": "Food & Drink",
            "subcategory": "food-fruit",
        },
        {"unified": "1F1EE", "image": "1f1ee.png", "category": "Flags", "subcategory": "flag"},
    ]
    table = tmp_path / "emoji-datasource-google/emoji.json"
    for name in ("google", "twitter"):
        picture(tmp_path / f"emoji-datasource-{name}/img/{name}/64/1f353.png", "red")
    table.write_text(json.dumps(entries))
    picture(tmp_path / "@lobehub/fluent-emoji-3d/assets/1f353.webp", "blue", 256)
    words = tmp_path / "emojilib/dist/emoji-en-US.json"
    words.parent.mkdir(parents=True)
    words.write_text(json.dumps({"🍓": ["strawberry", "fruit", ":)"], "🇮": ["flag"]}))
    counts = [pack.pack(tmp_path, tmp_path / f"{k}.zip") for k in "ab"]
    assert counts == [3, 3]
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    made = World(tmp_path / "a.zip")
    assert {(e.style, e.name, e.keywords) for e in made.emoji} == {
        (s, "strawberry", ("fruit",)) for s in STYLES
    }


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_pairs_differ_in_what_their_kind_says(world: World, kind: pairs.Kind) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        pair = pairs.draw(world, "test", rng, kind)
        assert pair.win.shape == pair.lose.shape == (3, 64, 64)
        assert not np.array_equal(pair.win, pair.lose)
        assert pair.name in pair.caption
        assert (kind == "shaded") == (not set(STYLES) & set(pair.caption.split()))


def test_a_pair_of_training_never_shows_a_held_out_picture(world: World) -> None:
    groups = pairs.index(world, "train")
    used = {i for styles in groups.by_concept.values() for i in styles.values()} | set(
        groups.indices
    )
    assert all(world.emoji[i].split == "train" for i in used)


def test_a_corruption_hurts(world: World) -> None:
    rng = np.random.default_rng(0)
    picture = world.render(10, rng)
    errors = [np.abs(pairs.corrupt(picture, rng).astype(int) - picture).mean() for _ in range(40)]
    assert min(errors) > 0.5


def test_broad_prompts_are_answered_by_what_they_ask(world: World) -> None:
    bird = next(i for i, e in enumerate(world.emoji) if e.subject == "bird" and e.style == "noto")
    assert answers(world, bird, "a bird emoji")
    assert answers(world, bird, "noto emoji")
    assert answers(world, bird, "noto emoji of a bird")
    assert not answers(world, bird, "fluent emoji")
    assert not answers(world, bird, "noto emoji of a vehicle")


def test_pictures_can_be_read_one_by_one() -> None:
    with zipfile.ZipFile(PACKED) as folder:
        content = folder.read("fluent/1f353.webp")

    assert Image.open(io.BytesIO(content)).size == (64, 64)
