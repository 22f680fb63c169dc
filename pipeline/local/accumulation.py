"""Gradient accumulation: one update with the mean of the gradients of several batches.

    batch      0        1        2        3        4        5 (last of the epoch)          n = 4
    gradient   sum      + sum    + sum    + sum    sum      + sum
    update                                / 4               / 2

Every batch is a step of its own, with its own forward, statistics of BatchNorm and losses; between two updates of an
epoch weights stay as they are. (Micro-batches are parts of one batch, see schedule: the data, and what is late in
schedule `async`, count in whole ones.) A batch with a loss or gradient that is not finite is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.local.optimiser import Optimiser

SEEN, GOOD = "seen", "good"


class Accumulation:
    """The gradients of one local module between two updates.

    Args:
        optimiser: of the module.
        batches: n, of an update.
        copies: the memory of a gradient is written by the next batch, as with CUDA graphs.
    """

    def __init__(self, optimiser: Optimiser, batches: int, copies: bool = False) -> None:
        self._copies = copies
        self._optimiser = optimiser
        self._batches = batches
        self._seen = self._good = 0
        self._sums: dict[int, Tensor] = {}  # by place of the weight in the optimiser

    @property
    def sums(self) -> list[Tensor]:
        """The sums of the gradients so far, of weights that have any."""
        return list(self._sums.values())

    @torch.no_grad()
    def take(self, good: bool) -> bool:
        """The gradients of a batch are there; add them if they are ``good``. Whether the update is due: then they are
        the mean of its batches, else there are none."""
        if good:
            found = {i: w.parameter.grad for i, w in enumerate(self._optimiser.weights) if w.parameter.grad is not None}
            known = [index for index in found if index in self._sums]
            if known:
                torch._foreach_add_([self._sums[index] for index in known], [found[index] for index in known])
            fresh = {index: gradient for index, gradient in found.items() if index not in self._sums}
            self._sums |= {i: gradient.clone() if self._copies else gradient for i, gradient in fresh.items()}
        self._optimiser.clear()
        self._seen, self._good = self._seen + 1, self._good + good
        return self._seen == self._batches and self.finish()

    @torch.no_grad()
    def finish(self) -> bool:
        """Put the mean so far where the optimiser looks for it; False where no batch is in it."""
        sums, good = self._sums, self._good
        self._sums, self._seen, self._good = {}, 0, 0
        if sums:
            torch._foreach_div_(list(sums.values()), good)
        for index, mean in sums.items():
            self._optimiser.weights[index].parameter.grad = mean
        return good > 0

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The sums by place of their weight, not copied; how many batches were seen, and are in them."""
        for index, total in self._sums.items():
            yield str(index), total
        yield SEEN, torch.tensor(self._seen)
        yield GOOD, torch.tensor(self._good)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over the values of :meth:`state`."""
        state = dict(state)
        self._seen, self._good = int(state.pop(SEEN)), int(state.pop(GOOD))
        weights = self._optimiser.weights
        self._sums = {
            int(index): torch.empty_like(weights[int(index)].parameter, requires_grad=False).copy_(total)
            for index, total in state.items()
        }
