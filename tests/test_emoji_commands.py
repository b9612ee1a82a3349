"""`flashdmd emoji ...` where the disk refuses, and the tables at the end."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from flashdmd import cli
from flashdmd.emoji import judge, pack, pairs, reward, teacher, vae
from flashdmd.emoji.fit import kept
from flashdmd.emoji.words import learn_words
from flashdmd.emoji.world import ASSETS, World
from flashdmd.errors import UserError
from flashdmd.files import replace_file

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["flashdmd", "emoji", *words])
    try:
        cli.main()
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@pytest.fixture(scope="module")
def score_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.score_folder(tmp_path_factory.mktemp("commands") / "score")


@pytest.fixture
def pipeline(score_folder: Path) -> StableDiffusionPipeline:
    """Anew for each test: writing one leaves it in half precision."""
    return StableDiffusionPipeline.from_pretrained(score_folder)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors leaves half a file and says what it says on a full disk."""

    def stop_half_way(_: object, path: str, *__: object, **___: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError(FULL)

    monkeypatch.setattr(safetensors.torch, "serialize_file", stop_half_way)


def write_reward(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    reward.write(reward.build(pipeline.unet), folder, str(pipeline.name_or_path))


def write_judge(_: StableDiffusionPipeline, folder: Path) -> None:
    judge.write(judge.load(ASSETS / "judge"), folder)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("write", [teacher.write, write_reward, write_judge])
def test_a_full_disk_leaves_the_earlier_result(
    write: Callable[[StableDiffusionPipeline, Path], None],
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("before")
    with pytest.raises(OSError, match="No space left") as caught:
        write(pipeline, tmp_path / "out")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "out"))
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


def test_a_full_disk_leaves_the_earlier_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    monkeypatch.setattr(CLIPTokenizer, "save_pretrained", stop)
    monkeypatch.setattr(World, "caption", lambda *_: "a cat")
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left") as caught:
        teacher.train_tokenizer(World(), tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]


def test_a_full_disk_leaves_the_earlier_autoencoder_and_is_a_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    drawn = vae.renderings
    monkeypatch.setattr(vae, "renderings", lambda w, s, n, *seed: drawn(w, s, min(n, 32), *seed))
    words = ["vae", "--output", str(tmp_path), "--max-train-steps", "1"]
    assert call(monkeypatch, *words) == 0
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    capsys.readouterr()
    assert call(monkeypatch, *words, "--seed", "1") == 2
    assert "--seed is 1" in capsys.readouterr().err
    request.getfixturevalue("full")
    assert call(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert f"No space left on device: {tmp_path}/vae. What was saved before is intact" in err
    assert "Traceback" not in err
    assert weights.read_bytes() == before


def test_a_cache_that_cannot_be_written_leaves_no_half_of_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "kept.safetensors"
    kept(path, "x", lambda: {"a": torch.ones(2)})
    before = path.read_bytes()
    request.getfixturevalue("full")
    with pytest.raises(OSError, match="No space left"):
        kept(path, "y", lambda: {"a": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]
    assert path.read_bytes() == before


def test_pictures_are_packed_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def examples(_: Path):
        yield {"file_name": "a.webp"}, Image.new("RGBA", (64, 64))
        raise OSError(errno.ENOSPC, "No space left on device", "emoji.zip")

    monkeypatch.setattr(pack, "install", lambda folder: folder)
    monkeypatch.setattr(pack, "examples", examples)
    output = tmp_path / "emoji.zip"
    output.write_text("before")
    assert call(monkeypatch, "data", "--output", str(output)) == 2
    assert "No space left on device: emoji.zip" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["emoji.zip"]
    assert output.read_text() == "before"


def test_any_errno_that_safetensors_tells_of_is_an_oserror(tmp_path: Path) -> None:
    """The real text of a real refusal."""
    with pytest.raises(FileNotFoundError) as caught, replace_file(tmp_path / "a"):
        save_file({"a": torch.ones(1)}, tmp_path / "no/where")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(SafetensorError, match="header"), replace_file(tmp_path / "a"):
        raise SafetensorError("header too large")


def test_the_reward_command_ends_with_its_accuracy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
) -> None:
    figures = {k: {t: (i + t) / 2000 for t in reward.LEVELS} for i, k in enumerate(pairs.KINDS)}

    def train(folder: Path, *_: object, **__: object) -> reward.LatentReward:
        write_reward(pipeline, folder / "reward")
        return reward.build(pipeline.unet)

    monkeypatch.setattr(reward, "train", train)
    monkeypatch.setattr(reward, "accuracy", lambda network, start: figures)
    assert call(monkeypatch, "reward", "--output", str(tmp_path)) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert table[0][-5:] == ["0", "249", "499", "749", "999"]
    assert table[2] == ["clean", "0.001", "0.125", "0.250", "0.375", "0.500"]
    stored = json.loads((tmp_path / "reward/accuracy.json").read_text())
    assert stored == {k: {str(t): x for t, x in row.items()} for k, row in figures.items()}


def test_the_judge_command_ends_with_its_accuracy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def train(folder: Path, *_: object, **__: object) -> judge.Judge:
        write_judge(None, folder / "judge")
        return judge.load(folder / "judge")

    figures = {"retrieval/top1": 0.25, "preference/clean": 0.75}
    monkeypatch.setattr(judge, "train", train)
    monkeypatch.setattr(judge, "accuracy", lambda judge: figures)
    assert call(monkeypatch, "judge", "--output", str(tmp_path)) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert table == [["retrieval/top1", "0.250"], ["preference/clean", "0.750"]]
    assert json.loads((tmp_path / "judge/accuracy.json").read_text()) == figures


def test_the_judges_accuracy_is_the_share_of_each_kind_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pairs of the wrong order are all but those that were right in the right one."""
    draw = pairs.draw
    shipped = judge.load(ASSETS / "judge")
    monkeypatch.setattr(World, "indices", lambda self, split: list(range(4)))
    plain = judge.accuracy(shipped, n=6)
    assert plain["preference/clean"] > 0.5

    def swapped(*drawn: object) -> pairs.Pair:
        pair = draw(*drawn)
        return pairs.Pair(pair.kind, pair.caption, pair.name, pair.lose, pair.win)

    monkeypatch.setattr(pairs, "draw", swapped)
    turned = judge.accuracy(shipped, n=6)
    for name, share in plain.items():
        expected = 1 - share if name.startswith("preference") else share
        assert turned[name] == pytest.approx(expected)


def test_latents_are_kept_for_one_seed_and_autoencoder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    world, mine, other = World(), tiny.vae(), tiny.vae()
    monkeypatch.setattr(World, "indices", lambda self, split: [0, 1])
    path, made = tmp_path / "latents.safetensors", []
    render = World.render
    monkeypatch.setattr(World, "render", lambda *a: made.append(a) or render(*a))
    for coder, renderings, seed in ((mine, 1, 0), (mine, 2, 0), (mine, 2, 1), (other, 2, 1)):
        latents = teacher.cache_latents(world, coder, path, renderings, seed)
        count = len(made)
        assert torch.equal(teacher.cache_latents(world, coder, path, renderings, seed), latents)
        assert len(made) == count
        fresh = tmp_path / f"{count}.safetensors"
        assert torch.equal(teacher.cache_latents(world, coder, fresh, renderings, seed), latents)
    monkeypatch.setattr("flashdmd.emoji.world.PACKED", path)  # stands for other pictures
    count = len(made)
    teacher.cache_latents(world, other, path, 2, 1)
    assert len(made) > count


ASKED = {
    "--seed": "0",
    "--start": "none",
    "--decoder-only": "False",
    "--confetti": "0.75",
    "batch": "32",
    "pairs": "8",
}


@pytest.mark.parametrize(
    ("command", "begun", "said"),
    [
        ("vae", {"--start": "0123 of here"}, "--start is none, .* begun with 0123 of here"),
        ("vae", {"--decoder-only": "True"}, "--decoder-only is False, .* begun with True"),
        ("vae", {"--seed": "1"}, "--seed is 0, .* begun with 1"),
        ("vae", {"--confetti": "1.0"}, "--confetti is 0.75, .* begun with 1.0"),
        ("vae", {"batch": "8"}, "batch is 32, .* begun with 8"),
        ("reward", {}, "--start is .*score, .* begun with none"),
        ("words", {}, "--start is .*, .* begun with none"),
        ("judge", {"--seed": "1"}, "--seed is 0, .* begun with 1"),
    ],
)
def test_each_command_refuses_a_folder_that_was_begun_otherwise(
    command: str,
    begun: dict[str, str],
    said: str,
    pipeline: StableDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    trains: dict[str, Callable[[], object]] = {
        "vae": lambda: vae.train(tmp_path, 1),
        "reward": lambda: reward.train(tmp_path, ASSETS / "score", 1, batch=32, n=8),
        "words": lambda: learn_words(
            pipeline.text_encoder, pipeline.tokenizer, pipeline.vae, tmp_path, 1, batch=32
        ),
        "judge": lambda: judge.train(tmp_path, 1),
    }
    monkeypatch.setattr(judge, "embed", pytest.fail)  # minutes of features are not computed first
    (tmp_path / "state").mkdir()
    notes = {"step": 1, "arguments": ASKED | begun}
    (tmp_path / "state/state.json").write_text(json.dumps(notes))
    with pytest.raises(UserError, match=said):
        trains[command]()
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    ("words", "start", "said"),
    [
        (["vae"], "", "config.json of AutoencoderKL"),
        (["vae"], "unet", "config.json of AutoencoderKL"),
        (["teacher"], "unet", "model_index.json of StableDiffusionPipeline or config.json of Auto"),
        (["teacher", "--family", "flow"], "vae", "model_index.json of StableDiffusion3Pipeline"),
        (["reward"], "unet", "model_index.json of StableDiffusionPipeline"),
    ],
)
def test_a_start_of_another_kind_is_told_what_is_wanted(
    words: list[str],
    start: str,
    said: str,
    score_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = str(score_folder / start)
    assert call(monkeypatch, *words, "--start", where, "--output", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert f"--start {where}: give a folder with" in err
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_start_without_weights_is_told(
    score_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_bytes((score_folder / "vae/config.json").read_bytes())
    words = ("vae", "--start", str(tmp_path), "--output", str(tmp_path / "out"))
    assert call(monkeypatch, *words) == 2
    assert "there are no weights (.safetensors) beside" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
