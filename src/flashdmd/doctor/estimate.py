"""How much memory a run will need, network by network and update by update.

Weights, gradients and moments are counted on the real classes; what graphs hold is found by running
these on tensors of no numbers (models/passes.py). No figure of any model is written here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from flashdmd.discriminator import FeatureHead
from flashdmd.models import meta, passes
from flashdmd.models.passes import Device, Pass
from flashdmd.models.quantise import Kind, quantised_bytes
from flashdmd.optimizers import moment_bytes

GB = 2**30  # what the makers of cards call a gigabyte
CARDS = (8, 12, 16, 24, 40, 48, 80, 141)  # GB; 141: an H200
SPARE = 0.75 * GB  # [DEF] CUDA's own context and its libraries' workspaces
TORN = 1.05  # [DEF] what the allocator holds for each byte that is in use
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TERMS = 2  # of the generator's loss; the norm of each is looked at, so each has its gradients
UNKNOWN = (TypeError, RuntimeError, ValueError, AttributeError, KeyError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe says that decides its memory, under the recipe's names."""

    resolution: int | None = None  # pixels; None: the pipeline's
    train_batch_size: int = 64
    preference_batch_size: int = 32
    gradient_accumulation_steps: int = 1  # parts that a batch is worked through in
    gradient_checkpointing: bool = False
    use_8bit_adam: bool = False
    ema_decay: float = 0.99
    mixed_precision: Literal["no", "bf16"] = "bf16"
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    vae_precision: Literal["fp32", "run"] = "fp32"
    quantize_base: Kind = "none"
    rank: int = 0  # of LoRA; 0: full fine-tuning
    lora_layers: tuple[str, ...] = ()  # none: attention's projections
    width: int = 128  # of the discriminator's heads
    crop: int | None = None  # latent places across what is decoded
    cache_text_embeddings: bool = False
    arm: Literal["flash-dmd", "dmd2"] = "flash-dmd"
    joint_train_steps: int = 400
    preference_timesteps: int = 2  # how many
    guided: bool = True  # the teacher runs on a doubled batch
    device: Device = "cuda"

    @property
    def half(self) -> bool:
        return self.mixed_precision == "bf16"

    @property
    def frozen(self) -> torch.dtype:
        return DTYPES[self.frozen_dtype]

    @property
    def part(self) -> int:
        """Pictures that are worked through at a time."""
        return math.ceil(self.train_batch_size / self.gradient_accumulation_steps)

    @property
    def preferring(self) -> int:
        """Prompts of a preference update that are worked through at a time."""
        return math.ceil(self.preference_batch_size / self.gradient_accumulation_steps)


@dataclass(frozen=True, eq=False)
class Networks:
    """Whose memory is asked about."""

    parts: meta.Parts
    backbone: nn.Module | None = None  # the discriminator's; none is used under train.arm=dmd2
    reward: int = 0  # bytes of the latent reward model's weights


@dataclass(frozen=True)
class Row:
    """One network's memory in bytes."""

    role: str
    network: str  # its class
    numbers: int  # parameters; with LoRA, student and score estimator have their adapters' alone
    weights: int
    gradients: int = 0
    moments: int = 0
    activations: int = 0  # what its pass of a part of a batch holds, forward to backward


@dataclass(frozen=True)
class Estimate:
    """A run's memory in bytes: what stays, and what each kind of update adds for a while."""

    plan: Plan
    rows: tuple[Row, ...]
    updates: dict[str, tuple[int, int]]  # (gradients, activations) at the peak of each
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    @property
    def moments(self) -> int:
        return sum(row.moments for row in self.rows)

    @property
    def fullest(self) -> str:
        """The update in which most is held."""
        return max(self.updates, key=lambda name: sum(self.updates[name]))

    @property
    def peak(self) -> int:
        return self.weights + self.moments + sum(self.updates[self.fullest])

    @property
    def cards(self) -> list[int]:
        """GB of the cards that hold the run, with the allocator's waste and CUDA itself."""
        return [card for card in CARDS if self.peak * TORN + SPARE <= card * GB]


def estimate(networks: Networks, plan: Plan) -> Estimate:
    """The memory of a run, network by network and update by update."""
    run = Passes(networks, plan)
    return Estimate(plan, tuple(rows(run)), updates(run), tuple(run.notes.values()))


@dataclass
class Passes:
    """What the networks hold while they run, as a plan runs them."""

    networks: Networks
    plan: Plan
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def denoiser(self) -> nn.Module:
        return self.networks.parts.denoiser

    @property
    def side(self) -> int:
        """Latent places across a picture."""
        parts = self.networks.parts
        return (self.plan.resolution or parts.resolution) // parts.factor

    @property
    def shown(self) -> int:
        """Latent places across what the discriminator is shown."""
        return min(self.side, self.plan.crop or self.side)

    @property
    def pixels(self) -> int:
        return self.shown * self.networks.parts.factor

    @property
    def student(self) -> Pass:
        """The score estimator's as well."""
        plan = self.plan
        unpacks = plan.half and plan.quantize_base != "none"  # to the precision of the run
        base = torch.bfloat16 if unpacks else plan.frozen
        return self.tried(
            type(self.denoiser).__name__,
            lambda: passes.denoiser_pass(
                self.denoiser,
                self.side,
                base if plan.rank else torch.float32,
                plan.half,
                plan.device,
                checkpointing=plan.gradient_checkpointing,
                rank=plan.rank,
                layers=plan.lora_layers,
            ),
        )

    @property
    def teacher(self) -> Pass:
        plan = self.plan
        return self.tried(
            type(self.denoiser).__name__,
            lambda: passes.denoiser_pass(
                self.denoiser, self.side, plan.frozen, plan.half, plan.device, learns=False
            ),
        )

    @property
    def decoder(self) -> Pass:
        plan, vae = self.plan, self.networks.parts.vae
        half = plan.half and plan.vae_precision == "run"
        return self.tried(
            type(vae).__name__,
            lambda: passes.decoder_pass(
                vae, self.shown, half, plan.device, plan.gradient_checkpointing
            ),
        )

    def discriminator(self, learns: bool) -> Pass:
        plan, backbone = self.plan, self.networks.backbone
        assert backbone is not None
        return self.tried(
            type(backbone).__name__,
            lambda: passes.discriminator_pass(
                backbone, self.pixels, plan.width, plan.half, plan.device, learns
            ),
        )

    def tried(self, name: str, find: Callable[[], Pass]) -> Pass:
        """Of a class that cannot be run here, nothing, and a note."""
        try:
            return find()
        except UNKNOWN as e:
            why = (str(e) or type(e).__name__).splitlines()[0]
            self.notes[name] = f"what a {name} holds while it runs is not known here: {why}"
            return Pass((0, 0), (0, 0))

    @property
    def unpacked(self) -> int:
        """Bytes of the largest layer of a quantised base while it is used."""
        if self.plan.quantize_base == "none":
            return 0
        return max(m.weight.numel() for m in linears(self.denoiser)) * torch.bfloat16.itemsize

    @property
    def learning(self) -> list[int]:
        """Numbers of each parameter of the student; the score estimator's are as many."""
        plan = self.plan
        if plan.rank:
            return adapter_numbers(self.denoiser, plan.rank, plan.lora_layers)
        return [p.numel() for p in self.denoiser.parameters()]

    def heads(self) -> nn.Module:
        """The part of the discriminator that learns."""
        plan, backbone = self.plan, self.networks.backbone
        if plan.arm == "dmd2":
            return feature_head(self.denoiser, self.side)
        assert backbone is not None
        return passes.heads_of(backbone, self.pixels, plan.width).heads


def rows(run: Passes) -> Iterator[Row]:
    """Every network of a run."""
    plan, parts, kind = run.plan, run.networks.parts, type(run.denoiser).__name__
    learning = run.learning
    own, numbers = 4 * sum(learning), sum(learning)
    if not plan.rank:
        own = weight_bytes(run.denoiser, torch.float32)  # its buffers are copied too
    moments = sum(moment_bytes(n, plan.use_8bit_adam) for n in learning)
    passing, batch = run.student.keeps(plan.part), plan.part * (2 if plan.guided else 1)
    yield Row(
        "base and teacher" if plan.rank else "teacher",
        kind,
        meta.numbers(run.denoiser),
        weight_bytes(run.denoiser, plan.frozen, plan.quantize_base),
        activations=run.teacher.holds(batch),
    )
    twice = 2 if plan.joint_train_steps else 1  # preference updates have moments of their own
    yield Row("student", kind, numbers, own, TERMS * 4 * numbers, twice * moments, passing)
    yield Row("score estimator", kind, numbers, own, 4 * numbers, moments, passing)
    if plan.ema_decay:
        yield Row("averaged student", kind, numbers, own)
    if plan.joint_train_steps:
        yield Row("reference", kind, numbers, own)
    if plan.arm == "flash-dmd" and run.networks.backbone is not None:
        seeing, back = run.networks.backbone, run.discriminator(learns=False).keeps(plan.part)
        name = type(getattr(seeing, "network", seeing)).__name__
        size = weight_bytes(seeing, plan.frozen)
        yield Row("backbone", name, meta.numbers(seeing), size, activations=back)
    heads = run.heads()
    sizes = [p.numel() for p in heads.parameters()]
    moments = sum(moment_bytes(n, plan.use_8bit_adam) for n in sizes)
    kept = 0 if plan.arm == "dmd2" else run.discriminator(learns=True).keeps(plan.part, 2)
    yield Row("heads", "", sum(sizes), 4 * sum(sizes), 4 * sum(sizes), moments, kept)
    kept = 0 if plan.arm == "dmd2" else run.decoder.keeps(plan.part)
    vae = parts.vae
    yield Row(
        "autoencoder", type(vae).__name__, meta.numbers(vae), weight_bytes(vae), activations=kept
    )
    if not plan.cache_text_embeddings:
        for name, encoder in parts.text_encoders.items():
            size = weight_bytes(encoder, plan.frozen)
            yield Row(name.replace("_", " "), type(encoder).__name__, meta.numbers(encoder), size)
    if run.networks.reward and plan.joint_train_steps:
        yield Row("reward", "", run.networks.reward // 4, run.networks.reward)


def updates(run: Passes) -> dict[str, tuple[int, int]]:
    """(gradients, activations) at the fullest moment of each kind of update.

    Graphs that live at one time are added up, and the most that anything holds beside them.
    """
    plan, student, part = run.plan, run.student, run.plan.part
    gradients, head_gradients = (
        4 * sum(run.learning),
        4 * sum(p.numel() for p in run.heads().parameters()),
    )
    # autocast keeps its copies of weights that learn, and makes new ones of a frozen base's
    shares = plan.rank == 0
    guiding = run.teacher.holds(part * (2 if plan.guided else 1))
    found: dict[str, tuple[int, int]] = {}
    if plan.arm == "dmd2":
        # through the score estimator's first half, counted as if it were all of it
        both = student.keeps(part, graphs=2, casts=2) + max(student.works(part), guiding)
        found["generator"] = TERMS * gradients, both + run.unpacked
        three = student.keeps(part, graphs=3, casts=1 if shares else 3) + student.works(part)
        found["score"] = gradients + head_gradients, three + run.unpacked
        return found
    decoder, critic = run.decoder, run.discriminator(learns=False)
    pictures = 2 * plan.train_batch_size * 3 * 4 * run.pixels**2  # real ones and the student's
    kept = student.keeps(part, graphs=2, casts=1 if shares else 2)
    kept += decoder.keeps(part) + critic.keeps(part) + pictures
    most = max(student.works(part), decoder.works(part), critic.works(part), guiding)
    found["generator"] = TERMS * gradients, kept + most + run.unpacked
    found["score"] = gradients, student.holds(part) + run.unpacked + pictures
    heads = run.discriminator(learns=True)
    judging = heads.keeps(part, graphs=2) + heads.works(part)
    found["discriminator"] = head_gradients, judging + pictures
    if plan.joint_train_steps:
        graphs, prompts = plan.preference_timesteps, plan.preferring
        kept = student.keeps(prompts, graphs, casts=1 if shares else graphs)
        most = max(student.works(prompts), run.teacher.holds(prompts))
        found["preference"] = gradients, kept + most + run.unpacked
    return found


def weight_bytes(network: nn.Module, dtype: torch.dtype | None = None, kind: Kind = "none") -> int:
    """Bytes of parameters and buffers, held as `dtype` (None: as they are) or quantised."""
    packed = {}
    if kind != "none":
        packed = {id(m.weight): quantised_bytes(m, kind) for m in linears(network)}
    total = 0
    for t in (*network.parameters(), *network.buffers()):
        size = dtype.itemsize if dtype and t.is_floating_point() else t.element_size()
        total += packed.get(id(t), t.numel() * size)
    return total


def linears(network: nn.Module) -> list[nn.Linear]:
    return [m for m in network.modules() if type(m) is nn.Linear]


@cache
def adapter_numbers(denoiser: nn.Module, rank: int, layers: tuple[str, ...]) -> list[int]:
    """Numbers of each parameter of a LoRA."""
    network = passes.adapted(denoiser, rank, layers)
    return [p.numel() for p in network.parameters() if p.requires_grad]


def feature_head(denoiser: nn.Module, side: int) -> nn.Module:
    """DMD2's head, of the sizes of the denoiser's middle."""
    config: Any = denoiser.config
    if levels := config.get("block_out_channels"):
        channels, size = levels[-1], side // 2 ** (len(levels) - 1)
    else:
        patch = 2 if config.get("axes_dims_rope") else config.patch_size  # FLUX packs 2 x 2
        channels, size = config.num_attention_heads * config.attention_head_dim, side // patch
    with torch.device("meta"):
        return FeatureHead(channels, size)
