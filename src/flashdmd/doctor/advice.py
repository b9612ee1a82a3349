"""What a run fits on, what to change for a smaller card, and the table of its memory."""

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from flashdmd.doctor.estimate import CARDS, GB, Estimate, Networks, Plan, estimate

COLUMNS = ("parameters", "weights", "gradients", "moments", "activations")
WORTH = 0.01  # of the peak: what a change has to save to be proposed
RANK = 64  # [DEF] of the LoRA that is proposed: DMD2's


def advice(networks: Networks, plan: Plan) -> Iterator[str]:
    """Which cards a run fits on, and what to change for a smaller one, cheapest first.

    Each change comes on top of those before it, and what it saves is the difference between two
    estimates. What saves less than a hundredth is left out, and tried again after the next.
    """
    now = estimate(networks, plan)
    yield f"{gb(now.peak)} at the peak, in the {now.fullest} update: {fitting(now)}"
    while step := cheapest(networks, now):
        then, words, cost = step
        saved = gb(now.peak - then.peak)
        yield f"{words}: {saved} less, {gb(then.peak)}, {fitting(then)}. {cost}"
        now = then


def cheapest(networks: Networks, now: Estimate) -> tuple[Estimate, str, str] | None:
    """The first change that saves something; none when all are made."""
    for change, words, cost in changes(networks, now.plan):
        then = estimate(networks, replace(now.plan, **change))
        if now.peak - then.peak >= WORTH * now.peak:
            return then, words, cost
    return None


def changes(networks: Networks, plan: Plan) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(fields of the plan, keys of the recipe, what it costs), as far as they change anything."""
    if not plan.cache_text_embeddings and networks.parts.text_encoders:
        yield (
            {"cache_text_embeddings": True},
            "data.cache_text_embeddings=true",
            "Costs disk: the text encoders are let go once every prompt is encoded.",
        )
    if plan.frozen_dtype == "fp32":
        yield (
            {"frozen_dtype": "bf16"},
            "model.frozen_dtype=bf16",
            "Costs little: what does not learn is rounded, as autocast rounds it anyway.",
        )
    if not plan.gradient_checkpointing:
        yield (
            {"gradient_checkpointing": True},
            "train.gradient_checkpointing=true",
            "Costs about a third of the time: activations are computed again.",
        )
    parts = math.gcd(plan.train_batch_size, plan.preference_batch_size)
    if parts > plan.gradient_accumulation_steps:
        yield (
            {"gradient_accumulation_steps": parts},
            f"train.gradient_accumulation_steps={parts}",
            "Costs time: the same batch in more, smaller parts.",
        )
    if not plan.use_8bit_adam:
        yield (
            {"use_8bit_adam": True},
            "train.use_8bit_adam=true",
            "Costs moments of 8 bits (pip install flashdmd[quant]).",
        )
    crop = (plan.resolution or networks.parts.resolution) // networks.parts.factor // 2
    if plan.arm == "flash-dmd" and (plan.crop is None or plan.crop > crop):
        yield (
            {"crop": crop},
            f"discriminator.crop={crop}",
            "Costs the discriminator's view: a random quarter of each picture.",
        )
    if plan.ema_decay:
        yield {"ema_decay": 0.0}, "train.ema_decay=0", "Costs the average over updates."
    if not plan.rank:
        yield (
            {"rank": RANK},
            f"lora.rank={RANK}",
            "Costs freedom: adapters on one frozen network in place of copies of it.",
        )
    for kind in ("int8", "nf4"):
        if plan.quantize_base == "none" or (plan.quantize_base, kind) == ("int8", "nf4"):
            yield (
                {"quantize_base": kind},
                f"model.quantize_base={kind}",
                "Costs the teacher's exactness: it is the quantised one (flashdmd[quant]).",
            )


def fitting(found: Estimate) -> str:
    cards = found.cards
    return f"fits a card of {cards[0]} GB" if cards else f"fits no card of {CARDS[-1]} GB"


def table(found: Estimate, width: int = 120) -> str:
    """Network by network, update by update, and the cards that the whole of it fits on."""
    memory = Table("", "network", *(Column(c, justify="right") for c in COLUMNS))
    for r in found.rows:
        sizes = r.weights, r.gradients, r.moments, r.activations
        memory.add_row(r.role, r.network, count(r.numbers), *map(gb, sizes))
    memory.add_section()
    memory.add_row("stays", "", "", gb(found.weights), "", gb(found.moments), "")
    for name, (gradients, activations) in found.updates.items():
        memory.add_row(f"{name} update", "", "", "", gb(gradients), "", gb(activations))
    memory.add_section()
    memory.add_row("peak", f"{found.fullest} update", "", gb(found.peak), "", "", "")
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(memory)
    for note in found.notes:
        console.print(note)
    marks = (f"{card} {'yes' if card in found.cards else 'no'}" for card in CARDS)
    console.print(f"Fits a card of so many GB: {', '.join(marks)}")
    return out.getvalue()


def count(numbers: int) -> str:
    """How many parameters, to three figures or so."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if numbers >= unit:
            return f"{numbers / unit:.2f} {name}"
    return str(numbers)


def gb(size: int) -> str:
    """Bytes as a person reads them, in the gigabytes of cards."""
    for unit, name in ((GB, "GB"), (2**20, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1024:.1f} KB" if size else "-"
