"""The first three quarters of an MMDiT as the trunk of a latent reward model."""

import copy

from diffusers import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class EarlyBlocks(nn.Module):
    """(x_t, t, tokens, pooled) -> the image's tokens after `depth` blocks, as the one map.

    LPO reads block 18 of Stable Diffusion 3's 24; of other depths the share is kept. Copies the
    weights of `transformer`.
    """

    def __init__(self, transformer: SD3Transformer2DModel, depth: int | None = None) -> None:
        super().__init__()
        blocks = transformer.transformer_blocks
        self.pos_embed: nn.Module = copy.deepcopy(transformer.pos_embed)
        self.time_text_embed: nn.Module = copy.deepcopy(transformer.time_text_embed)
        self.context_embedder: nn.Module = copy.deepcopy(transformer.context_embedder)
        kept = blocks[: depth or max(1, len(blocks) * 3 // 4)]
        self.transformer_blocks: nn.ModuleList = copy.deepcopy(kept)
        self.patch = int(transformer.config.patch_size)
        self.channels = [int(transformer.inner_dim)]
        self.gradient_checkpointing = False  # set as diffusers' blocks' is

    def forward(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        tokens: Float[Tensor, "B L D"],
        pooled: Float[Tensor, "B P"],
    ) -> list[Tensor]:
        x, time = self.pos_embed(x_t), self.time_text_embed(t, pooled)
        words = self.context_embedder(tokens)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing:
                words, x = checkpoint(block, x, words, time, use_reentrant=False)
            else:
                words, x = block(x, words, time)
        return [x.transpose(1, 2).unflatten(2, (x_t.shape[-2] // self.patch, -1))]
