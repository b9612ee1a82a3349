"""The encoder half of a UNet as the trunk of a latent reward model."""

import copy

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from flashdmd.errors import UserError

UNKNOWN = ("class_embedding", "encoder_hid_proj", "time_embed_act")  # nothing here has or feeds one


class EncoderHalf(nn.Module):
    """(x_t, t, tokens) -> the last map of each level and the middle's; copies `unet`'s weights.

    SDXL's is fed the `pooled` feature as well, and the size of the picture, whole and uncropped, of
    which a latent place is `pixels` across.
    """

    def __init__(self, unet: UNet2DConditionModel, pixels: int = 8) -> None:
        super().__init__()
        if odd := [name for name in UNKNOWN if getattr(unet, name, None) is not None]:
            raise UserError(f"a UNet with {odd[0]} cannot be the trunk of a latent reward model")
        self.pixels = pixels
        self.time_proj: nn.Module = copy.deepcopy(unet.time_proj)
        self.time_embedding: nn.Module = copy.deepcopy(unet.time_embedding)
        words = copy.deepcopy(unet.add_embedding) if hasattr(unet, "add_embedding") else None
        self.add_embedding: nn.Module | None = words  # the words as a whole, where the UNet has it
        sizes = copy.deepcopy(unet.add_time_proj) if hasattr(unet, "add_time_proj") else None
        self.add_time_proj: nn.Module | None = sizes
        self.conv_in: nn.Module = copy.deepcopy(unet.conv_in)
        self.down_blocks: nn.ModuleList = copy.deepcopy(unet.down_blocks)
        self.mid_block: nn.Module = copy.deepcopy(unet.mid_block)
        widths = list(unet.config.block_out_channels)
        self.channels = [*widths, widths[-1]]

    def forward(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        tokens: Float[Tensor, "B L D"],
        pooled: Float[Tensor, "B P"] | None = None,
    ) -> list[Tensor]:
        time = self.time_embedding(self.time_proj(t).to(x_t.dtype))
        if self.add_embedding is not None:
            time = time + self.add_embedding(*self.whole(x_t, tokens, pooled))
        x, maps = self.conv_in(x_t), []
        for block in self.down_blocks:
            has_text = getattr(block, "has_cross_attention", False)
            text = {"encoder_hidden_states": tokens} if has_text else {}
            x, skips = block(hidden_states=x, temb=time, **text)
            # the last map before the level is left: what the decoder half would be handed
            maps.append(skips[-2] if block.downsamplers is not None else skips[-1])
        maps.append(self.mid_block(x, time, encoder_hidden_states=tokens))
        return maps

    def whole(self, x_t: Tensor, tokens: Tensor, pooled: Tensor | None) -> tuple[Tensor]:
        """What the time is told of the words: all of them, or their pooled feature and the size."""
        if self.add_time_proj is None:
            return (tokens,)
        assert pooled is not None
        size = [self.pixels * side for side in x_t.shape[-2:]]
        ids = torch.tensor([*size, 0, 0, *size], device=x_t.device).repeat(len(x_t))
        sizes = self.add_time_proj(ids).unflatten(0, (len(x_t), -1)).flatten(1)
        return (torch.cat([pooled, sizes.to(pooled.dtype)], dim=1),)
