"""D_omega: a frozen vision backbone, and a small trained head on each level of its features."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, fewer where one would have less than 4 channels.

    A group of one channel on a 1 x 1 map is its own mean: always zero, and the head is dead.
    """
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class Head(nn.Module):
    """Strided convolutions while the map is larger than 4, one plain one, average, one logit.

    ADM's pixel discriminator (arXiv 2507.18569): Conv4 s2 - GroupNorm - SiLU, Conv3 - GroupNorm -
    SiLU, pooling, Linear. SAM's maps of 64 get three strided ones, the paper's number; the small
    maps of small pictures get fewer, so `size` decides: the shorter side of the maps. Later maps
    may have any sides down to half of it.
    """

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        strided = 0
        while size > 4 and strided < 3:
            layers += [nn.Conv2d(channels, width, 4, 2, 1), group_norm(width), nn.SiLU()]
            channels, size, strided = width, size // 2, strided + 1
        layers += [nn.Conv2d(channels, width, 3, 1, 1), group_norm(width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.logit = nn.Linear(width, 1)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1"]:
        logit: Tensor = self.logit(self.body(features).mean((2, 3)))
        return logit


class Discriminator(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> (B, K) logits, one for each level of the backbone.

    The backbone is frozen and never switched to training mode; gradients pass through it to the
    images and stop at its weights. `image_size`, a side or (height, width) in pixels, settles how
    deep the heads are; the images of a batch may have other sides, down to half of the shorter one.
    """

    def __init__(
        self, backbone: nn.Module, image_size: int | tuple[int, int], width: int = 256
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        device = next(backbone.parameters()).device
        with torch.no_grad():
            levels = backbone(torch.zeros(1, 3, *size, device=device))
        self.heads = nn.ModuleList(Head(f.shape[1], min(f.shape[2:]), width) for f in levels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        return self.logits(self.backbone(images))

    def logits(self, levels: Sequence[Tensor]) -> Float[Tensor, "B K"]:
        """What the heads make of the backbone's maps."""
        return torch.cat([h(f) for h, f in zip(self.heads, levels, strict=True)], dim=1).float()

    def train(self, mode: bool = True) -> "Discriminator":
        super().train(mode)
        self.backbone.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "Discriminator":
        """Switches the heads; the backbone stays frozen."""
        self.heads.requires_grad_(requires_grad)
        return self


class FeatureHead(nn.Module):
    """DMD2's head on a bottleneck (B, C, H, W): strided convolutions to 1 x 1, one logit."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while size > 1:
            stride = 4 if size == 4 else 2  # DMD2: 4 x 4 closes with one stride-4 convolution
            kernel, padding = (4, 0) if stride == 4 else (4, 1)
            layers += [
                nn.Conv2d(channels, channels, kernel, stride, padding),
                group_norm(channels),
                nn.SiLU(),
            ]
            size //= stride
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1"]:
        logit: Tensor = self.body(features).flatten(1)
        return logit.float()
