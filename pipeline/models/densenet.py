"""DenseNet-BC for images of CIFAR's size (Huang et al. 2017, "Densely Connected Convolutional Networks", sec. 3).

    stem -> dense1.0 .. dense1.15 -> transition1 -> dense2.0 .. -> transition2 -> dense3.0 .. -> classifier

    block dense1.n   (B, C, H, W) --BatchNorm, ReLU, 1x1 to 4k, BatchNorm, ReLU, 3x3 to k--> (B, k, H, W)
                          |_______________________________________________________ beside it --> (B, C + k, H, W)

k is the growth rate. "B" is the 1x1 convolution before every 3x3 one, "C" the transitions, which halve the channels.
Every layer is a block: what flows at a cut is the concatenation of all that the layers behind it see.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pipeline.models.backbones import BackboneFunction, Blocks, register_backbone

BOTTLENECK = 4


class DenseLayer(nn.Module):
    """``(B, in, H, W) -> (B, in + growth, H, W)``: what came in, and ``growth`` new maps of it."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        hidden = BOTTLENECK * growth
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, growth, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu(self.bn1(x)))
        new = self.conv2(self.relu(self.bn2(new)))
        return torch.cat([x, new], dim=1)


def densenet_bc(depth: int, growth: int) -> BackboneFunction:
    """The CIFAR DenseNet-BC of ``depth = 6 n + 4`` layers: 3 dense blocks of n layers, with ``growth`` maps each."""
    layers = (depth - 4) // 6

    def build(in_channels: int, classes: int) -> Blocks:
        channels = 2 * growth
        blocks: Blocks = OrderedDict(stem=nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False))
        for stage in (1, 2, 3):
            for index in range(layers):
                blocks[f"dense{stage}.{index}"] = DenseLayer(channels, growth)
                channels += growth
            if stage < 3:
                blocks[f"transition{stage}"] = nn.Sequential(
                    OrderedDict(
                        bn=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(inplace=True),
                        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2),
                    )
                )
                channels //= 2
        blocks["classifier"] = nn.Sequential(
            OrderedDict(
                bn=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(channels, classes),
            )
        )
        return blocks

    return build


register_backbone("densenet-bc-100-12", densenet_bc(100, 12))
