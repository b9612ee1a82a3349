"""One protocol for every arm: the same prompts, noise, judge and real pictures."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashdmd.emoji.judge import Judge, retrieval
from flashdmd.emoji.world import STYLES, Split, World
from flashdmd.errors import UserError
from flashdmd.evaluate.diversity import pairwise
from flashdmd.evaluate.kid import interval, kid
from flashdmd.files import digest
from flashdmd.seeds import seed_of

VERSION = 3  # of everything in this folder that decides a number
PICTURES = 276  # (concept, style) pairs of either split: as many as are held out
BROAD = (  # prompts that many pictures answer
    "fluent emoji", "twemoji emoji", "noto emoji", "fluent emoji of a mammal",
    "noto emoji of a vehicle", "twemoji emoji of a fruit", "a bird emoji", "a building emoji",
    "a meal emoji", "a flower emoji", "a clothing emoji", "a tool emoji",
)  # fmt: skip
EACH = 8  # pictures of each broad prompt

Draw = Callable[[list[str], int], np.ndarray]  # (prompts, seed) -> (N, 3, H, W) uint8
Score = Callable[[np.ndarray, list[str]], Tensor]  # (pictures, prompts) -> (N,)


@dataclass(frozen=True)
class Protocol:
    """What is drawn and measured; two results are comparable if and only if this is equal."""

    num_prompts: int = PICTURES  # (concept, style) pairs, one picture each
    real_renderings: int = 4  # of each of PICTURES, the reference of KID
    seed: int = 1234
    split: Split = "test"  # held-out pairs, or "train": pairs that the teachers have seen


class Bench:
    """The judge, the real set, and the prompts of a protocol."""

    def __init__(self, protocol: Protocol, judge: Judge) -> None:
        self.protocol, self.judge, self.world = protocol, judge, World()
        indices = self.world.indices(protocol.split)
        order = np.random.default_rng(seed_of("prompts")).permutation(len(indices))
        chosen = [indices[i] for i in order[:PICTURES]]
        asked = chosen[: protocol.num_prompts]
        self.prompts = [self.world.emoji[i].prompt for i in asked]
        self.names = [self.world.emoji[i].name for i in asked]
        reference = sorted(chosen) * protocol.real_renderings
        self.of = torch.tensor(asked), torch.tensor(reference)  # pictures that KID keeps apart

    @cached_property
    def real_pictures(self) -> np.ndarray:
        """(N, 3, H, W) real pictures of the split, the reference of KID."""
        rng = np.random.default_rng(seed_of("real", self.protocol.seed))
        return np.stack([self.world.render(int(i), rng) for i in self.of[1]])

    @cached_property
    def real(self) -> Tensor:
        """(N, 1280) features of `real_pictures`."""
        return self.pooled(self.real_pictures)

    def pooled(self, pictures: np.ndarray) -> Tensor:
        """Penultimate features of the judge's backbone."""
        with torch.no_grad():
            return torch.cat([self.judge.backbone.pooled(b) for b in batches(pictures)])

    def fingerprint(self, reward: nn.Module | None) -> dict[str, Any]:
        """Everything that decides the numbers; `reward` is the network behind their column."""
        judge = dict(self.judge.named_parameters())
        backbone = {k: p for k, p in judge.items() if k.startswith("backbone.")}
        heads = {k: p for k, p in judge.items() if k not in backbone}
        names = json.dumps(self.judge.names).encode()
        return {
            "version": VERSION,
            "metric": "KID on EfficientNet-Lite2 features",
            "protocol": asdict(self.protocol),
            "prompts": digest(json.dumps([self.prompts, BROAD, EACH]).encode()),
            "real": digest(self.real_pictures.tobytes()),
            "backbone": f"EfficientNet-Lite2 {weights_digest(backbone)}",
            "judge": weights_digest({**heads, "embeddings": self.judge.embeddings}),
            "names": digest(names),
            "reward": weights_digest(dict(reward.named_parameters())) if reward else None,
            "torch": torch.__version__,
        }

    @torch.no_grad()
    def measure(self, arm: str, nfe: int, draw: Draw, reward: Score | None) -> dict[str, Any]:
        """One row of the table."""
        seed = self.protocol.seed
        started = time.perf_counter()
        pictures = draw(self.prompts, seed)
        seconds = (time.perf_counter() - started) / len(pictures)
        features = self.pooled(pictures)
        judged = torch.cat([self.judge.features(b) for b in batches(pictures)])
        broad = draw([p for p in BROAD for _ in range(EACH)], seed + len(pictures))
        return {
            "arm": arm,
            "nfe": nfe,
            "kid": kid(features, self.real, self.of),
            "kid_ci": list(interval(features, self.real, self.of)),
            "retrieval": retrieval(self.judge, judged, self.names)["top5"],
            "reward": float(reward(pictures, self.prompts).mean()) if reward else None,
            "held_out_reward": float(self.judge.prefer(judged, self.judge.rows(self.names)).mean()),
            "diversity": self.diversity(broad),
            "seconds_per_image": seconds,
        }

    def diversity(self, pictures: np.ndarray) -> float:
        """Mean over broad prompts of the distance of two of their EACH pictures."""
        groups = np.split(pictures, len(pictures) // EACH)
        with torch.no_grad():
            return float(np.mean([pairwise(self.judge.backbone(as_images(g))) for g in groups]))

    def draw_real(self, prompts: list[str], seed: int) -> np.ndarray:
        """A `Draw` of real pictures: the row that any model is to be read against.

        Other renderings than KID's reference of the pictures that are asked for, or pictures that
        answer the broad prompts; no other prompts have an answer here.
        """
        if prompts != self.prompts:
            return self.real_broad(seed)
        rng = np.random.default_rng(seed_of("asked", seed))
        return np.stack([self.world.render(int(i), rng) for i in self.of[0]])

    def real_broad(self, seed: int = 0) -> np.ndarray:
        """Real training pictures that answer BROAD, EACH of each: the yardstick of diversity."""
        rng = np.random.default_rng(seed_of("broad", seed))
        pictures = []
        for prompt in BROAD:
            fits = [i for i in self.world.indices("train") if answers(self.world, i, prompt)]
            chosen = rng.choice(fits, EACH, replace=len(fits) < EACH)
            pictures += [self.world.render(i, rng) for i in chosen]
        return np.stack(pictures)


def answers(world: World, i: int, prompt: str) -> bool:
    """Whether a picture is what a broad prompt asks for."""
    e = world.emoji[i]
    style = next((s for s in STYLES if prompt.startswith(s)), e.style)
    about = prompt.removeprefix(style).replace("emoji", "").replace(" of ", " ").strip()
    subject = about.removeprefix("an ").removeprefix("a ").strip()
    return e.style == style and (not subject or e.subject == subject)


def batches(pictures: np.ndarray, size: int = 64) -> list[Tensor]:
    return [as_images(pictures[i : i + size]) for i in range(0, len(pictures), size)]


def as_images(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).float() / 127.5 - 1


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    parts = [(k, weights[k].detach().cpu().contiguous().numpy()) for k in sorted(weights)]
    return digest(b"".join(k.encode() + v.tobytes() for k, v in parts))


def table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins results {"fingerprint", "rows"} into one. Raises UserError if they do not compare."""
    first = results[0]["fingerprint"]
    for other in results[1:]:
        odd = {
            k
            for k in first.keys() | other["fingerprint"]
            if first.get(k) != other["fingerprint"].get(k)
        }
        if odd:
            raise UserError(
                f"these results were measured differently ({', '.join(sorted(odd))}) and cannot "
                "stand in one table; measure them again together"
            )
    return {"fingerprint": first, "rows": [row for r in results for row in r["rows"]]}
