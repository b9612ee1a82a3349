"""R: a latent reward model. It scores a noisy latent for a prompt, at any noise level (LPO, LRM).

The trunk is the encoder half of a denoiser, which already knows what a noisy latent shows. Its maps
are averaged, projected to the width of the text feature, and compared with it by their angle.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS, Process, VariancePreserving

LOGIT_SCALE = 2.6592  # ln 14.3, where CLIP and LPO start
GUIDANCE = 7.5  # of the visual feature enhancement (LPO)

Trunk = Callable[..., list[Tensor]]  # (x_t, t, tokens[, pooled]) -> maps, middle last


class LatentReward(nn.Module):
    """score = exp(logit_scale) cos(V, T), V of the latent and T of the prompt.

    `cond` holds the prompt's `tokens` (B, L, D), its `pooled` feature (B, D), and of the empty
    prompt what the trunk is fed: `no_tokens`, and `no_pooled` for one that asks for both. It scores
    latents of any process, see `as_trained`.
    """

    def __init__(self, trunk: nn.Module, channels: int, middle: int, text: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.visual = nn.Linear(channels, text, bias=False)
        projection = nn.Linear(text, text, bias=False)
        nn.init.normal_(self.visual.weight, std=0.02)
        nn.init.eye_(projection.weight)
        self.text: nn.Module = projection  # or nn.Identity, of a feature that is projected already
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.middle = middle

    def forward(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], cond: Cond
    ) -> Float[Tensor, "B"]:
        """The score at an x_t of the process that the trunk was trained in."""
        fed = [name for name in ("tokens", "pooled") if f"no_{name}" in cond]
        with_text = self.averages(x_t, t, *(cond[name] for name in fed))
        without = self.averages(x_t, t, *(cond[f"no_{name}"] for name in fed))
        middle = without[:, -self.middle :] + GUIDANCE * (
            with_text[:, -self.middle :] - without[:, -self.middle :]
        )
        seen = torch.cat([with_text[:, : -self.middle], middle], dim=1)
        v, words = self.visual(seen), self.text(cond["pooled"])
        return self.logit_scale.exp() * F.cosine_similarity(v.float(), words.float(), dim=1)

    def averages(self, x_t: Tensor, t: Tensor, *words: Tensor) -> Tensor:
        return torch.cat([m.mean((2, 3)) for m in self.trunk(x_t, t, *words)], dim=1)


def as_trained(
    process: Process, z: Float[Tensor, "B *d"], t: Float[Tensor, "B"]
) -> tuple[Float[Tensor, "B *d"], Float[Tensor, "B"]]:
    """A latent of any process as the variance-preserving one of the same signal-to-noise ratio.

    z / sqrt(alpha^2 + sigma^2) has exactly the law of a variance-preserving latent; its time is the
    first whose sigma / alpha is as large. Ratios beyond the schedule's ends get its ends.
    """
    alpha, sigma = process.at(t, z)
    length = (alpha**2 + sigma**2).sqrt()
    steps = VariancePreserving()(torch.arange(STEPS, device=z.device))
    ratios = steps[1] / steps[0]  # sigma / alpha, rising with t
    wanted = (sigma / alpha.clamp_min(1e-6)).flatten()
    above = torch.searchsorted(ratios, wanted * (1 - 1e-4)).clamp_max(len(ratios) - 1)
    return z / length, above.float()


def pair_loss(
    win: Float[Tensor, "B"],
    lose: Float[Tensor, "B"],
    ties: Float[Tensor, "B"] | None = None,
    weights: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, ""]:
    """Two-way cross-entropy with soft labels; where `ties` is 1 either order is as good.

    A tie's least loss, ln 2, is taken off, so that the loss of a perfect reward is 0. `weights` are
    shares of the examples, adding to 1; none: equal ones (LPO).
    """
    ties = torch.zeros_like(win) if ties is None else ties
    label = 1 - ties / 2
    each = -label * F.logsigmoid(win - lose) - (1 - label) * F.logsigmoid(lose - win)
    each = each - ties * math.log(2)
    return each.mean() if weights is None else (weights * each).sum()
