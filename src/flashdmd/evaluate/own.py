"""Figures for a run on pictures or prompts of one's own, where no judge knows the answers."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.evaluate.diversity import pairwise
from flashdmd.evaluate.kid import interval, kid
from flashdmd.evaluate.protocol import VERSION, Draw, Score, batches, weights_digest
from flashdmd.files import digest

SIDE = 256  # pixels across, at most, of what the backbone looks at
SHORTEST = 64  # at least: of 32 pixels of noise all its features are 0, and so is every KID
EACH = 8  # pictures of a prompt, for diversity
MANY = 8  # prompts that get so many
LEAST = 8  # pictures that a distance is computed of


@dataclass(frozen=True)
class Own:
    """What decides the figures beside the pictures themselves."""

    num_prompts: int
    seed: int
    reference: str  # what KID is the distance to


class OwnBench:
    """KID to `reference` pictures, which `called` names; diversity; reward.

    The features are those of a backbone that nothing was trained against.
    """

    def __init__(
        self,
        prompts: list[str],
        seed: int,
        backbone: Any,
        called: str,
        reference: np.ndarray,
    ) -> None:
        if len(prompts) < LEAST:
            raise UserError(
                f"there are {len(prompts)} prompts to measure on; name {LEAST} or more as "
                "validation.prompts, or in data.prompts"
            )
        self.protocol = Own(len(prompts), seed, called)
        self.prompts, self.backbone = prompts, backbone
        self.real = self.pooled(reference)

    @torch.no_grad()
    def pooled(self, pictures: np.ndarray) -> Tensor:
        return torch.cat([self.backbone.pooled(small(b)) for b in batches(pictures, 16)])

    def fingerprint(self, reward: nn.Module | None) -> dict[str, Any]:
        """Everything that decides the numbers; `reward` is the network behind their column."""
        return {
            "version": VERSION,
            "metric": f"KID on EfficientNet-Lite2 features, to {self.protocol.reference}",
            "protocol": asdict(self.protocol),
            "prompts": digest(json.dumps([self.prompts, EACH, MANY]).encode()),
            "real": digest(self.real.numpy().tobytes()),
            "backbone": weights_digest(dict(self.backbone.named_parameters())),
            "reward": weights_digest(dict(reward.named_parameters())) if reward else None,
            "torch": torch.__version__,
        }

    @torch.no_grad()
    def measure(self, arm: str, nfe: int, draw: Draw, reward: Score | None) -> dict[str, Any]:
        """One row of the table. Names and held-out reward are a judge's, and there is none."""
        seed = self.protocol.seed
        started = time.perf_counter()
        pictures = draw(self.prompts, seed)
        seconds = (time.perf_counter() - started) / len(pictures)
        features = self.pooled(pictures)
        often = [p for p in self.prompts[:MANY] for _ in range(EACH)]
        groups = np.split(draw(often, seed + len(pictures)), len(often) // EACH)
        spread = [pairwise(self.backbone(small(batches(g, EACH)[0]))) for g in groups]
        return {
            "arm": arm,
            "nfe": nfe,
            "kid": kid(features, self.real),
            "kid_ci": list(interval(features, self.real)),
            "retrieval": None,
            "reward": float(reward(pictures, self.prompts).mean()) if reward else None,
            "held_out_reward": None,
            "diversity": float(np.mean(spread)),
            "seconds_per_image": seconds,
        }


def small(images: Tensor) -> Tensor:
    """The longer side SIDE at most and SHORTEST at least."""
    longer = max(images.shape[-2:])
    scale = min(max(longer, SHORTEST), SIDE) / longer
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
