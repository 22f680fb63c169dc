"""Mixup and CutMix: every image of a batch with the one before it, and the classes of both in the same shares.

    mixup    lambda x_i + (1 - lambda) x_(i-1)                       lambda from Beta(alpha, alpha), one per batch
    CutMix   x_i with a box of x_(i-1), 1 - lambda of its area       (Zhang et al. 2018; Yun et al. 2019)

torchvision's transforms do it; what they draw comes from a hash of (seed, epoch, batch) in place of torch's random
numbers, which are global to the process and belong to the local modules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.base.data_config import DataConfig
from pipeline.base.numerics import stable_hash

Mixing = Callable[[Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]


class Mixer:
    """Mixes training batches as ``data.mixup`` and ``data.cutmix`` say; with both, each of half of the batches."""

    def __init__(self, config: DataConfig, classes: int, seed: int) -> None:
        self._alphas = (("mixup", config.mixup), ("cutmix", config.cutmix))
        self._classes = classes
        self._seed = seed

    @property
    def mixes(self) -> bool:
        """Whether there is anything to do; else labels stay what they are."""
        return any(alpha > 0 for _, alpha in self._alphas)

    def needed(self, batch: Tensor, rows: slice) -> Tensor:
        """Of the samples of a batch, int64 (N,), those that ``rows`` of it are made of: the one before them as well, so
        that replicas make the same of their parts of a batch."""
        return torch.cat([batch[rows.start - 1 :][:1], batch[rows]]) if self.mixes else batch[rows]

    def train(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """The samples of :meth:`needed`, uint8 (1 + B, C, H, W), int64 (1 + B,) -> uint8 (B, C, H, W), float32
        (B, classes). Where nothing is mixed they stay what they are."""
        if not self.mixes:
            return images, labels
        draws = numpy.random.default_rng(stable_hash(self._seed, "mix", epoch, batch))
        kinds = [(name, alpha) for name, alpha in self._alphas if alpha > 0]
        name, alpha = kinds[int(draws.integers(len(kinds)))]
        share = float(draws.beta(alpha, alpha))
        transform = _transform(name, self._classes)
        if name == "mixup":
            x, y = transform(images.float(), labels, {"lam": share})
            return x[1:].round_().to(torch.uint8), y[1:]
        box, share = _box(share, draws.random(2), images.shape[2], images.shape[3])
        x, y = transform(images, labels, {"box": box, "lam_adjusted": share})
        return x[1:], y[1:]

    def test(self, labels: Tensor) -> Tensor:
        """int64 (B,) -> float32 (B, classes) where training has such targets: one form of messages for both."""
        return F.one_hot(labels, self._classes).float() if self.mixes else labels


def _box(share: float, centre: Any, height: int, width: int) -> tuple[tuple[int, int, int, int], float]:
    """(left, top, right, bottom) of a box around a place in [0, 1)^2, of 1 - ``share`` of the area where it does not
    reach over the border, and the share that is left."""
    half = 0.5 * math.sqrt(1.0 - share)
    column, row = int(centre[0] * width), int(centre[1] * height)
    left, right = max(column - int(half * width), 0), min(column + int(half * width), width)
    top, bottom = max(row - int(half * height), 0), min(row + int(half * height), height)
    return (left, top, right, bottom), 1.0 - (right - left) * (bottom - top) / (width * height)


@functools.cache
def _transform(name: str, classes: int) -> Mixing:
    """torchvision's transform, given what it would draw: (images, labels, drawn) -> (images, shares)."""
    from torchvision.transforms import v2  # a second, which others do without

    kind: Any = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name]
    transform = kind(num_classes=classes)

    def apply(images: Tensor, labels: Tensor, drawn: dict[str, Any]) -> tuple[Tensor, Tensor]:
        given = {"labels": labels, "batch_size": len(labels), **drawn}
        return transform.transform(images, given), transform.transform(labels, given)

    return apply
