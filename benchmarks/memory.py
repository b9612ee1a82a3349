"""Peak memory of LoRA, of full fine-tuning, and of LoRA on four copies: docs/evidence/memory.md.

    python benchmarks/memory.py [--width 192]

One process, one UNet of Stable Diffusion's shape with random weights, stage 2 with a reference and
a latent reward model. Peak: bytes of tensors, weights and optimizers included, at the fullest
moment of a distilling and a preference update, counted storage by storage (flashdmd.memory). Four
copies: what loading the model for teacher, student, score estimator and reference each comes to.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import families as rows  # noqa: E402
import tiny_export  # noqa: E402

from flashdmd import session  # noqa: E402
from flashdmd.algorithm import split  # noqa: E402
from flashdmd.config import Recipe  # noqa: E402
from flashdmd.doctor.advice import gb  # noqa: E402
from flashdmd.memory import held, peak_memory  # noqa: E402
from flashdmd.models import latent_reward  # noqa: E402
from flashdmd.models.denoiser import AdapterDenoiser  # noqa: E402
from flashdmd.session import Session, open_session  # noqa: E402

OUTPUT = ROOT / "docs/evidence/memory.md"
MODES = {
    "LoRA, one base": {"lora": {"rank": 16}},
    "LoRA, one base, checkpointing": {
        "lora": {"rank": 16},
        "train": {"gradient_checkpointing": True},
    },
    "LoRA, one base in bf16, checkpointing": {
        "lora": {"rank": 16},
        "train": {"gradient_checkpointing": True},
        "model": {"frozen_dtype": "bf16"},
    },
    "LoRA, four copies": {"lora": {"rank": 16}},
    "full fine-tuning": {},
    "full fine-tuning, checkpointing": {"train": {"gradient_checkpointing": True}},
}


class Alone(AdapterDenoiser):
    """An adapter whose network is a copy of its own."""

    def twin(self, name: str) -> "Alone":
        network = copy.deepcopy(self.network)
        for module in network.modules():
            for part in ("lora_A", "lora_B"):
                if self.name and self.name in getattr(module, part, {}):
                    module.delete_adapter(self.name)
                    break
        other = Alone(network, self.family, self.process, self.adapter, name)
        if self.name is not None:
            other.take(self)
        return other


def folder_of(width: int, where: Path) -> Path:
    """A StableDiffusionPipeline whose UNet is as SD 1.5's, at this width instead of 320."""
    torch.manual_seed(0)
    made = tiny_export.sd1(block_out_channels=(width, 2 * width, 4 * width))
    made.save_pretrained(where / "teacher")
    rows.pictures(where / "pictures")
    base = latent_reward.open_base(str(where / "teacher"))
    latent_reward.write(latent_reward.build(base, str(where / "teacher")), where / "reward")
    return where


def opened(where: Path, mode: dict[str, Any]) -> Session:
    content: dict[str, Any] = {
        "model": {
            "pretrained_model_name_or_path": str(where / "teacher"),
            "reward_model_name_or_path": str(where / "reward"),
        },
        "data": {"train_data_dir": str(where / "pictures"), "resolution": 4 * tiny_export.SIDE},
        "method": {
            **split((999, 749, 499, 249)),
            "gan_gradient_ratio": None,
            "ttur": 1,
            "preferences_per_distillation": 1,
        },
        "train": {
            "max_train_steps": 1,
            "joint_train_steps": 1,
            "train_batch_size": 1,
            "preference_batch_size": 1,
            "ema_decay": 0.0,
        },
        "discriminator": {"width": 8},
        "output_dir": str(where / "out"),
    }
    merged = {k: {**content.get(k, {}), **v} for k, v in mode.items()}
    return open_session(Recipe.model_validate(content | merged))


def measured(where: Path, name: str, mode: dict[str, Any]) -> tuple[int, int]:
    """(bytes that stay, bytes at the peak)."""
    if name == "LoRA, four copies":
        session.AdapterDenoiser = Alone  # type: ignore[misc]
    run = opened(where, mode)
    session.AdapterDenoiser = AdapterDenoiser  # type: ignore[misc]
    trainer = run.trainer("joint")
    for _ in trainer.order:  # now every optimizer has its moments
        trainer.iterate()
    algorithm: Any = trainer.algorithm
    denoisers = [run.teacher.denoiser, run.generator, run.score, run.student, algorithm.reference]
    networks: list[nn.Module] = [d.network for d in denoisers]
    parts = [p for p in run.teacher.pipeline.components.values() if isinstance(p, nn.Module)]
    parts.remove(run.teacher.denoiser.network)
    learners = [learner.optimizer for learner in trainer.learners.values()]
    things = [*networks, *parts, run.discriminator, run.reward, *learners]

    def period() -> None:
        for _ in trainer.order:
            trainer.iterate()

    return held(*things), peak_memory(period, things)


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--width", type=int, default=192)
    width = asked.parse_args().width
    found: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        where = folder_of(width, Path(folder))
        for name, mode in MODES.items():
            found[name] = measured(where, name, mode)
            print(name, *map(gb, found[name]), flush=True)
        unet = tiny_export.sd1(block_out_channels=(width, 2 * width, 4 * width)).unet
    numbers = sum(p.numel() for p in unet.parameters())
    first = found["LoRA, one base"][1]
    lines = [
        f"| {name} | {gb(stays)} | {gb(peak)} | {peak / first:.2f} |"
        for name, (stays, peak) in found.items()
    ]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(
        "# Peak memory of a run\n\nMade by `python benchmarks/memory.py`, which says what is "
        f"counted. A UNet of {numbers / 1e6:.0f} M parameters, a picture at a time, rank 16.\n\n"
        "| | weights and moments | peak | to LoRA |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    print(f"Wrote {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
