"""A class for every pixel: what a segmentation network is trained for, and how good it is.

    image (C, H, W)  ->  logits (classes, H, W)        target uint8 (H, W), 255: does not count

Logits of another size than the target, as those of local heads on smaller maps, are resized to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base.errors import ConfigError
from pipeline.base.flow import TensorSpec
from pipeline.local.task import Metric, Task
from pipeline.models.heads import AuxiliaryHead, FeatureShape, TaskHead
from pipeline.models.losses import full

IGNORED = 255
"""The label of pixels that do not count, of Cityscapes and others."""


def resized(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (B, classes, h, w) at the size of the target (B, H, W): bilinear, corners aligned (InfoPro's code)."""
    size = target.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def _confusion(logits: Tensor, target: Tensor) -> Tensor:
    """int64 (classes^2,): pixels of class i that are taken for class j, at i classes + j."""
    classes = logits.size(1)
    found = resized(logits, target).argmax(dim=1)
    cells = torch.where(target == IGNORED, classes**2, target.long() * classes + found)
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=cells.device)  # bincount makes the host wait
    return counts.scatter_add_(0, cells.flatten(), counts.new_ones(()).expand(cells.numel()))[: classes**2]


def _mean_iou(counts: Tensor, _rows: int) -> float:
    """Percent; the mean over the classes that are there, or are taken to be."""
    table = counts.view(math.isqrt(len(counts)), -1).double()
    both = table.diagonal()
    union = table.sum(0) + table.sum(1) - both
    there = union > 0
    return 100.0 * float((both[there] / union[there]).mean()) if there.any() else 0.0


MEAN_IOU = Metric("mean_iou_pct", "mean IoU", _confusion, _mean_iou, unit="%", better="higher")
"""Intersection over union of a class, over the whole test set, averaged over the classes."""


class Segmentation(Task):
    """One class per pixel: logits (B, classes, H, W) against uint8 (B, H, W) by cross-entropy, mean over the pixels
    that count; a patch without any has loss 0. ``image_shape`` is that of the images that are trained on."""

    @property
    def target(self) -> TensorSpec:
        return TensorSpec(self.image_shape[1:], torch.uint8)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.classes, *self.image_shape[1:])

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (MEAN_IOU,)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            logits, wanted = resized(full(output), target), target.long()
            total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
            return total / (target != IGNORED).sum().clamp(min=1)

    def head(self, shape: FeatureShape, pooled: Callable[[FeatureShape], nn.Sequential] | None = None) -> AuxiliaryHead:
        if len(shape) != 3:
            raise ConfigError(
                f"a class for every pixel needs maps (C, H, W), but a local module ends in {shape}; cut elsewhere"
            )
        return TaskHead(nn.Conv2d(shape[0], self.classes, 1), self.loss)
