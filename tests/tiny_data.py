"""What a run of real models is given beside its pipeline: pictures with captions, a SAM. Tiny."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import SamVisionConfig, SamVisionModel

CAPTIONS = ("a red apple", "two small hearts", "a ship at sea", "a grey cat")


def pictures(folder: Path, size: tuple[int, int], n: int = len(CAPTIONS)) -> Path:
    """`n` pictures of noise, `size` wide and high, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(size)
    for i in range(n):
        name = f"{size[0]}x{size[1]}-{i}"
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{CAPTIONS[i % len(CAPTIONS)]} {name}")
    return folder


def sam(folder: Path) -> Path:
    """Two blocks, the second of global attention; every weight is drawn."""
    torch.manual_seed(0)
    network = SamVisionModel(
        SamVisionConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            window_size=3,
            global_attn_indexes=[1],
            mlp_dim=24,
            output_channels=8,
            num_pos_feats=4,
        )
    )
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    network.save_pretrained(folder)
    return folder
