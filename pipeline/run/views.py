"""Several views of a test image, in other sizes and mirrored: the class probabilities of every pixel are averaged.

    image  -> 0.5, 0.75, 1.0 ... x its size, each also mirrored  -> network -> probabilities, back to the image's size
                                                                               and side -> mean
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.base.data_config import DataConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, Tensors
from pipeline.local.local_module import LocalModule
from pipeline.local.segmentation import Segmentation, resized
from pipeline.local.task import Task

View = tuple[float, bool]
"""Size in relation to the image, and whether it is mirrored."""
ONE: tuple[View, ...] = ((1.0, False),)
DIVISOR = 8  # of the sides of scaled images: the strides of networks


def views_of(config: DataConfig, task: Task) -> tuple[View, ...]:
    """What ``data.test_scales`` and ``data.test_flip`` ask for.

    Raises:
        ConfigError: more than one view for a task without a class for every pixel.
    """
    views = tuple(itertools.product(config.test_scales, (False, True) if config.test_flip else (False,)))
    if views != ONE and not isinstance(task, Segmentation):
        raise ConfigError(
            f"data.test_scales and data.test_flip are for classes of pixels, not for {type(task).__name__}; remove them"
        )
    return views


def outputs_of(
    modules: Sequence[LocalModule], inputs: Tensors, target: Tensor, views: Sequence[View] = ONE
) -> Iterator[dict[str, Tensor]]:
    """The outputs (B, ...) of the exits of every module, by level, one module after another; of several views the
    logarithms of the mean class probabilities (B, classes, H, W) of the target (B, H, W)."""
    if views == ONE:
        for module in modules:
            inputs, outputs = module.evaluate(inputs)
            yield outputs
        return
    sums: list[dict[str, Tensor]] = [{} for _ in modules]
    for scale, mirrored in views:
        seen = _scaled(inputs[MAIN], scale)
        seen = seen.flip(-1) if mirrored else seen
        for total, outputs in zip(sums, outputs_of(modules, {MAIN: seen}, target), strict=True):
            for level, output in outputs.items():
                likely = resized(output.float(), target).softmax(dim=1)
                likely = likely.flip(-1) if mirrored else likely
                total[level] = total[level] + likely if level in total else likely
    yield from ({level: (total / len(views)).log() for level, total in by_level.items()} for by_level in sums)


def _scaled(image: Tensor, scale: float) -> Tensor:
    """(B, C, H, W) with sides that are multiples of DIVISOR; scale 1: as it is."""
    if scale == 1.0:
        return image
    height, width = (max(round(side * scale / DIVISOR), 1) * DIVISOR for side in image.shape[-2:])
    scaled = F.interpolate(image.float(), size=(height, width), mode="bilinear", align_corners=False)
    return torch.empty_like(scaled, dtype=image.dtype).copy_(scaled)
