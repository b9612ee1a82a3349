"""Z-Image: one stream of picture and words, as Qwen3 reads them; it counts time from noise."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdmd.models.families.base import ATTENTION, Family
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS

WORDS = 512  # tokens of a prompt, the pipeline's default
PATCH = 2


class ZImage(Family):
    """What it says is x_0 - eps. The pipeline's guidance_scale is one less than ours."""

    pipelines = ("ZImagePipeline",)
    guidance = 5.0  # 4 in the pipeline's words
    lora_layers = (*ATTENTION, "w1", "w2", "w3")

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        said, _ = pipeline.encode_prompt(list(prompts), device, False)  # it writes into the list
        words = torch.stack([F.pad(s, (0, 0, 0, WORDS - len(s))) for s in said])
        return {"words": words, "lengths": torch.tensor([len(s) for s in said], device=device)}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        lengths = cond["lengths"].tolist()
        words = [w[:n] for w, n in zip(cond["words"], lengths, strict=True)]
        frames = list(x_t.unsqueeze(2))  # (C, 1, h, w) each
        out = network(frames, (STEPS - t) / STEPS, words, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def middle(self, network: nn.Module) -> nn.Module:
        blocks = network.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleList)
        return blocks[len(blocks) // 2]

    def feature(self, answer: Any, x_t: Tensor, network: nn.Module) -> Tensor:
        h, w = x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH
        tokens: Tensor = answer[:, : h * w]  # the words come after the picture
        return tokens.transpose(1, 2).unflatten(2, (h, w))

    def multiple(self, pipeline: Any) -> int:
        return PATCH * self.factor(pipeline)

    def resolution(self, pipeline: Any) -> int:
        return 1024  # the pipeline's own default

    def guided_call(self, pipeline: Any, guidance: float, n: int) -> dict[str, Any]:
        return {"guidance_scale": max(guidance - 1, 0.0)}
