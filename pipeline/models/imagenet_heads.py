"""Auxiliary heads for images of ImageNet's size (released code of InfoPro and HPFF): a head that classifies behind four
convolutions, and a decoder that reaches the image in steps.

    feature (C, H/s, W/s) of images (3, H, W)            w = 12 (InfoPro), 16 (HPFF); -> is convolution, BatchNorm, ReLU
    s = 4       -> 128,         H/2 -> w,  H -> 3        (all 3x3 but the first, which is 1x1; the last is bare)
    s = 8       -> 128, H/4 -> 32, H/2 -> w,  H -> 3
    s = 16      -> 128, H/2 -> 64, H/4 -> 32, H/2 -> 16, H -> 3          as published, back to H/4

Any other s has the decoder of the next larger one of these; more than 16, that of 16.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import losses
from pipeline.models.heads import IMAGE, AuxiliaryHead, FeatureShape, Given
from pipeline.models.layers import PoolTo2d

FIRST_WIDTH = 128  # of both; the head of a feature with more than 512 channels has a quarter of them
HEAD_WIDTHS = (256, 512, 2048)
LAST_WIDTHS = {"imagenet": 12, "imagenet-hpff": 16}
"""Of ``method.decoder``: w."""


def imagenet_head(shape: FeatureShape, out: int) -> nn.Sequential:
    """1x1 convolution to 128 (of 1024 channels to 256), 3x3 of stride 2 to 256, 3x3 of stride 2 to 512, 1x1 to 2048,
    each without bias and with BatchNorm and ReLU; global pool, linear to ``out``.

    Args:
        shape: (C, H, W).
    """
    channels = shape[0]
    first = max(FIRST_WIDTH, channels // 4)
    layers: list[nn.Module] = []
    forms = zip((first, *HEAD_WIDTHS), (1, 3, 3, 1), (1, 2, 2, 1), strict=True)
    for width, kernel, stride in forms:
        layers += [
            nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers, PoolTo2d(1), nn.Flatten(), nn.Linear(channels, out))


class StepwiseDecoderHead(AuxiliaryHead):
    """InfoPro's reconstruction for large images: a 1x1 convolution, then by turns a resize (bilinear, corners aligned)
    and a 3x3 convolution, BatchNorm and ReLU behind all but the last; binary cross-entropy against the image.

    Args:
        channels: of the feature.
        image_channels: of the image.
        stride: sides of the image over those of the feature.
        last_width: w, see above.
    """

    asks = frozenset({IMAGE})

    def __init__(self, channels: int, image_channels: int, stride: float, last_width: int) -> None:
        super().__init__()
        steps = steps_of(stride, last_width)
        self._divisors = [divisor for divisor, _ in steps] + [1]
        widths = [FIRST_WIDTH, *(width for _, width in steps)]
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            kernel = 1 if index == 0 else 3
            layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(True)]
            channels = width
        self.decoder = nn.Sequential(*layers, nn.Conv2d(channels, image_channels, 3, padding=1))

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        image = given.image
        assert image is not None
        divisors = iter(self._divisors)
        x = feature
        for layer in self.decoder:
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                divisor = next(divisors)
                size = max(image.size(2) // divisor, 1), max(image.size(3) // divisor, 1)
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
            x = layer(x)
        return losses.reconstruction(x, image)


def steps_of(stride: float, last_width: int) -> list[tuple[int, int]]:
    """(sides of the image over those that are resized to, width of the convolution then), without the last one."""
    if stride <= 4:
        return [(2, last_width)]
    if stride <= 8:
        return [(4, 32), (2, last_width)]
    return [(2, 64), (4, 32), (2, 16)]
