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

Trunk = Callable[[Tensor, Tensor, Tensor], list[Tensor]]  # (x_t, t, tokens) -> maps, middle last


class LatentReward(nn.Module):
    """score = exp(logit_scale) cos(V, T), V of the latent and T of the prompt.

    `cond` holds the prompt's `tokens` (B, L, D), its `pooled` feature (B, D), and both of the empty
    prompt, `no_tokens`. It scores latents of any process, see `as_trained`.
    """

    def __init__(self, trunk: nn.Module, channels: int, middle: int, text: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.visual = nn.Linear(channels, text, bias=False)
        self.text = nn.Linear(text, text, bias=False)
        nn.init.normal_(self.visual.weight, std=0.02)
        nn.init.eye_(self.text.weight)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.middle = middle

    def forward(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], cond: Cond
    ) -> Float[Tensor, "B"]:
        """The score at a variance-preserving x_t, the process that the trunk was trained in."""
        with_text = self.averages(x_t, t, cond["tokens"])
        without = self.averages(x_t, t, cond["no_tokens"])
        middle = without[:, -self.middle :] + GUIDANCE * (
            with_text[:, -self.middle :] - without[:, -self.middle :]
        )
        seen = torch.cat([with_text[:, : -self.middle], middle], dim=1)
        v, words = self.visual(seen), self.text(cond["pooled"])
        return self.logit_scale.exp() * F.cosine_similarity(v.float(), words.float(), dim=1)

    def averages(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([m.mean((2, 3)) for m in self.trunk(x_t, t, tokens)], dim=1)


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
    win: Float[Tensor, "B"], lose: Float[Tensor, "B"], ties: Float[Tensor, "B"] | None = None
) -> Float[Tensor, ""]:
    """Two-way cross-entropy with soft labels; where `ties` is 1 either order is as good.

    A tie's least loss, ln 2, is taken off, so that the loss of a perfect reward is 0 (LPO).
    """
    logs = F.logsigmoid(win - lose), F.logsigmoid(lose - win)
    if ties is None:
        return -logs[0].mean()
    label = 1 - ties / 2
    return (-label * logs[0] - (1 - label) * logs[1] - ties * math.log(2)).mean()
