"""The moving average (EMA) of a local module's weights, beside the weights that are trained.

    update       average <- decay average + (1 - decay) weights            after the first one: average <- weights
    test         once with the weights, once with the averages in their place

As in torchvision's training references (AveragedModel with its buffers), BatchNorm's running statistics are averaged
like parameters, so a test needs no pass over the data first; counters are copied. Heads are averaged with their module,
so the average depends on no other rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """
    Args:
        weights: of the module, parameters and buffers, which training changes in place.
        decay: share of the average that an update keeps.

    Attributes:
        values: the averages in the order of ``weights``; empty before the first update.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.values: list[Tensor] = []
        self._weights = [weight.detach() for weight in weights]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(average, weight); the averages begin as copies."""
        if not self.values:
            self.values = [weight.clone() for weight in self._weights]
        return list(zip(self.values, self._weights, strict=True))

    def restore(self, values: Sequence[Tensor]) -> None:
        """Take the averages of a checkpoint over, in the layout of the weights."""
        self.values = [torch.empty_like(w).copy_(value) for w, value in zip(self._weights, values, strict=True)]

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Inside, the module has its averages for weights; without any yet, its weights."""
        kept = [weight.clone() for weight in self._weights]
        self._set(self.values or kept)
        try:
            yield
        finally:
            self._set(kept)

    def _set(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)


@torch.no_grad()
def average_together(averages: Sequence[WeightAverage]) -> None:
    """These modules have been updated: move their averages, in as few operations as for one module."""
    if not averages:
        return
    pairs = [pair for average in averages if average.values for pair in average.pairs()]
    for average in averages:
        average.pairs()  # the first update is copied
    moving = [(value, weight) for value, weight in pairs if value.is_floating_point()]
    for dtype in dict.fromkeys(value.dtype for value, _ in moving):
        alike = [pair for pair in moving if pair[0].dtype == dtype]
        get_ema_multi_avg_fn(averages[0].decay)([value for value, _ in alike], [weight for _, weight in alike], 0)
    for value, weight in pairs:
        if not value.is_floating_point():
            value.copy_(weight)
