"""Verdicts on a run, by name: blur, saturation_drift, diversity_drop, score_lag, oscillation,
d_overpowering, reward_hacking.

Every value measures the failure it is named after, as a fraction: larger is worse, `limit` is where
"ok" ends. Nothing here reads files or knows a network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

Row = Mapping[str, Any]  # of metrics.json
Grade = Literal["ok", "warn", "bad", "unknown"]
NAMES = (
    "blur",
    "saturation_drift",
    "diversity_drop",
    "score_lag",
    "oscillation",
    "d_overpowering",
    "reward_hacking",
)

# Limits are (warn, bad). Chance alone, two renderings of the same eight emoji with other hues,
# backgrounds and confetti, goes past the warning of blur in 1.5 % of draws (1.3 % with twelve) and
# of saturation_drift in 0.8 % (none of 600 with twelve), and past "bad" in none of 600.
FEWEST_PICTURES = 8
BLUR = (0.3, 0.6)  # a Gaussian blur of 0.5 pixels loses 0.54 of an emoji's detail, of 0.7 0.75
SATURATION_DRIFT = (0.4, 0.8)  # a burnt model doubles its saturation
DIVERSITY_DROP = (0.15, 0.3)  # published four-step students lose 3 to 5 % against their teachers
SCORE_LAG = (0.3, 1.0)
SCORE_LAG_SKIPPED = 0.25  # of the run: a student that turns sharp is harder to predict, no lag
SCORE_LAG_SIGMAS = 3.0  # standard errors; a level loss passes for a rise in 1 % of runs at most
BLOCKS = 10  # a running mean over tenths of the run
FEWEST_LOSSES = 10 * BLOCKS
OSCILLATION = (0.12, 0.25)  # stage 1 of the embedded teachers: 0.17 to 0.20 with momentum, which
# cost KID a half in one seed of two, and 0.04 to 0.08 without (docs/log.md)
OSCILLATION_BLOCKS = 20
OSCILLATION_SIGMAS = 5.0  # of a block's mean; level noise goes past it in 1 % of runs at most
D_SEPARATES = 1.0  # beyond this logit the hinge loss has no gradient
D_HINGE = 0.1  # a discriminator that knows nothing has 2
D_OVERPOWERING = (0.5, 0.9)  # of the last tenth of the updates
D_FEWEST = 10
REFINED = ("student-joint", "student-rl")  # what stage 2 leaves, by its kind
HELD_OUT_FALL = (0.0, 0.01)  # any fall counts; one of 1 % may still be chance
KID_RISE = 0.05


@dataclass(frozen=True)
class Verdict:
    """One line of the report; `says` is what it means and, unless all is well, what to do."""

    name: str
    verdict: Grade
    value: float | None
    limit: float | None
    says: str


def unknown(name: str, why: str) -> Verdict:
    return Verdict(name, "unknown", None, None, why)


def graded(name: str, value: float, limits: tuple[float, float], fine: str, wrong: str) -> Verdict:
    if not math.isfinite(value):
        return unknown(name, "What it is computed from holds a value that is not a number.")
    grade: Grade = "bad" if value > limits[1] else "warn" if value > limits[0] else "ok"
    return Verdict(name, grade, value, limits[0], fine if grade == "ok" else wrong)


def blur(student: UInt8[np.ndarray, "N 3 H W"], teacher: UInt8[np.ndarray, "N 3 H W"]) -> Verdict:
    """The share of the teacher's fine detail that the student lost.

    Detail is the variance of a picture's Laplacian; the two are compared prompt by prompt, and the
    median of the ratios counts.
    """
    if len(student) < FEWEST_PICTURES:
        return too_few("blur", len(student))
    smallest = 255.0**-2  # detail below one grey level is none
    ratios = [
        (detail(s) + smallest) / (detail(t) + smallest)
        for s, t in zip(student, teacher, strict=True)
    ]
    kept = float(np.median(ratios))
    return graded(
        "blur",
        1 - kept,
        BLUR,
        f"The student's pictures have {kept:.0%} of the fine detail of the teacher's.",
        f"The student's pictures have {kept:.0%} of the fine detail of the teacher's for the same "
        "prompts: raise gan_loss_weight or train longer; if it came with stage 2, lower "
        "preferences_per_distillation.",
    )


def saturation_drift(
    student: UInt8[np.ndarray, "N 3 H W"], teacher: UInt8[np.ndarray, "N 3 H W"]
) -> Verdict:
    """By which factor, less one, mean saturation (HSV) or contrast left the teacher's."""
    if len(student) < FEWEST_PICTURES:
        return too_few("saturation_drift", len(student))
    ratios = {
        what: mean_of(measure, student) / mean_of(measure, teacher)
        for what, measure in (("saturation", saturation), ("contrast", contrast))
    }
    what, ratio = max(ratios.items(), key=lambda item: abs(math.log(item[1])))
    return graded(
        "saturation_drift",
        math.exp(abs(math.log(ratio))) - 1,
        SATURATION_DRIFT,
        f"Saturation is {ratios['saturation']:.0%} and contrast {ratios['contrast']:.0%} of the "
        "teacher's.",
        f"The student's {what} is {ratio:.0%} of the teacher's: raise gan_loss_weight, the only "
        "term that sees colours at the last step"
        + (", or lower teacher_guidance_scale, which burns them." if ratio > 1 else "."),
    )


def diversity_drop(student: Row, teacher: Row) -> Verdict:
    """How much less the student's pictures of one prompt differ than the teacher's."""
    ours, theirs = number(student, "diversity"), number(teacher, "diversity")
    if ours is None or not theirs or theirs < 0:
        return unknown("diversity_drop", "Diversity was not measured for both student and teacher.")
    kept = ours / theirs
    return graded(
        "diversity_drop",
        1 - kept,
        DIVERSITY_DROP,
        f"The student's pictures of one prompt differ {kept:.0%} as much as the teacher's.",
        f"The student's pictures of one prompt differ only {kept:.0%} as much as the teacher's: "
        "raise gan_loss_weight, which brings lost kinds of pictures back, or lower "
        "teacher_guidance_scale or preferences_per_distillation.",
    )


def score_lag(diffusion: Sequence[float]) -> Verdict:
    """How far the score estimator's diffusion loss has risen over its best.

    The losses are cut into ten blocks of the run. The value is the mean of the last block over the
    lowest mean, less one; the first quarter is left out, in which the loss may rise because the
    student turns sharp. A rise within the noise of the two means stays below the limit.
    """
    if len(diffusion) < FEWEST_LOSSES:
        return unknown(
            "score_lag",
            f"It takes {FEWEST_LOSSES} updates of the score estimator to see a trend; the log "
            f"holds {len(diffusion)}.",
        )
    blocks = np.array_split(np.asarray(diffusion, dtype=float), BLOCKS)
    blocks = blocks[math.ceil(SCORE_LAG_SKIPPED * BLOCKS) :]
    last, best = blocks[-1], min(blocks, key=np.mean)
    rise = float(last.mean() / best.mean() - 1)
    spread = math.sqrt(np.mean([block.var(ddof=1) for block in blocks]))
    noise = spread * math.sqrt(1 / len(last) + 1 / len(best))
    if last.mean() - best.mean() < SCORE_LAG_SIGMAS * noise:
        rise = min(rise, SCORE_LAG[0])
    return graded(
        "score_lag",
        rise,
        SCORE_LAG,
        "The score estimator keeps up with the student: its loss stays near its best.",
        f"The score estimator's loss has risen {rise:.0%} over its best, so it no longer knows "
        "what the student draws: raise ttur or its learning rate, or lower the student's.",
    )


def oscillation(spread: Sequence[float]) -> Verdict:
    """How deep the spread of the student's latents swings during stage 1, as a share of its mean.

    A swing goes one way and comes back: the value is the largest distance of a block of updates
    from one before and one after it, whichever is nearer, so a lasting drift is none. The first
    quarter is left out, in which the student turns from a denoiser into a generator.
    """
    if len(spread) < 2 * OSCILLATION_BLOCKS:
        return unknown(
            "oscillation",
            f"It takes {2 * OSCILLATION_BLOCKS} generator updates of stage 1 to see a swing; the "
            f"log holds {len(spread)}.",
        )
    values = np.asarray(spread, dtype=float)
    blocks = np.array([b.mean() for b in np.array_split(values, OSCILLATION_BLOCKS)])
    blocks = blocks[OSCILLATION_BLOCKS // 4 :]
    swing = float(max(returned(blocks), returned(-blocks)))
    noise = math.sqrt(np.mean(np.diff(values) ** 2) / 2 / (len(values) // OSCILLATION_BLOCKS))
    depth = swing / float(blocks.mean())
    if swing < OSCILLATION_SIGMAS * noise:
        depth = min(depth, OSCILLATION[0])
    return graded(
        "oscillation",
        depth,
        OSCILLATION,
        "The spread of the student's latents stays level: student and score estimator move "
        "together.",
        f"The spread of the student's latents swings by {depth:.0%}: student and score estimator "
        "chase each other, and what a run leaves depends on when it ends. Lower adam_beta1 or "
        "learning_rate, or raise ttur.",
    )


def returned(blocks: np.ndarray) -> float:
    """The depth of the deepest valley: below the lower of the peaks on either side."""
    return max(
        float(min(blocks[:i].max(), blocks[i + 1 :].max()) - blocks[i])
        for i in range(1, len(blocks) - 1)
    )


def d_overpowering(hinge: Sequence[float], real: Sequence[float], fake: Sequence[float]) -> Verdict:
    """The share of the last tenth of its updates in which the discriminator had nothing to learn.

    That is: hinge loss near 0, mean logit of real pictures above 1 and of generated ones below -1.
    """
    if len(hinge) < D_FEWEST:
        return unknown(
            "d_overpowering",
            f"It takes {D_FEWEST} discriminator updates with a hinge loss to tell; the log holds "
            f"{len(hinge)}.",
        )
    recent = slice(-max(D_FEWEST, len(hinge) // 10), None)
    h, r, f = (np.asarray(x, dtype=float)[recent] for x in (hinge, real, fake))
    if not np.isfinite([h, r, f]).all():
        return graded("d_overpowering", math.nan, D_OVERPOWERING, "", "")
    share = float(((h < D_HINGE) & (r > D_SEPARATES) & (f < -D_SEPARATES)).mean())
    return graded(
        "d_overpowering",
        share,
        D_OVERPOWERING,
        f"The discriminator still has something to learn: its recent hinge loss is {h.mean():.2f}.",
        f"In {share:.0%} of its recent updates the discriminator told all pictures apart and "
        "learned nothing: lower its learning rate, and see that real pictures pass the same "
        "decoder (real_images: decoded).",
    )


def reward_hacking(before: Row, after: Row) -> Verdict:
    """Whether stage 2 bought its reward with held-out reward or with KID.

    The value is the worse of two falls against stage 1: of held-out reward, and of KID.
    """
    gain = change(before, after, "reward")
    signs = [v for v in (held_out_fall(before, after), kid_rise(before, after)) if v is not None]
    if gain is None or not signs:
        return unknown(
            "reward_hacking",
            "Reward and held-out figures before and after stage 2 are not all there.",
        )
    worst = max(signs, key=lambda v: (("ok", "warn", "bad").index(v.verdict), v.value))
    if worst.verdict == "ok":
        what = "rose" if gain > 0 else "did not rise"
        says = f"The reward {what} in stage 2 ({gain:+.3g}), and held-out figures did not suffer."
        return replace(worst, says=says)
    harm = " and ".join(v.says for v in signs if v.verdict != "ok")
    if gain <= 0:
        says = (
            f"In stage 2 {harm}, and the reward did not rise either ({gain:+.3g}): not hacked, but "
            "harmed; keep the student of stage 1, or lower the preference learning rate."
        )
        return replace(worst, verdict="warn", says=says)
    says = (
        f"In stage 2 {harm} while the reward rose ({gain:+.3g}): lower "
        "preferences_per_distillation or the preference learning rate, stop stage 2 earlier, or "
        "keep the student of stage 1."
    )
    return replace(worst, says=says)


def held_out_fall(before: Row, after: Row) -> Verdict | None:
    """Relative to the larger of the two, so that a reward near 0 does not blow it up."""
    fall = change(after, before, "held_out_reward")
    if fall is None:
        return None
    size = max(abs(before["held_out_reward"]), abs(after["held_out_reward"]))
    fall = fall / size if size else 0.0
    return graded("reward_hacking", fall, HELD_OUT_FALL, "", f"held-out reward fell by {fall:.1%}")


def kid_rise(before: Row, after: Row) -> Verdict | None:
    """Only a warning where the two intervals of KID overlap."""
    old, new = number(before, "kid"), number(after, "kid")
    if old is None or new is None or old <= 0:
        return None
    rise = new / old - 1
    bad = KID_RISE if apart(before, after, "kid") is not False else math.inf
    return graded("reward_hacking", rise, (KID_RISE, bad), "", f"KID rose by {rise:.1%}")


def verdicts(
    log: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    pictures: Callable[[str, str], tuple[np.ndarray, np.ndarray]],
) -> list[Verdict]:
    """All, of whatever is there; `pictures(a, b)` are two arms' for the same prompts."""
    by_arm = {str(row["arm"]): row for row in rows}
    student, teacher = student_of(list(by_arm)), teacher_of(list(by_arm))
    pair = pictures(student, teacher)
    d_keys = ("hinge", "discriminator/real", "discriminator/fake")
    of_discriminator = [r for r in log if set(d_keys) <= r.keys()]
    in_stage_1 = [r for r in log if r.get("stage") == "distill"]
    before, after = by_arm.get("student-stage1"), by_arm.get(refined(list(by_arm)) or "")
    return [
        blur(*pair),
        saturation_drift(*pair),
        diversity_drop(by_arm.get(student, {}), by_arm.get(teacher, {})),
        score_lag([float(r["diffusion"]) for r in log if "diffusion" in r]),
        oscillation([float(r["latent/std"]) for r in in_stage_1 if "latent/std" in r]),
        d_overpowering(*([float(r[key]) for r in of_discriminator] for key in d_keys)),
        reward_hacking(before, after)
        if before and after
        else unknown("reward_hacking", "There are no figures from before and after stage 2."),
    ]


def refined(arms: Sequence[str]) -> str | None:
    """The student of stage 2."""
    return next((arm for arm in REFINED if arm in arms), None)


def student_of(arms: Sequence[str]) -> str:
    """The arm a run is about: its last student."""
    students = [arm for arm in (*REFINED, "student-stage1") if arm in arms]
    others = [arm for arm in arms if not arm.startswith("teacher")]
    return (students or others[-1:] or ["student-joint"])[0]


def teacher_of(arms: Sequence[str]) -> str:
    """The teacher with the most steps."""
    return max((arm for arm in arms if steps_of(arm)), key=steps_of, default="teacher-50")


def steps_of(arm: str) -> int:
    """50 of "teacher-50"; 0 of what is no teacher."""
    role, _, steps = arm.partition("-")
    return int(steps) if role == "teacher" and steps.isascii() and steps.isdecimal() else 0


def number(row: Row, key: str) -> float | None:
    """The value if it is a finite number: JSON of a stopped run may hold null or NaN."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def interval(row: Row, key: str) -> tuple[float, float] | None:
    ends = row.get(f"{key}_ci")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = (number({"end": end}, "end") for end in ends)
    return (low, high) if low is not None and high is not None else None


def apart(a: Row, b: Row, key: str) -> bool | None:
    """Whether the intervals of two arms do not overlap; None where one has none."""
    one, other = interval(a, key), interval(b, key)
    return None if one is None or other is None else one[0] > other[1] or other[0] > one[1]


def change(before: Row, after: Row, key: str) -> float | None:
    old, new = number(before, key), number(after, key)
    return None if old is None or new is None else new - old


def too_few(name: str, n: int) -> Verdict:
    return unknown(
        name,
        f"It takes {FEWEST_PICTURES} pictures of both student and teacher to tell; there are {n}.",
    )


def mean_of(
    measure: Callable[[np.ndarray], float], pictures: UInt8[np.ndarray, "N 3 H W"]
) -> float:
    return float(np.mean([measure(p) for p in pictures])) + 1 / 255  # grey pictures divide too


def luma(picture: UInt8[np.ndarray, "3 H W"]) -> np.ndarray:
    """(H, W) in 0..1, by ITU-R 601."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    return np.tensordot(weights, picture.astype(np.float32), (0, 0))


def detail(picture: UInt8[np.ndarray, "3 H W"]) -> float:
    """Variance of the Laplacian of the luma."""
    y = luma(picture)
    edges = y[1:-1, :-2] + y[1:-1, 2:] + y[:-2, 1:-1] + y[2:, 1:-1] - 4 * y[1:-1, 1:-1]
    return float(edges.var())


def contrast(picture: UInt8[np.ndarray, "3 H W"]) -> float:
    return float(luma(picture).std())


def saturation(picture: UInt8[np.ndarray, "3 H W"]) -> float:
    """Mean of HSV's S, in 0..1."""
    high = picture.max(axis=0).astype(np.float32)
    return float(((high - picture.min(axis=0)) / np.maximum(high, 1)).mean())
