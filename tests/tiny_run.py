"""Recipes of short runs of stage 1 on a tiny teacher and the embedded pictures."""

from pathlib import Path
from typing import Any

import yaml

NUMBERS = {"joint_train_steps": 0, "device": "cpu", "mixed_precision": "no"}


def recipe(teacher: Path, output: Path, train: dict[str, Any], **sections: Any) -> Path:
    """The YAML of a run to `output`, beside it."""
    model = {"pretrained_model_name_or_path": str(teacher), "reward_model_name_or_path": None}
    content = {"model": model, "train": NUMBERS | train, "output_dir": str(output), **sections}
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
