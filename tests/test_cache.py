"""Text embeddings and latents on the disk, of real encoders at tiny size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import score_folder
from torch import Tensor

from flashdmd import cache
from flashdmd.cache import Embeddings, Latents, fingerprint
from flashdmd.data import PictureSource, open_data
from flashdmd.errors import UserError
from flashdmd.models.teacher import Teacher, load_pipeline
from flashdmd.sampler import Cond

PROMPTS = [f"a dog number {i}" for i in range(10)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_pipeline(score_folder(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PROMPTS", 4)
    monkeypatch.setattr(cache, "PICTURES", 4)


class Encoder:
    """A teacher's own text encoder, counted, that may be stopped."""

    def __init__(self, teacher: Teacher, stop_at: int | None = None) -> None:
        self.teacher, self.stop_at, self.asked = teacher, stop_at, []

    def __call__(self, prompts: list[str]) -> Cond:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(prompts)
        return self.teacher.encode_prompts(prompts)


def embedded(
    folder: Path, encoder: Encoder, prompts: list[str] = PROMPTS, key: str = "x", **more: object
) -> Embeddings:
    found = Embeddings(folder, key, **more)
    found.make(prompts, encoder, batch=3)
    return found


def test_embeddings_are_the_encoder_s(teacher: Teacher, tmp_path: Path) -> None:
    encoder = Encoder(teacher)
    found = embedded(tmp_path, encoder, PROMPTS + PROMPTS[:3])
    assert [len(asked) for asked in encoder.asked] == [3, 1, 3, 1, 2]
    asked = [PROMPTS[i] for i in (9, 0, 3, 3, 8)]
    cond = found(asked)
    for name, value in teacher.encode_prompts(asked).items():
        assert (cond[name] - value).abs().max() < 1e-5
        assert cond[name].dtype == torch.float32
    with pytest.raises(KeyError, match="a cat"):
        found(["a cat"])


def test_whole_numbers_stay_and_floats_may_be_kept_in_half(tmp_path: Path) -> None:
    def encode(prompts: list[str]) -> Cond:
        ids = torch.tensor([[len(p), ord(p[-1])] for p in prompts])
        return {"ids": ids, "mask": ids > 0, "embeds": ids / 7}

    found = Embeddings(tmp_path, "x", torch.bfloat16)
    found.make(PROMPTS, encode)
    cond, exact = found(PROMPTS[3:5]), encode(PROMPTS[3:5])
    assert torch.equal(cond["ids"], exact["ids"])
    assert torch.equal(cond["mask"], exact["mask"])
    assert torch.equal(cond["embeds"], exact["embeds"].bfloat16().float())


def test_embeddings_are_made_once(teacher: Teacher, tmp_path: Path) -> None:
    encoder = Encoder(teacher)
    first = embedded(tmp_path, encoder)
    again = embedded(tmp_path, Encoder(teacher, stop_at=0))
    for name, value in first(PROMPTS).items():
        assert torch.equal(value, again(PROMPTS)[name])
    for other in ({"key": "y"}, {"dtype": torch.bfloat16}):
        anew = Encoder(teacher)
        embedded(tmp_path, anew, **other)
        assert anew.asked == encoder.asked
    more = Encoder(teacher)
    embedded(tmp_path, more, [*PROMPTS, "a cat"])
    assert more.asked == [[*PROMPTS[8:], "a cat"]]


def test_embeddings_that_were_stopped_go_on(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = embedded(tmp_path / "whole", Encoder(teacher))
    with pytest.raises(KeyboardInterrupt):
        embedded(tmp_path / "stopped", Encoder(teacher, stop_at=3))
    assert len(list((tmp_path / "stopped").iterdir())) == 1
    rest = Encoder(teacher)
    found = embedded(tmp_path / "stopped", rest)
    assert rest.asked == [PROMPTS[4:7], PROMPTS[7:8], PROMPTS[8:]]
    for name, value in whole(PROMPTS).items():
        assert torch.equal(found(PROMPTS)[name], value)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_torn_file_is_named_and_made_again(
    kept: int, teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(teacher)
    path, _ = embedded(tmp_path, encoder).places[PROMPTS[4]]
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    again = Encoder(teacher)
    embedded(tmp_path, again)
    assert again.asked == encoder.asked[2:4]
    assert path.read_bytes() == content
    assert f"{path} is torn and made again" in caplog.text


def test_an_encoder_of_many_lengths_is_refused(tmp_path: Path) -> None:
    def encode(prompts: list[str]) -> Cond:
        return {"tokens": torch.zeros(len(prompts), max(map(len, prompts)), 2)}

    for prompts in (["a", "bb"], [*"abcd", "ee"]):  # within a file, and between two
        with pytest.raises(UserError, match=r"\[1, 2\].* and .*\[2, 2\].*pad"):
            Embeddings(tmp_path, "x").make(prompts, encode, batch=1)


def test_a_fingerprint_tells_weights_apart(teacher: Teacher) -> None:
    state = teacher.pipeline.vae.state_dict()
    first = fingerprint(state, "scale 1")
    assert fingerprint({k: v.clone() for k, v in reversed(state.items())}, "scale 1") == first
    others = {first, fingerprint(state, "scale 2"), fingerprint(state), fingerprint("scale 1")}
    name = max(state, key=lambda k: state[k].numel())
    for changed in (
        state[name].clone().index_fill_(0, torch.tensor([1]), 0),
        state[name] + 1e-6,
        state[name].half(),
        state[name].flatten(),
    ):
        others.add(fingerprint(state | {name: changed}, "scale 1"))
    one = state[name].clone()
    one.view(-1)[-2] += 1e-3
    others |= {fingerprint(state | {name: one}, "scale 1")}
    others |= {fingerprint(state | {"more": torch.zeros(0)}, "scale 1")}
    assert len(others) == 10
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_every_type_has_a_fingerprint(dtype: torch.dtype) -> None:
    tensors = [torch.eye(4, dtype=torch.int8).to(dtype) for _ in range(2)]
    tensors[1][3, 3] = 0
    assert fingerprint({"a": tensors[0]}) != fingerprint({"a": tensors[1]})
    assert fingerprint({"a": tensors[0]}) == fingerprint({"a": tensors[0].t().clone().t()})
    scalar = fingerprint({"a": tensors[0][0, 0]})
    assert scalar != fingerprint({"a": tensors[0][:1, 0]})


def test_the_same_bytes_of_another_type_or_order_are_others() -> None:
    ones = [torch.ones(3, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.bool)]
    assert len({fingerprint({"a": one}) for one in ones}) == 3
    many = torch.arange(10_000.0)
    turned = torch.cat([many[:5000], many[5000:].flip(0)])  # of the same sum
    assert fingerprint({"a": many}) != fingerprint({"a": turned})


class Pictures:
    """A teacher's own VAE, counted."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.asked = teacher, 0

    def __call__(self, pictures: np.ndarray) -> Tensor:
        self.asked += len(pictures)
        return self.teacher.encode(torch.from_numpy(pictures).float() / 127.5 - 1)


def folder(path: Path, n: int = 9) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        shape = (96, 64, 3) if i % 3 else (64, 64, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path / f"{i:03d}.png")
        (path / f"{i:03d}.txt").write_text(f"{i}")
    return path


def opened(path: Path) -> PictureSource:
    return open_data(path, 64, multiple=16)


def test_latents_are_those_of_the_pictures(teacher: Teacher, tmp_path: Path) -> None:
    source, encode = opened(folder(tmp_path / "x")), Pictures(teacher)
    latents = Latents(tmp_path / "cache", "x")
    source = latents.make(source, encode, batch=3)
    assert encode.asked == 9
    shapes = set()
    for seed in range(20):
        drawn = source.draw(np.random.default_rng(seed), 4)
        found = latents(drawn.indices)
        assert found.shape == (4, 4, drawn.shape[0] // 8, drawn.shape[1] // 8)
        assert (found - encode(drawn.pictures)).abs().max() < 1e-5
        shapes.add(drawn.shape)
    assert len(shapes) == 2


def test_latents_are_made_once(teacher: Teacher, tmp_path: Path) -> None:
    path, encode = folder(tmp_path / "x"), Pictures(teacher)
    for _ in range(2):
        Latents(tmp_path / "cache", "x").make(opened(path), encode)
    assert encode.asked == 9
    Latents(tmp_path / "cache", "y").make(opened(path), encode)
    assert encode.asked == 18
    halves = Latents(tmp_path / "cache", "x", torch.bfloat16)
    halves.make(opened(path), encode)
    assert encode.asked == 27
    assert load_file(halves.places[0][0])["latents"].dtype == torch.bfloat16
    assert halves(np.arange(1)).dtype == torch.float32
    Image.new("RGB", (64, 64)).save(path / "000.png")  # one of the three squares
    Latents(tmp_path / "cache", "x").make(opened(path), encode)
    assert encode.asked == 30


def test_pictures_that_vanish_have_no_latents(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(tmp_path / "x", 100)
    source = opened(path)
    (path / "007.png").unlink()
    latents = Latents(tmp_path / "cache", "x")
    less = latents.make(source, Pictures(teacher))
    assert latents.missing == less.without == {7}
    assert "1 of 100 pictures" in caplog.text
    assert "(007.png) and are left out" in caplog.text
    again = Latents(tmp_path / "cache", "x")
    again.make(source, Pictures(teacher))
    assert again.missing == {7}
    (path / "008.png").unlink()
    with pytest.raises(UserError, match=r"2 of 100 .*\(007\.png, 008\.png\), more than one in a"):
        Latents(tmp_path / "other", "x").make(source, Pictures(teacher))
