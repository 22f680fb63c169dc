"""The auxiliary head of a dense task, one output per pixel (released code of InfoPro for Cityscapes).

    feature (C, h, w) -> 3x3 convolution to C/2, BatchNorm, ReLU -> dropout of whole channels, 0.1 -> 1x1 to classes
                      -> resize (bilinear, corners aligned) to the target (H, W)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.heads import AuxiliaryHead, FeatureShape, Given, Loss

DROPOUT = 0.1


class FcnHead(AuxiliaryHead):
    """See above; trained by the loss of the task.

    Args:
        shape: (C, h, w) of the feature.
        output_shape: (classes, H, W) of the task.
        loss: of the task.
    """

    def __init__(self, shape: FeatureShape, output_shape: tuple[int, ...], loss: Loss) -> None:
        super().__init__()
        channels, classes = shape[0], output_shape[0]
        width = max(channels // 2, 1)
        self.head = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(width, classes, 1),
        )
        self._scale = output_shape[1] / shape[1], output_shape[2] / shape[2]
        self._loss = loss

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        height, width = given.target.shape[-2:]
        return self._loss(self._scores(feature, (height, width)), given.target)

    def logits(self, feature: Tensor) -> Tensor:
        rows, columns = (round(side * scale) for side, scale in zip(feature.shape[2:], self._scale, strict=True))
        return self._scores(feature, (rows, columns))  # images of an evaluation may be larger

    def _scores(self, feature: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(self.head(feature), size=size, mode="bilinear", align_corners=True)
