"""Metrics against closed forms, naive sums, and pictures whose order is known."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from flashdmd import run
from flashdmd.emoji import judge, pairs
from flashdmd.emoji.judge import Judge, retrieval
from flashdmd.emoji.world import ASSETS
from flashdmd.errors import UserError
from flashdmd.evaluate.diversity import pairwise
from flashdmd.evaluate.kid import BOOTSTRAPS, DEGREE, interval, kid
from flashdmd.evaluate.protocol import Bench, Protocol, as_images, table
from flashdmd.export import Notes


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Protocol(num_prompts=48, real_renderings=1), judge.load(ASSETS / "judge"))


def test_kid_is_the_naive_double_sum() -> None:
    x, y = torch.randn(7, 5), torch.randn(9, 5) + 1

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() @ b.double() / 5 + 1) ** DEGREE)

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(xx + yy - 2 * xy)


def test_kid_of_shifted_gaussians_is_the_closed_form() -> None:
    """One dimension: E (ab + 1)^3 = m2a m2b 3 + m3a m3b + 3 m1a m1b + 1 with raw moments."""
    x, y = torch.randn(40_000, 1), torch.randn(40_000, 1) + 0.5

    def cubic(a: tuple, b: tuple) -> float:
        return a[2] * b[2] + 3 * a[1] * b[1] + 3 * a[0] * b[0] + 1

    zero, half = (0.0, 1.0, 0.0), (0.5, 1.25, 0.125 + 1.5)
    exact = cubic(zero, zero) + cubic(half, half) - 2 * cubic(zero, half)
    estimates = [kid(a, b) for a, b in zip(x.split(2000), y.split(2000), strict=True)]
    assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / 20**0.5)


def test_the_interval_is_as_wide_as_the_estimate_scatters() -> None:
    """Where the laws differ; 40 estimates tell their own spread to about 11 %."""
    y, estimates, widths = torch.randn(500, 8), [], []
    for k in range(40):
        x = torch.randn(100, 8) + 0.5
        low, high = interval(x, y, seed=k)
        estimates.append(kid(x, y))
        widths.append((high - low) / 3.92)
    assert np.mean(widths) == pytest.approx(np.std(estimates), rel=0.35)


def test_equal_laws_cannot_be_told_apart() -> None:
    y = torch.randn(500, 8)
    intervals = [interval(torch.randn(100, 8), y) for _ in range(40)]
    assert sum(low < 0 < high for low, high in intervals) >= 36


def test_kid_is_not_moved_by_what_both_sets_show() -> None:
    """400 worlds of 12 things, each seen 1 + 3 times: no bias within 4 standard errors."""
    of = torch.arange(12), torch.arange(12).repeat(3)
    aware, plain = [], []
    for things in torch.randn(400, 12, 4):
        x, y = (things[o] + 0.5 * torch.randn(len(o), 4) for o in of)
        aware.append(kid(x, y, of))
        plain.append(kid(x, y))
    error = 4 / 400**0.5
    assert abs(np.mean(aware)) < error * np.std(aware)
    assert np.mean(plain) < -5 * error * np.std(plain) / 4


def test_halves_keep_what_they_show() -> None:
    """The interval against kid() of each half: nothing is mixed up when rows are drawn."""
    x, y, draw = torch.randn(16, 3), torch.randn(30, 3), torch.Generator().manual_seed(7)
    of = torch.arange(16).flip(0), torch.arange(15).repeat(2)
    rows = [torch.randperm(16, generator=draw)[:8] for _ in range(BOOTSTRAPS)]
    spread = np.std([kid(x[r], y, (of[0][r], of[1])) for r in rows], ddof=1)
    low, high = interval(x, y, of, seed=7)
    assert (high - low) / 2 == pytest.approx(1.96 * spread)
    assert (high + low) / 2 == pytest.approx(kid(x, y, of))


def test_real_held_out_renderings_are_at_no_distance(bench: Bench) -> None:
    """From others of the same pictures (eight draws: sd 0.01), and as many others (sd 0.04)."""
    whole = Bench(Protocol(real_renderings=1), bench.judge)
    chosen = {e.prompt: i for i, e in enumerate(whole.world.emoji)}
    rng = np.random.default_rng(0)
    same = [chosen[p] for p in whole.prompts]
    others = list(rng.permutation(whole.world.indices("train"))[: len(same)])
    for pictures, far in ((same, 0.04), (others, 0.12)):
        features = whole.pooled(np.stack([whole.world.render(i, rng) for i in pictures]))
        of = torch.tensor(pictures), whole.of[1]
        low, high = interval(features, whole.real, of)
        assert low < 0 < high
        assert abs(kid(features, whole.real, of)) < far
        if pictures == same:
            assert kid(features, whole.real) < -0.1


def test_a_teacher_is_drawn_as_the_students_beside_it_were_distilled() -> None:
    student, other = Notes((999, 499), 1.5, 9), Notes((999,), 2.0, 9)
    assert run.ways({"t": None, "s": student}, None) == {
        "t-50": ("t", 50, 1.5),
        "t-2": ("t", 2, 1.5),
        "s": ("s", 2, 0.0),
    }
    assert run.ways({"t": None}, None) == {"t-50": ("t", 50, 3.0), "t-4": ("t", 4, 3.0)}
    assert run.ways({"t": None, "s": student, "o": other}, 0.0) == {
        "t-50": ("t", 50, 0.0),
        "t-1": ("t", 1, 0.0),
        "t-2": ("t", 2, 0.0),
        "s": ("s", 2, 0.0),
        "o": ("o", 1, 0.0),
    }
    with pytest.raises(UserError, match=r"guidance 1.5 and 2.0; say with --guidance"):
        run.ways({"s": student, "o": other}, None)


def test_trained_pairs_are_asked_for_by_name_only(bench: Bench) -> None:
    """As many as are held out, none of them held out; KID's reference is of the same pictures."""
    trained = Bench(Protocol(real_renderings=2, split="train"), bench.judge)
    asked, reference = trained.of
    emoji = trained.world.emoji
    assert {emoji[i].split for i in asked.tolist()} == {"train"}
    assert len(asked) == len(set(asked.tolist())) == len(trained.world.indices("test"))
    assert sorted(asked.tolist() * 2) == sorted(reference.tolist())
    assert [emoji[i].prompt for i in asked.tolist()] == trained.prompts
    few = Bench(Protocol(num_prompts=48, real_renderings=2, split="train"), bench.judge)
    assert few.prompts == trained.prompts[:48]
    assert few.of[1].equal(reference)


def test_diversity_is_the_naive_mean_of_distances() -> None:
    maps = [torch.randn(4, 6, 3, 3), torch.randn(4, 5, 2, 2)]
    total, n = 0.0, 4
    for m in maps:
        unit = m / m.norm(dim=1, keepdim=True)
        for i in range(n):
            for j in range(n):
                if i != j:
                    total += float((unit[i] - unit[j]).square().sum(0).mean())
    assert pairwise(maps) == pytest.approx(total / (n * (n - 1)), rel=1e-5)
    same = [m[:1].repeat(4, 1, 1, 1) for m in maps]
    assert pairwise(same) == pytest.approx(0, abs=1e-5)


def test_blur_moves_real_pictures_away_step_by_step(bench: Bench) -> None:
    rng = np.random.default_rng(0)
    pictures = [bench.world.render(i, rng) for i in bench.world.indices("train")[:200]]

    def blurred(radius: float) -> float:
        out = [
            np.asarray(
                Image.fromarray(p.transpose(1, 2, 0)).filter(ImageFilter.GaussianBlur(radius))
            ).transpose(2, 0, 1)
            for p in pictures
        ]
        return kid(bench.pooled(np.stack(out)), bench.real)

    sharp, soft, lost = (blurred(r) for r in (0, 0.8, 2.0))
    assert sharp < soft < lost


def test_the_judge_finds_the_names_of_real_held_out_pictures(bench: Bench) -> None:
    pictures, of = judge.rendered(bench.world, "test", 1, 5)
    names = [bench.world.emoji[i].name for i in of]
    found = retrieval(bench.judge, judge.features_of(bench.judge, pictures), names)
    far = len(names) // 2  # neighbours are of one kind: a name and the next are easily confused
    others = names[far:] + names[:far]
    mistaken = retrieval(bench.judge, judge.features_of(bench.judge, pictures), others)
    assert found["top1"] > 0.4
    assert found["top5"] > found["top1"]
    assert mistaken["top5"] < 0.05  # of any five names: 0.02


@pytest.mark.parametrize(("kind", "floor"), [("caption", 0.71), ("clean", 0.88), ("shaded", 0.85)])
def test_the_judge_puts_real_held_out_pairs_in_order(
    bench: Bench, kind: pairs.Kind, floor: float
) -> None:
    """81, 94 and 92 % of 1,000 such pairs; the floors are 3 standard errors of 150 below."""
    rng = np.random.default_rng(0)
    drawn = [pairs.draw(bench.world, "test", rng, kind) for _ in range(150)]
    rows = bench.judge.rows([p.name for p in drawn])
    win, lose = (
        bench.judge.prefer(judge.features_of(bench.judge, np.stack(side)), rows)
        for side in ([p.win for p in drawn], [p.lose for p in drawn])
    )
    assert (win > lose).float().mean() > floor


def test_retrieval_counts_ranks(bench: Bench) -> None:
    class Known(Judge):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.row = {"a": 0, "b": 1, "c": 2}

        def logits(self, features: torch.Tensor) -> torch.Tensor:
            return features

    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3]])
    found = retrieval(Known(), scores, ["a", "b", "c", "c"])
    assert found == {"top1": 0.5, "top5": 1.0}


def test_a_name_the_judge_does_not_know_is_named(bench: Bench) -> None:
    with pytest.raises(UserError, match="not 'quark'"):
        bench.judge.rows(["strawberry", "quark"])


def test_a_row_of_real_pictures_beats_one_of_noise(bench: Bench) -> None:
    real = bench.draw_real

    def noise(prompts: list[str], seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (len(prompts), 3, 64, 64), dtype=np.uint8)

    good = bench.measure("real", 1, real, None)
    bad = bench.measure("noise", 1, noise, None)
    again = bench.pooled(real(bench.prompts, bench.protocol.seed))
    assert good["kid"] == pytest.approx(kid(again, bench.real, bench.of), rel=1e-4)
    assert good["kid_ci"] == pytest.approx(interval(again, bench.real, bench.of), rel=1e-4)
    assert good["kid"] < bad["kid"]
    assert good["retrieval"] > bad["retrieval"] + 0.3
    assert good["held_out_reward"] > bad["held_out_reward"]
    assert good["kid_ci"][0] < good["kid"] < good["kid_ci"][1]
    assert good["reward"] is None
    assert set(good) == {
        "arm", "nfe", "kid", "kid_ci", "retrieval", "reward", "held_out_reward", "diversity",
        "seconds_per_image",
    }  # fmt: skip


def test_one_picture_rendered_often_is_less_diverse_than_many(bench: Bench) -> None:
    rng = np.random.default_rng(0)
    one = np.stack([bench.world.render(7, rng) for _ in range(8)])
    many = bench.real_broad()[:8]
    with torch.no_grad():
        few, lots = (pairwise(bench.judge.backbone(as_images(p))) for p in (one, many))
    assert few < 0.8 * lots


def test_rows_of_two_protocols_do_not_mix(bench: Bench) -> None:
    ours = {"fingerprint": bench.fingerprint(None), "rows": [{"arm": "a"}]}
    other = Bench(Protocol(num_prompts=49, real_renderings=1), bench.judge)
    theirs = {"fingerprint": other.fingerprint(None), "rows": [{"arm": "b"}]}
    assert [r["arm"] for r in table([ours, ours])["rows"]] == ["a", "a"]
    with pytest.raises(UserError, match="measured differently"):
        table([ours, theirs])


def test_whatever_decides_a_number_changes_the_fingerprint(bench: Bench) -> None:
    """A weight of backbone, head or reward, an embedding, a name, a real picture."""
    reward = torch.nn.Linear(3, 1, bias=False)
    before = bench.fingerprint(reward)
    other = Bench(bench.protocol, judge.load(ASSETS / "judge"))
    assert other.fingerprint(reward) == before

    def changed() -> set[str]:
        after = other.fingerprint(reward)
        return {k for k in before if before[k] != after[k]}

    for tensor, key in (
        (other.judge.backbone._blocks[3]._depthwise_conv.bias, "backbone"),
        (other.judge.verdict.weight, "judge"),
        (other.judge.embeddings, "judge"),
        (other.real_pictures, "real"),
        (reward.weight.detach(), "reward"),
    ):
        first = (0,) * tensor.ndim
        kept = tensor[first].item()
        tensor[first] = 0 if kept else 1
        assert changed() == {key}
        tensor[first] = kept
        assert changed() == set()
    other.judge.names[0] += "!"
    assert changed() == {"names"}


def test_the_judge_survives_being_written(bench: Bench, tmp_path) -> None:
    judge.write(bench.judge, tmp_path)
    again = judge.load(tmp_path)
    pictures, _ = judge.rendered(bench.world, "test", 1, 0)
    a, b = (j.logits(j.features(as_images(pictures[:8]))) for j in (bench.judge, again))
    torch.testing.assert_close(a, b)
    (tmp_path / "names.json").write_text('["strawberry"]')
    with pytest.raises(UserError, match="1 names, 995 embeddings"):
        judge.load(tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        judge.load(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        judge.load(tmp_path / "nowhere")
    save_file({"embeddings": torch.ones(1, judge.TEXT)}, tmp_path / "judge.safetensors")
    with pytest.raises(UserError, match=r"taste\.weight"):
        judge.load(tmp_path)
