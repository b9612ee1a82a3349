"""The encoder half of a UNet as the trunk of a latent reward model."""

import copy

from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class EncoderHalf(nn.Module):
    """(x_t, t, tokens) -> the last map of each level and the middle's; copies `unet`'s weights."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.time_proj: nn.Module = copy.deepcopy(unet.time_proj)
        self.time_embedding: nn.Module = copy.deepcopy(unet.time_embedding)
        words = copy.deepcopy(unet.add_embedding) if hasattr(unet, "add_embedding") else None
        self.add_embedding: nn.Module | None = words  # the words as a whole, where the UNet has it
        self.conv_in: nn.Module = copy.deepcopy(unet.conv_in)
        self.down_blocks: nn.ModuleList = copy.deepcopy(unet.down_blocks)
        self.mid_block: nn.Module = copy.deepcopy(unet.mid_block)
        widths = list(unet.config.block_out_channels)
        self.channels = [*widths, widths[-1]]

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> list[Tensor]:
        time = self.time_embedding(self.time_proj(t).to(x_t.dtype))
        if self.add_embedding is not None:
            time = time + self.add_embedding(tokens)
        x, maps = self.conv_in(x_t), []
        for block in self.down_blocks:
            has_text = getattr(block, "has_cross_attention", False)
            text = {"encoder_hidden_states": tokens} if has_text else {}
            x, skips = block(hidden_states=x, temb=time, **text)
            # the last map before the level is left: what the decoder half would be handed
            maps.append(skips[-2] if block.downsamplers is not None else skips[-1])
        maps.append(self.mid_block(x, time, encoder_hidden_states=tokens))
        return maps
