"""The report: what the page shows, what it refuses to load or run, and when a verdict flips."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folder import ARMS, RECIPE, ROWS, blurred, pictures, training_log, write_run

from flashdmd.emoji.world import World
from flashdmd.errors import UserError
from flashdmd.report import health, page, write
from flashdmd.report.curves import PANELS, curves, points
from flashdmd.report.run import read, unrolled
from flashdmd.report.sheet import GAP, comparison, contact_sheet, text_size, wrapped

HOSTILE = "<script>alert('x')</script>&amp;\"'<img src=//a.example/b onerror=c>"
HOSTILE_ARM = "student-<script>alert(1)<img src=x>"


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.source = path.read_text("ascii")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, tag: str, key: str) -> list[str]:
        return [attrs[key] for name, attrs in self.elements if name == tag and key in attrs]


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "demo", world)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(finished, tmp_path / "demo")


@pytest.fixture(scope="module")
def sixteen(world):
    return pictures(world, 16)[1]


def rows(**changes):
    """ROWS with the figures of some arms replaced: rows(student_joint={"kid": 1.0})."""
    changed = {arm.replace("_", "-"): values for arm, values in changes.items()}
    return [row | changed.get(row["arm"], {}) for row in ROWS]


# ---- the page


def test_page_loads_nothing_and_runs_nothing(run):
    shown = Page(write(run))
    loads = [
        (tag, value)
        for tag, attrs in shown.elements
        for key, value in attrs.items()
        if key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
    ]
    assert all(value.startswith("data:") for _, value in loads), loads
    assert not {"script", "iframe", "object", "embed", "base"} & {t for t, _ in shown.elements}
    assert set(re.findall(r"url\((.)", shown.source)) == {"#"}
    assert "@import" not in shown.source
    assert not re.search("https?://", shown.source)
    policy = next(attrs["content"] for _, attrs in shown.elements if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "What this page lacks" not in shown.text
    assert len(shown.source) < 3_000_000


def test_pictures_on_the_page_are_those_of_the_run_pixel_by_pixel(run):
    shown = Page(write(run))
    prompts = json.loads((run / "samples/samples.json").read_text())["prompts"]
    expected = [(arm, i) for i in range(len(prompts)) for arm in ARMS]
    images = shown.attributes("img", "src")
    assert len(images) == len(expected)
    for uri, (arm, i) in zip(images, expected, strict=True):
        head, data = uri.split(",")
        assert head == "data:image/png;base64"
        ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert (ours == np.asarray(Image.open(run / f"samples/{arm}/{i:02d}.png"))).all()
    assert all(prompt in shown.text for prompt in prompts)


def test_the_same_run_gives_the_same_bytes(run):
    assert write(run).read_bytes() == write(run).read_bytes()


def test_every_string_of_a_run_is_escaped(run):
    index = json.loads((run / "samples/samples.json").read_text())
    index["prompts"][0] = HOSTILE
    index["arms"].append(HOSTILE_ARM)
    shutil.copytree(run / "samples/teacher-4", run / "samples" / HOSTILE_ARM)
    (run / "samples/samples.json").write_text(json.dumps(index))
    (run / "recipe.yaml").write_text(f"model: {HOSTILE}\n")
    metrics = {
        "fingerprint": {HOSTILE: HOSTILE},
        "rows": [*ROWS, {"arm": HOSTILE_ARM, "nfe": 4, HOSTILE: 1.5}],
        "health": [
            {"name": HOSTILE, "verdict": "bad", "value": 1.0, "limit": 0.5, "says": HOSTILE},
            {"name": "blur", "verdict": HOSTILE, "value": 1.0, "limit": 0.5, "says": HOSTILE},
        ],
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "data.json").write_text(json.dumps({"caveat": HOSTILE, "says": [HOSTILE]}))
    (run / "timing.json").write_text(json.dumps({"milliseconds": {HOSTILE: 3.0}}))
    (run / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    renamed = run.rename(run.with_name(HOSTILE_ARM))

    shown = Page(write(renamed))
    tags = {tag for tag, _ in shown.elements}
    assert "script" not in tags
    assert all(src.startswith("data:image/png") for src in shown.attributes("img", "src"))
    assert not any("onerror" in attrs for _, attrs in shown.elements)
    hostile = " ".join(HOSTILE.split())
    # prompt, recipe, data, fingerprint, versions (2 each), metric, part, verdict (name and says)
    assert shown.text.count(hostile) == 12
    assert shown.text.count(HOSTILE_ARM) >= 3  # the run's name, a column of pictures, of figures
    assert HOSTILE_ARM in shown.attributes("td", "data-arm")


def test_it_says_what_the_run_learned_on(run):
    shown = Page(write(run)).text
    assert "5 broken; 12 scaled up." in shown
    assert "not real" not in shown
    told = {"caveat": "These are samples of the teacher.", "says": ["8 of 8 pictures are used."]}
    (run / "data.json").write_text(json.dumps(told))
    shown = Page(write(run)).text
    assert "What stands for real pictures here, in training and in these figures, is not" in shown
    assert "These are samples of the teacher. 8 of 8 pictures are used." in shown


def test_half_an_emoji_in_a_prompt_does_not_stop_the_page(run):
    index = json.loads((run / "samples/samples.json").read_text())
    index["prompts"][0] = "a cat \ud83d and \u732b"
    (run / "samples/samples.json").write_text(json.dumps(index))
    assert "\u732b" in Page(write(run)).text


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("recipe.yaml", "recipe.yaml is not there, so the recipe cannot be shown."),
        ("metrics.jsonl", "metrics.jsonl is not there, so there are no curves."),
        ("metrics.json", "metrics.json is not there, so nothing was measured"),
        ("samples/samples.json", "samples.json is not there, so there are no pictures to compare."),
        ("samples/student-joint", "There are no pictures of 'student-joint'."),
        ("samples/teacher-4/03.png", "Pictures of 'teacher-4' that cannot be read: 1 of 12."),
        ("data.json", "data.json is not there, so it is not known what the run learned on."),
        ("timing.json", "timing.json is not there, so it is not known where the time went."),
        ("versions.json", "versions.json is not there, so the versions are not known."),
    ],
)
def test_what_is_missing_is_said(run, part, says):
    path = run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert any(says in sentence for sentence in read(run).missing)


@pytest.mark.parametrize("part", ["versions.json", "metrics.json"])
def test_one_file_is_enough_for_a_page_that_names_the_others(run, tmp_path, part):
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(run / part, only)
    text = Page(write(only)).text
    missing = read(only).missing
    assert len(missing) >= 5
    assert all(sentence in text for sentence in missing)


@pytest.mark.parametrize("first", [0, 1])
def test_a_run_stopped_in_stage_1_gives_a_page(tmp_path, first):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    log = training_log(60, 0)
    lines = [json.dumps(line | {"iteration": line["iteration"] + first}) for line in log]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 60, "hin')
    text = Page(write(tmp_path)).text
    assert "Stage 2 (reinforcement learning) has not run." in text
    assert "cannot be read and are left out: 1." in text
    assert "60 iterations, 30 generator updates, 1,920 images" in text
    assert "No result yet" in text


def test_damaged_files_are_named_and_do_not_stop_the_page(run):
    (run / "metrics.json").write_text('{"rows": [')
    (run / "timing.json").write_text("[]")
    (run / "versions.json").write_bytes(b"\xff\xfe{}")
    (run / "samples/teacher-50/00.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    text = Page(write(run)).text
    for name in ("metrics.json cannot be read", "timing.json does not", "versions.json cannot"):
        assert name in text
    assert "Pictures of 'teacher-50' that cannot be read: 1 of 12." in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder.*recipe\.yaml"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_arm_does_not_lead_out_of_the_run(run):
    secret = run.parent / "secret"
    shutil.copytree(run / "samples/teacher-4", secret)
    index = json.loads((run / "samples/samples.json").read_text())
    index["arms"] = ["../../secret", str(secret), ".."]
    (run / "samples/samples.json").write_text(json.dumps(index))
    assert read(run).arms == []
    assert not Page(write(run)).attributes("img", "src")


def test_many_large_pictures_stay_below_3_mb_and_the_rest_is_counted(run):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((512, 512))
    shutil.rmtree(run / "samples")
    (run / "samples/teacher-50").mkdir(parents=True)
    for i in range(40):
        picture.save(run / f"samples/teacher-50/{i:02d}.png", compress_level=1)
    index = {"prompts": [f"p{i}" for i in range(40)], "arms": ["teacher-50"], "columns": 4}
    (run / "samples/samples.json").write_text(json.dumps(index))
    shown = Page(write(run))
    images = shown.attributes("img", "src")
    assert len(shown.source) < 3_000_000
    assert 10 < len(images) < 40
    assert f"{40 - len(images)} more prompts are in the run's folder" in shown.text
    thumbnail = Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1])))
    assert thumbnail.size == (256, 256)


# ---- the headline and the table


@pytest.mark.parametrize(
    ("joint", "says"),
    [
        ({"kid": 0.0128}, "cannot be told from the teacher's: 0.0128 against 0.0123, 1.04 times"),
        (
            {"kid": 0.02, "kid_ci": [0.018, 0.022]},
            "but its KID is worse: 0.02 against 0.0123, 1.63",
        ),
        ({"kid": 0.008, "kid_ci": [0.007, 0.009]}, "and its KID is better: 0.008 against 0.0123"),
        ({"kid": 0.02, "kid_ci": None}, "but its KID is worse: 0.02 against 0.0123, 1.63 times"),
        ({"kid": None}, "how good its pictures are was not measured"),
        ({"kid": float("nan")}, "how good its pictures are was not measured"),
        ({"kid": 0.06, "kid_ci": [0.05, 0.07]}, "which is no worse: distillation has not paid off"),
        ({"nfe": None}, "no figures for both student and teacher"),
    ],
)
def test_the_result_is_what_the_table_bears_out(joint, says):
    found = page.headline(rows(student_joint=joint), has_stage_2=True)
    assert says in f"{found.result} {found.rest}"


def test_headline_counts_calls_and_tells_what_stage_2_changed():
    found = page.headline(ROWS, has_stage_2=True)
    assert found.title == "From 100 network calls to 4"
    assert "Stage 2 changed the reward by +0.36 and the held-out reward by +0.023." in found.rest
    one_stage = page.headline(ROWS[:3], has_stage_2=False)
    assert "0.0131 against 0.0123" in one_stage.result
    assert "there was no stage 2" in one_stage.rest


def test_a_teacher_kid_around_zero_gives_no_ratio():
    found = page.headline(rows(teacher_50={"kid": -0.0002, "kid_ci": [-0.001, 0.001]}), True)
    assert "times" not in found.result
    assert "worse" in found.result


def test_best_values_are_marked_in_the_right_direction_and_ties_by_interval():
    marks = {
        metric.key: [cell.mark for cell in line] for metric, _, line in page.table(ROWS) if metric
    }
    assert marks["nfe"] == ["", "", "best", "best"]
    assert marks["kid"] == ["best", "", "tied", "tied"]
    assert marks["held_out_reward"] == ["", "", "", "best"]
    assert marks["diversity"] == ["best", "", "", ""]
    same = [row | {"reward": 0.5} for row in ROWS]
    reward = next(line for metric, _, line in page.table(same) if metric and metric.key == "reward")
    assert [cell.mark for cell in reward] == [""] * 4


def test_the_table_prints_every_figure_and_its_interval(run):
    shown = Page(write(run))
    for figure in ("0.0123", "0.0108 to 0.0139", "\u22120.310", "0.437", "1.920", "0.081", "100"):
        assert figure in shown.text
    for metric in page.METRICS:
        assert f"{metric.name} " in shown.text
        assert metric.means in shown.text
    extra = page.table([*ROWS, {"arm": "dmd2", "precision": 0.5}])
    assert extra[-1][:2] == (None, "precision")
    assert [cell.text for cell in extra[-1][2]] == [page.DASH] * 4 + ["0.500"]


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([100.0, 4.0], 0),
        ([0.0123, 0.0571], 4),
        ([1.92, 0.081], 3),
        ([12.5], 1),
        ([0.5], 3),
        ([1e-9, 1.0], 5),
    ],
)
def test_decimals_keep_two_digits_of_the_smallest(values, places):
    assert page.decimals(values) == places


def test_recorded_verdicts_count_and_the_others_are_computed(run):
    metrics = json.loads((run / "metrics.json").read_text())
    recorded = {"name": "blur", "verdict": "bad", "value": 0.7, "limit": 0.3, "says": "On record."}
    (run / "metrics.json").write_text(json.dumps(metrics | {"health": [recorded]}))
    found = {v.name: v for v in page.judged(read(run))}
    assert list(found) == list(health.NAMES)
    assert found["blur"].says == "On record."
    assert {v.verdict for name, v in found.items() if name != "blur"} == {"ok"}
    assert "70%, limit 30%" in Page(write(run)).text


# ---- the log


def test_a_resumed_run_counts_the_later_lines_once():
    def line(stage, n, value):
        return {"stage": stage, "iteration": n, "hinge": value}

    first = [line("distill", n, 1) for n in range(10)] + [line("joint", n, 1) for n in range(5)]
    again = [line("distill", n, 2) for n in range(8, 10)] + [line("joint", n, 2) for n in range(3)]
    merged = unrolled(first + again)
    assert [r["x"] for r in merged] == list(range(13))
    assert [r["hinge"] for r in merged] == [1] * 8 + [2] * 5


def test_stages_that_go_on_counting_are_not_moved():
    log = [{"stage": "distill", "iteration": n} for n in range(4)]
    log += [{"stage": "joint", "iteration": n} for n in range(4, 7)]
    assert [r["x"] for r in unrolled(log)] == list(range(7))


def test_points_are_means_of_equal_bins_and_smoothing_keeps_a_constant():
    log = [{"x": n, "hinge": float(n)} for n in range(2400)]
    x, y = points(log, "hinge")
    assert len(x) == 240
    assert y == pytest.approx(np.arange(240) * 10 + 4.5)
    few = [{"x": 3, "hinge": 7}, {"x": 5}, {"x": 9, "hinge": 8}]
    assert [list(v) for v in points(few, "hinge")] == [[3, 9], [7, 8]]


def test_curves_draw_what_was_logged_with_ids_and_colours_of_the_page():
    drawn = curves(unrolled(training_log(200, 300)))
    assert [c.title for c in drawn] == [panel.title for panel in PANELS]
    ids = re.findall(r'\bid="([^"]*)"', "".join(c.svg for c in drawn))
    assert len(ids) == len(set(ids)) > 0
    for c in drawn:
        assert "<style" not in c.svg  # it would reach the whole page
        assert set(re.findall(r"url\(#([^)]*)\)", c.svg)) <= set(ids)
        colours = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", c.svg))
        assert all(colour == "none" or colour.startswith("var(--") for colour in colours)
        assert len(set(re.findall(r"stroke: (var\(--series-\d\))", c.svg))) == len(c.labels)
        assert "stage 2" in c.svg
    assert "stage 2" not in curves(unrolled(training_log(60, 0)))[0].svg
    assert curves([]) == []


def test_tick_labels_are_not_rounded():
    drawn = curves([{"x": n, "diffusion": 0.09 + 0.00005 * n} for n in range(100)])
    labels = [float(t) for t in re.findall(r">([\d.]+)</text>", drawn[0].svg)]
    assert 0.0915 in labels


# ---- health


def test_blur_flips_when_real_pictures_are_blurred(sixteen):
    assert health.blur(sixteen, sixteen).verdict == "ok"
    assert health.blur(sixteen, sixteen).value == pytest.approx(0)
    assert health.blur(blurred(sixteen, 0.45), sixteen).verdict == "warn"
    assert health.blur(blurred(sixteen, 1.0), sixteen).verdict == "bad"
    assert health.blur(sixteen, blurred(sixteen, 1.0)).verdict == "ok"  # sharper is no blur


def test_detail_is_the_variance_of_the_laplacian():
    stripes = np.zeros((3, 8, 8), dtype=np.uint8)
    stripes[:, :, ::2] = 255  # columns 1, 0, 1, 0: the Laplacian is -2 and 2 in turn
    assert health.detail(stripes) == pytest.approx(4.0)
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 30, (3, 8, 1))
    assert health.detail(ramp) == pytest.approx(0, abs=1e-10)


def test_two_renderings_of_the_same_emoji_raise_no_alarm(world):
    rng = np.random.default_rng(0)
    held_out = world.indices("test")
    grades = []
    for _ in range(25):
        chosen = rng.choice(held_out, 8, replace=False)
        one, other = (np.stack([world.render(int(i), rng) for i in chosen]) for _ in range(2))
        grades += [health.blur(one, other).verdict, health.saturation_drift(one, other).verdict]
    assert "bad" not in grades
    assert grades.count("warn") <= 4


def turned(images, saturation=1.0, contrast=1.0):
    grey = images.mean(axis=(1, 2, 3), keepdims=True)
    soft = (images - grey) * contrast + grey
    luma = soft.mean(axis=1, keepdims=True)
    return np.clip(luma + saturation * (soft - luma), 0, 255).astype(np.uint8)


def test_saturation_drift_flips_with_colour_and_with_contrast_either_way(sixteen):
    assert health.saturation_drift(sixteen, sixteen).verdict == "ok"
    burnt = health.saturation_drift(turned(sixteen, saturation=4.0), sixteen)
    assert burnt.verdict == "bad"
    assert "student's saturation" in burnt.says
    assert "teacher_guidance_scale" in burnt.says
    grey = health.saturation_drift(turned(sixteen, saturation=0.3), sixteen)
    assert grey.verdict == "bad"
    assert "teacher_guidance_scale" not in grey.says
    flat = health.saturation_drift(turned(sixteen, contrast=0.6), sixteen)
    assert flat.verdict == "warn"


def test_contrast_alone_is_named():
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(60, 196, (8, 1, 16, 16), dtype=np.uint8), 3, axis=1)
    found = health.saturation_drift(turned(grey, contrast=0.5), grey)
    assert found.verdict == "bad"
    assert "student's contrast is 5" in found.says


def test_saturation_is_that_of_hsv(sixteen):
    for picture in sixteen[:4]:
        hsv = Image.fromarray(picture.transpose(1, 2, 0)).convert("HSV")
        expected = np.asarray(hsv)[..., 1].mean() / 255
        assert health.saturation(picture) == pytest.approx(expected, abs=0.005)


def test_seven_pictures_are_too_few(sixteen):
    for verdict in (health.blur, health.saturation_drift):
        assert verdict(sixteen[:7], sixteen[:7]).verdict == "unknown"
        assert verdict(sixteen[:8], sixteen[:8]).verdict == "ok"


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [(1.1, "ok"), (0.86, "ok"), (0.84, "warn"), (0.69, "bad"), (None, "unknown")],
)
def test_diversity_drop_is_the_share_of_the_teacher_that_is_lost(kept, verdict):
    student = {"diversity": kept and 0.6 * kept}
    found = health.diversity_drop(student, {"diversity": 0.6})
    assert found.verdict == verdict
    assert kept is None or found.value == pytest.approx(1 - kept)


def noisy(means):
    rng = np.random.default_rng(0)
    return (np.asarray(means) * np.exp(0.3 * rng.standard_normal(len(means)))).tolist()


def test_score_lag_sees_a_lasting_rise_and_no_other():
    level = np.full(1000, 0.1)
    assert health.score_lag(noisy(level)).verdict == "ok"
    sharper = np.concatenate([np.linspace(0.04, 0.1, 200), np.full(800, 0.1)])
    assert health.score_lag(noisy(sharper)).verdict == "ok"  # the student's first sharpening
    half = np.concatenate([np.full(500, 0.1), np.linspace(0.1, 0.18, 500)])
    assert health.score_lag(noisy(half)).verdict == "warn"
    runaway = np.concatenate([np.full(500, 0.1), np.linspace(0.1, 0.4, 500)])
    assert health.score_lag(noisy(runaway)).verdict == "bad"
    recovered = np.concatenate([np.full(500, 0.1), np.full(300, 0.4), np.full(200, 0.1)])
    assert health.score_lag(noisy(recovered)).verdict == "ok"


def test_score_lag_value_without_noise_is_exact():
    losses = [0.2] * 30 + [0.1] * 60 + [0.15] * 10
    assert health.score_lag(losses).value == pytest.approx(0.5)
    assert health.score_lag(losses[:99]).verdict == "unknown"


def test_score_lag_does_not_take_noise_for_a_rise():
    """With a spread of 80 % the blocks' means differ by more than the limit, and mean nothing."""
    rng = np.random.default_rng(0)
    losses = np.exp(0.8 * rng.standard_normal((50, 100)))
    means = losses.reshape(50, 10, 10).mean(2)[:, 3:]
    assert ((means[:, -1] / means.min(1) - 1) > health.SCORE_LAG[0]).sum() > 20
    verdicts = [health.score_lag(row.tolist()).verdict for row in losses]
    assert verdicts.count("ok") >= 48


def test_oscillation_sees_what_comes_back_and_no_drift():
    n = np.arange(100)
    wave, jitter = np.sin(2 * np.pi * n / 40), np.random.default_rng(0).standard_normal(100)
    assert health.oscillation((1 + 0.02 * jitter).tolist()).verdict == "ok"
    assert health.oscillation((1 + 0.1 * wave + 0.02 * jitter).tolist()).verdict == "warn"
    assert health.oscillation((1 + 0.2 * wave + 0.02 * jitter).tolist()).verdict == "bad"
    assert health.oscillation((1 - 0.2 * wave + 0.02 * jitter).tolist()).verdict == "bad"
    assert health.oscillation((1 + n / 100 + 0.02 * jitter).tolist()).verdict == "ok"  # a drift
    early = np.where(n < 20, 1 + 0.3 * wave, 1.0)
    assert health.oscillation(early.tolist()).value == pytest.approx(0)
    assert health.oscillation(early[:39].tolist()).verdict == "unknown"


def test_oscillation_without_noise_is_exact_and_noise_is_none():
    valley = [1.0] * 40 + [0.8] * 20 + [1.1] * 40
    assert health.oscillation(valley).value == pytest.approx(0.2 / np.mean(valley[25:]))
    rng = np.random.default_rng(0)
    noise = 1 + 0.3 * rng.standard_normal((100, 100))
    verdicts = [health.oscillation(row.tolist()).verdict for row in noise]
    assert verdicts.count("ok") >= 97


def test_d_overpowering_needs_loss_and_both_logits_and_looks_at_the_end():
    n = 200
    fine, dead = [1.3] * n, [0.01] * n
    assert health.d_overpowering(dead, [2.0] * n, [-2.0] * n).verdict == "bad"
    assert health.d_overpowering(fine, [2.0] * n, [-2.0] * n).verdict == "ok"
    assert health.d_overpowering(dead, [0.5] * n, [-2.0] * n).verdict == "ok"
    assert health.d_overpowering(dead, [2.0] * n, [-0.5] * n).verdict == "ok"
    early = dead[:180] + fine[:20]
    assert health.d_overpowering(early, [2.0] * n, [-2.0] * n).verdict == "ok"
    late = fine[:180] + dead[:20]
    assert health.d_overpowering(late, [2.0] * n, [-2.0] * n).verdict == "bad"
    mostly = fine[:180] + fine[:6] + dead[:14]
    assert health.d_overpowering(mostly, [2.0] * n, [-2.0] * n).verdict == "warn"
    assert health.d_overpowering([], [], []).verdict == "unknown"


def stage(reward, held_out, kid, spread=0.001):
    interval = [kid - spread, kid + spread]
    return {"reward": reward, "held_out_reward": held_out, "kid": kid, "kid_ci": interval}


@pytest.mark.parametrize(
    ("after", "verdict", "says"),
    [
        (stage(0.5, 0.26, 0.0128), "ok", "held-out figures did not suffer"),
        (stage(0.5, 0.20, 0.0130), "bad", "held-out reward fell by 16.7% while the reward rose"),
        (stage(0.5, 0.239, 0.0130), "warn", "held-out reward fell by 0.4%"),
        (stage(0.5, 0.26, 0.0170), "bad", "KID rose by 30.8% while"),
        (stage(0.5, 0.26, 0.0140), "warn", "KID rose by 7.7%"),  # the intervals overlap
        (stage(0.5, 0.26, 0.0136), "ok", "did not suffer"),  # 4.6 %
        (stage(0.5, 0.20, 0.0170), "bad", "held-out reward fell by 16.7% and KID rose by 30.8%"),
        (stage(0.0, 0.20, 0.0170), "warn", "the reward did not rise either"),
        ({"reward": 0.5}, "unknown", "not all there"),
    ],
)
def test_reward_hacking_weighs_the_reward_against_held_out_figures(after, verdict, says):
    found = health.reward_hacking(stage(0.1, 0.24, 0.0130), after)
    assert found.verdict == verdict
    assert says in found.says


def test_a_value_that_is_no_number_is_never_ok():
    losses = [0.1] * 99 + [math.nan]
    assert health.score_lag(losses).verdict == "unknown"
    assert health.oscillation([1.0] * 99 + [math.nan]).verdict == "unknown"
    assert health.d_overpowering([math.nan] * 20, [2.0] * 20, [-2.0] * 20).verdict == "unknown"


def test_verdicts_compare_the_last_student_with_the_longest_teacher(sixteen):
    asked = []

    def pictures_of(arm, other):
        asked.append((arm, other))
        return sixteen, sixteen

    extra = [*ROWS, {"arm": "dmd2", "diversity": 0.1}, {"arm": "teacher-4x", "diversity": 0.1}]
    found = health.verdicts(unrolled(training_log()), extra, pictures_of)
    assert asked == [("student-joint", "teacher-50")]
    assert [v.name for v in found] == list(health.NAMES)
    assert {v.verdict for v in found} == {"ok"}
    assert found[2].value == pytest.approx(1 - 0.529 / 0.561)


# ---- sheets


def test_a_contact_sheet_holds_every_pixel_in_reading_order():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 8), dtype=np.uint8)
    sheet = np.asarray(contact_sheet(images, columns=3))
    assert sheet.shape == (2 * 6 + GAP, 3 * 8 + 2 * GAP, 3)
    for i, image in enumerate(images):
        y, x = (i // 3) * (6 + GAP), (i % 3) * (8 + GAP)
        assert (sheet[y : y + 6, x : x + 8] == image.transpose(1, 2, 0)).all()
    assert (sheet[6 + GAP :, 2 * (8 + GAP) :] == 255).all()
    assert contact_sheet(images[:2], columns=9).size == (2 * 8 + GAP, 6)
    with pytest.raises(ValueError, match="columns=0"):
        contact_sheet(images, columns=0)


def test_a_comparison_enlarges_pixels_and_labels_rows_and_columns(sixteen):
    prompts = ["a cat", "a very long prompt about a fire engine in the rain", ""]
    figure = comparison({"Teacher": sixteen[:3], "Student": sixteen[3:6]}, prompts)
    pixels = np.asarray(figure)
    left = pixels.shape[1] - 3 * (128 + 8) - 8
    top = pixels.shape[0] - 2 * (128 + 8)
    for row, images in enumerate((sixteen[:3], sixteen[3:6])):
        for column, image in enumerate(images):
            y, x = top + row * 136, left + column * 136
            enlarged = image.transpose(1, 2, 0).repeat(2, axis=0).repeat(2, axis=1)
            assert (pixels[y : y + 128, x : x + 128] == enlarged).all()
    assert (pixels[:, :left].min(axis=(1, 2)) < 128).any()  # labels
    assert (pixels[:top, left : left + 128] < 200).any()  # a caption
    assert (pixels[:top, left + 2 * 136 :] == 255).all()  # no caption
    with pytest.raises(ValueError, match="'Teacher' has 3 pictures for 2 prompts"):
        comparison({"Teacher": sixteen[:3]}, prompts[:2])


def test_captions_fit_their_column():
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    for text in ("a very long prompt about a fire engine in the rain", "w" * 300, "", "a b"):
        lines = wrapped(text, font, 128)
        assert text_size(lines, font)[0] <= 128
        assert "".join(lines.split()) == "".join(text.split())
