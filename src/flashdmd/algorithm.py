"""Flash-DMD, Algorithm 1: what one iteration draws, and the loss of each network on it.

The student G_theta learns from a frozen, guided teacher mu_real, a score estimator mu_psi that
tracks the student, a discriminator D_omega of decoded pictures, and in stage 2 a reward R of noisy
latents. Every network here is a denoiser, x_0_hat = f(x_t, t, cond); times are network times.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor, nn

from flashdmd import draws, losses
from flashdmd.sampler import Cond, Denoiser, Sampler, repeat, times
from flashdmd.schedule import STEPS

MANY = 2**31  # no count of a recipe reaches it
LARGEST = 1e30  # of other numbers: float32 holds it and what is made of it
LONGEST = 10_000  # iterations of one kind in a cycle
Update = Literal["generator", "score", "discriminator", "preference"]
Stage = Literal["distill", "joint", "rl"]
Reward = Callable[[Tensor, Tensor, Cond], Tensor]  # (z_t, t, cond) -> (B,)


class Loss(NamedTuple):
    """`terms` are summed and minimised; `watch` is only looked at."""

    terms: dict[str, Tensor]
    watch: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """The numbers of the method. [DEF] marks a default that the paper does not give."""

    student_timesteps: tuple[int, ...] = (999, 749, 499, 249)  # S
    matching_timesteps: tuple[int, ...] = (999, 749, 499)  # S_hi: distribution matching
    adversarial_timesteps: tuple[int, ...] = (249,)  # t_hat: the Pixel-GAN, nowhere else
    preference_timesteps: tuple[int, ...] = (999, 749)  # S_rl: where candidates are drawn

    teacher_guidance_scale: float = 8.0  # [DEF] DMD2's for SDXL
    renoise: Literal["full", "above_t"] = "full"  # [DEF] where scores are compared: Eq. 4's text
    renoise_range: tuple[int, int] = (20, 980)  # DMD2: 2 % .. 98 %, both ends included
    renoise_shift: float = 1.0  # [DEF] a flow teacher's own shift (RTDMD); 1 draws uniformly

    score_loss: Literal["native", "eps", "x0"] = "native"  # [DEF] eps for SDXL, v for SD3
    score_times: Literal["uniform", "logit_normal"] = "uniform"  # [DEF] 1..999 (DMD2: 0..); SD3's
    score_coupling: float = 0.98  # [DEF] lambda_ema of Eq. 11; SenseFlow's
    ttur: int = 2  # score and discriminator updates a generator update (paper: 1 or 2)

    adversarial_input: Literal["finished", "sampler_state"] = "finished"  # [DEF] B(x, 0), re-noised
    real_images: Literal["decoded", "raw"] = "decoded"  # [DEF] V(E(x)): D cannot judge V itself
    gan_loss_weight: float = 0.1  # [DEF] lambda_adv, where calibration starts (SenseFlow, SD3.5)
    gan_gradient_ratio: float | None = 0.25  # [DEF] |lambda grad L_adv| / |grad L_DM|; None: fixed

    candidates: int = 4  # K
    beta: float = 500.0  # [DEF] on mean log-probabilities (LPO)
    ratio_clamp: float = 0.1  # [DEF] LPO's epsilon
    preferences_per_distillation: int = 5  # RL updates a generator update

    def __post_init__(self) -> None:
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"{field.name}={value!r} must be one of {choices}")
            if isinstance(value, float) and not abs(value) <= LARGEST:
                raise ValueError(f"{field.name}={value} must be finite, {LARGEST} at most")
            if isinstance(value, int) and value >= MANY:
                raise ValueError(f"{field.name}={value} must be less than {MANY}")
        steps = self.student_timesteps
        if not steps or list(steps) != sorted(set(steps), reverse=True):
            raise ValueError(f"student_timesteps={steps} must be strictly decreasing")
        if steps[-1] <= 0 or steps[0] > STEPS:
            raise ValueError(f"student_timesteps={steps} must lie in 1..{STEPS}")
        for name in ("matching_timesteps", "adversarial_timesteps", "preference_timesteps"):
            if strangers := set(getattr(self, name)) - set(steps):
                raise ValueError(
                    f"{name}={getattr(self, name)}: {sorted(strangers)} are not among "
                    f"student_timesteps={steps}"
                )
        if not self.matching_timesteps or not self.adversarial_timesteps:
            raise ValueError("matching_timesteps and adversarial_timesteps need one step or more")
        if steps[-1] in self.preference_timesteps:
            raise ValueError(
                f"preference_timesteps={self.preference_timesteps} holds {steps[-1]}, the last "
                "step: nothing is drawn after it, so there are no candidates to prefer"
            )
        low, high = self.renoise_range
        if not 0 < low < high < STEPS:
            raise ValueError(f"renoise_range={self.renoise_range} must rise within 1..{STEPS - 1}")
        if self.ttur < 1 or self.preferences_per_distillation < 0 or self.candidates < 2:
            raise ValueError(
                f"ttur={self.ttur} must be 1 or more, preferences_per_distillation="
                f"{self.preferences_per_distillation} 0 or more, candidates={self.candidates} "
                "2 or more"
            )
        if max(self.ttur, self.preferences_per_distillation) > LONGEST:
            raise ValueError(
                f"ttur={self.ttur} and preferences_per_distillation="
                f"{self.preferences_per_distillation} must be {LONGEST} or less"
            )
        if self.teacher_guidance_scale < 1:  # 0 would be the teacher that reads no prompt
            raise ValueError(
                f"teacher_guidance_scale={self.teacher_guidance_scale} must be 1 (no guidance) or "
                "more"
            )
        if not 0 <= self.score_coupling <= 1:
            raise ValueError(f"score_coupling={self.score_coupling} must lie in 0..1")
        if not 0 < self.ratio_clamp < 1 or self.beta <= 0 or self.renoise_shift <= 0:
            raise ValueError(
                f"ratio_clamp={self.ratio_clamp} must lie between 0 and 1; beta={self.beta} and "
                f"renoise_shift={self.renoise_shift} must be positive"
            )
        ratio = self.gan_gradient_ratio
        if self.gan_loss_weight < 0 or (ratio is not None and ratio <= 0):
            raise ValueError(
                f"gan_loss_weight={self.gan_loss_weight} must be 0 or more, "
                f"gan_gradient_ratio={ratio} positive, or None to keep the weight fixed"
            )


SPLIT = {1: (1, 1, 0), 2: (1, 1, 1), 4: (3, 1, 2), 8: (6, 2, 3)}  # [DEF]; 4 steps: the paper's


def split(steps: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The four lists of steps of a `Method` for a student of these steps.

    The first ones are matched, the last ones go to the discriminator, candidates are drawn at the
    first ones; of one step there is nothing after it to draw.
    """
    n = len(steps)
    matched, judged, preferred = SPLIT.get(n, (n - 1, 1, n // 2))
    return {
        "student_timesteps": steps,
        "matching_timesteps": steps[:matched],
        "adversarial_timesteps": steps[n - judged :],
        "preference_timesteps": steps[:preferred],
    }


def cycle(method: Method, stage: Stage) -> tuple[tuple[Update, ...], ...]:
    """One period of iterations, each a tuple of updates; iteration n does `cycle[n % len]`.

    A distilling iteration costs one batch of images: score and discriminator learn in each, the
    generator in the first of every `ttur`, before them and on the same samples. Stage 2 ("joint")
    puts the preference updates after each such round. "rl" is the arm without distillation.
    """
    if stage != "distill" and not method.preference_timesteps:
        raise ValueError(
            f"stage={stage!r} draws candidates at preference_timesteps, which is empty; name steps "
            f"before {method.student_timesteps[-1]}, or run stage='distill' only"
        )
    prefer: tuple[Update, ...] = ("preference",)
    follow: tuple[Update, ...] = ("score", "discriminator")
    distill = (("generator", *follow), *(follow,) * (method.ttur - 1))
    joint = (*distill, *(prefer,) * method.preferences_per_distillation)
    return {"distill": distill, "joint": joint, "rl": (prefer,)}[stage]


@dataclass(frozen=True)
class Rollout:
    """The student's samples of one iteration: all three networks learn from them.

    Where gradients flow is decided when it is drawn: `x0[t]` leads back through one forward of the
    student at `t`, `image` through one at the low-noise step and the decoder; nothing else does.
    """

    t: int
    t_hat: int
    x0: dict[int, Tensor]  # G(x_s, s) at every step s of the student
    image: Tensor | None  # V(G(x_hat, t_hat)), what the discriminator sees

    def detach(self) -> "Rollout":
        """The same samples, leading back to nothing."""
        image = None if self.image is None else self.image.detach()
        return Rollout(self.t, self.t_hat, {s: x.detach() for s, x in self.x0.items()}, image)


class Candidates(NamedTuple):
    """K continuations of one state of the walk."""

    z_t: Tensor  # (B, *d)
    t: int
    x0: Tensor  # x_0_hat(z_t, t), through which the student learns
    pool: Tensor  # (K, B, *d) draws of p(z_next | z_t)
    scores: Tensor  # (K, B) rewards, at the noise level of the pool


def identity(images: Tensor) -> Tensor:
    return images


@dataclass
class FlashDMD:
    method: Method
    sampler: Sampler
    teacher: Denoiser  # mu_real: guided, frozen
    generator: nn.Module  # G_theta
    score: nn.Module  # mu_psi
    discriminator: nn.Module  # D_omega: images -> (B, K) logits
    decode: Callable[[Tensor], Tensor]  # V: latents -> images
    reward: Reward | None = None  # R, at the noise level it is asked about
    reference: Denoiser | None = None  # p_ref: the generator before stage 2, frozen
    augment: Callable[[Tensor], Tensor] = identity  # of what D sees, real and fake
    r1_weight: float = 0.0  # of the approximate R1 of D on real pictures; 0 draws nothing
    r1_sigma: float = 0.1  # its noise, in units of pictures in [-1, 1]

    trains: ClassVar[dict[Update, tuple[str, ...]]] = {
        "generator": ("generator",),
        "score": ("score",),
        "discriminator": ("discriminator",),
        "preference": ("preference",),  # the generator, under an optimizer of its own
    }

    def __post_init__(self) -> None:
        self.gan_loss_weight = self.method.gan_loss_weight
        if self.sampler.steps != self.method.student_timesteps:
            raise ValueError(
                f"the sampler walks {self.sampler.steps}, the method trains "
                f"{self.method.student_timesteps}"
            )

    def draw_steps(self, rng: torch.Generator) -> tuple[int, int]:
        """(t, t_hat) of an iteration; every process must draw the same."""
        m = self.method
        return pick(m.matching_timesteps, rng), pick(m.adversarial_timesteps, rng)

    def rollout(self, noise: Tensor, cond: Cond, t: int, t_hat: int) -> Rollout:
        """x_t <- backward simulation; x_0 <- G(x_t, t); y <- V(G(x_hat, t_hat)).

        Differentiable at `t` and at `t_hat`; under `no_grad` (iterations in which the generator
        does not learn) nowhere.
        """
        with torch.no_grad():
            before = self.sampler.walk(self.generator, noise, cond, stop=t)
        x0 = self.generator(before.end, times(t, noise), cond)
        with torch.no_grad():
            after = self.sampler.finish(self.generator, x0, t, cond)  # Detach(B(x_0, 0))
            if self.method.adversarial_input == "finished":
                x_hat = self.sampler.renoise(after.end, t_hat)
            else:
                x_hat = (before.x_t | {t: before.end} | after.x_t)[t_hat]
        image = self.decode(self.generator(x_hat, times(t_hat, noise), cond))
        return Rollout(t, t_hat, before.x0 | {t: x0} | after.x0, image)

    def generator_loss(self, samples: Rollout, cond: Cond) -> Loss:
        """L_DM at a high-noise step and L_adv at a low-noise step; at one if there is but one."""
        x0 = samples.x0[samples.t]
        matching = matching_loss(
            self.sampler, self.method, self.teacher, self.score, x0, samples.t, cond
        )
        assert samples.image is not None
        adversarial = losses.hinge_generator(self.discriminator(self.augment(samples.image)))
        return Loss(
            {"matching": matching, "adversarial": self.gan_loss_weight * adversarial},
            watch_latents(samples.x0[self.sampler.steps[-1]]),
        )

    @torch.no_grad()
    def couple(self) -> None:
        """psi <- lambda psi + (1 - lambda) theta, after each generator update (Eq. 11)."""
        for psi, theta in zip(self.score.parameters(), self.generator.parameters(), strict=True):
            psi.lerp_(theta, 1 - self.method.score_coupling)

    def score_loss(self, samples: Rollout, cond: Cond) -> Loss:
        """Diffusion loss on the student's x_0 at every one of its steps: mu_psi only tracks.

        Not on finished samples alone: `generator_loss` asks for the score of G(x_t, t) at high t.
        """
        x0 = one_each(torch.stack(list(samples.x0.values())).detach())
        loss = diffusion_loss(self.sampler, self.method, self.score, x0, cond)
        return Loss({"diffusion": loss}, {})

    def discriminator_loss(self, samples: Rollout, real: Tensor) -> Loss:
        assert samples.image is not None
        real, fake = self.augment(real), self.augment(samples.image.detach())
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        terms = {"hinge": losses.hinge_discriminator(on_real, on_fake)}
        if self.r1_weight:
            on_noisy = self.discriminator(real + self.r1_sigma * draws.normal(real))
            terms["r1"] = self.r1_weight * losses.approximate_r1(on_real, on_noisy)
        return Loss(
            terms,
            {
                "discriminator/real": on_real.detach().mean(),
                "discriminator/fake": on_fake.detach().mean(),
            },
        )

    def preference_loss(self, noise: Tensor, cond: Cond, reward_cond: Cond) -> Loss:
        """-log sigmoid(beta H) over best and worst of K continuations at each high-noise step.

        H is the difference of log-likelihood ratios of winner and loser under the few-step policy
        N(alpha' x_0(z_t), sigma'^2 I); each candidate is scored at its own noise level.
        """
        assert self.reference is not None
        terms, best, worst = [], [], []
        for z_t, t, x0, pool, scores in self.draw_candidates(noise, cond, reward_cond):
            step = self.sampler.after(t)
            assert step is not None  # Method saw to it
            win, lose = losses.best_and_worst(pool, scores)
            best.append(scores.amax(0).mean())
            worst.append(scores.amin(0).mean())
            mean, std = self.sampler.transition(x0, step)
            with torch.no_grad():
                ref, _ = self.sampler.transition(self.reference(z_t, times(t, z_t), cond), step)
            log_p = losses.gaussian_log_prob
            gain_win = log_p(win, mean, std) - log_p(win, ref, std)
            gain_lose = log_p(lose, mean, std) - log_p(lose, ref, std)
            m = self.method
            terms.append(losses.preference(gain_win, gain_lose, m.beta, m.ratio_clamp))
        return Loss(
            {"preference": torch.stack(terms).mean()},
            {"reward/best": torch.stack(best).mean(), "reward/worst": torch.stack(worst).mean()},
        )

    def draw_candidates(self, noise: Tensor, cond: Cond, reward_cond: Cond) -> list[Candidates]:
        """Walk down; at each step of S_rl draw K next states, score them, go on from any of them.

        Gradients reach the student through x_0_hat alone: the forward that draws the pool is the
        one that learns.
        """
        assert self.reward is not None
        drawn, z, k = [], noise, self.method.candidates
        last = self.sampler.steps.index(min(self.method.preference_timesteps))
        for t in self.sampler.steps[: last + 1]:
            step = self.sampler.after(t)
            assert step is not None
            prefers = t in self.method.preference_timesteps
            with torch.set_grad_enabled(prefers and torch.is_grad_enabled()):
                x0 = self.generator(z, times(t, z), cond)
            seen = x0.detach()
            if not prefers:
                z = self.sampler.renoise(seen, step)
                continue
            pool = torch.cat([self.sampler.renoise(seen, step) for _ in range(k)])  # (K B, *d)
            with torch.no_grad():
                scores = self.reward(pool, times(step, pool), repeat(reward_cond, k))
            pool, scores = (p.unflatten(0, (k, len(z))) for p in (pool, scores))
            drawn.append(Candidates(z, t, x0, pool, scores))
            z = one_each(pool)
        return drawn


def renoised(sampler: Sampler, method: Method, x0: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """(x_s, s): `x0` at the noise levels where the two scores are compared.

    u is uniform and s is u shifted as a flow model's times are: s / (1 - s) = shift u / (1 - u) in
    units of `STEPS`. "above_t" keeps s >= t, as far as `renoise_range` reaches.
    """
    (low, high), shift = method.renoise_range, method.renoise_shift
    if method.renoise == "above_t":
        u_of_t = t / (shift - (shift - 1) * t / STEPS)  # the shift below, solved for u
        low = min(max(low, math.ceil(u_of_t)), high)
    u = draws.integers(low, high + 1, x0).float()
    # whole: a table of alphas has nothing between two steps
    s = (shift * u / (1 + (shift - 1) * u / STEPS)).round().clamp(1, STEPS - 1)
    return sampler.process.add_noise(x0, draws.normal(x0), s), s


def matching_loss(
    sampler: Sampler,
    method: Method,
    teacher: Denoiser,
    score: Denoiser,
    x0: Tensor,
    t: int,
    cond: Cond,
) -> Tensor:
    """L_DM (Eq. 3, 4): the scores of teacher and student, compared at a re-noised x_0."""
    with torch.no_grad():
        x_s, s = renoised(sampler, method, x0, t)
        direction = losses.matching_gradient(
            x0, x0_real=teacher(x_s, s, cond), x0_fake=score(x_s, s, cond)
        )
    return losses.with_gradient(x0, direction)


def diffusion_loss(
    sampler: Sampler, method: Method, denoiser: Denoiser, x0: Tensor, cond: Cond
) -> Tensor:
    """E w(t)^2 |x_0_hat - x_0|^2, with w so that the error is the one in eps, x_0 or native."""
    process = sampler.process
    if method.score_times == "uniform":
        t = draws.integers(1, STEPS, x0).float()
    else:
        u = draws.normal(torch.zeros(len(x0), device=x0.device))
        t = (STEPS * u.sigmoid()).round().clamp(1, STEPS - 1)
    eps = draws.normal(x0)
    x_t = process.add_noise(x0, eps, t)
    kind = process.kind if method.score_loss == "native" else method.score_loss
    weight = replace(process, kind=kind).error_weight(t, x0)
    return (weight * (denoiser(x_t, t, cond) - x0)).float().square().mean()


def watch_latents(x0: Tensor) -> dict[str, Tensor]:
    """Mean and spread of x_0: of finished samples, whose colours no matching term bounds."""
    return {"latent/mean": x0.detach().mean(), "latent/std": x0.detach().std()}


def one_each(stack: Tensor) -> Tensor:
    """(S, B, *d) -> (B, *d): each example from a row of its own, all rows equally likely."""
    rows = torch.arange(stack.shape[1], device=stack.device)
    return stack[draws.integers(0, len(stack), stack[0]), rows]


def pick(values: tuple[int, ...], rng: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=rng))]
