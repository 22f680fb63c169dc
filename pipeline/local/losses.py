"""The losses of one module: those of steps at work, and the sums of those that were trained on.

They stay on the device; reading them is left to the end of an epoch, so nothing waits for them in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


class Losses:
    """
    Attributes:
        open: by step and name, until the update of that step; over its micro-batches, weighted by their share.
        sums, steps: over the updates since :meth:`take`.
        skipped: updates left out since :meth:`take_skipped`.
    """

    def __init__(self) -> None:
        self.open: dict[int, dict[str, Tensor]] = {}
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.skipped = 0

    @torch.no_grad()
    def add(self, step: int, losses: Mapping[str, Tensor], share: float) -> None:
        """Losses of one micro-batch, which is ``share`` of its batch."""
        values = list(losses.values())
        if share != 1.0 and values:
            values = list(torch._foreach_mul(values, share))
        _add(self.open.setdefault(step, {}), dict(zip(losses, values, strict=True)))

    def skip(self, step: int) -> None:
        """The update of ``step`` is left out, and so are its losses."""
        self.open.pop(step, None)
        self.skipped += 1

    def values(self, step: int) -> dict[str, float]:
        """Of a step whose update is still to come. It waits for the device."""
        return {name: float(total) for name, total in self.open.get(step, {}).items()}

    def means(self) -> dict[str, float]:
        """Of every loss over the updates so far. It waits for the device."""
        return {name: float(total) / self.steps for name, total in self.sums.items()}

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = self.means()
        self.sums.clear()
        self.steps = 0
        return means

    def take_skipped(self) -> int:
        """Number of updates left out since the last call."""
        taken, self.skipped = self.skipped, 0
        return taken


@torch.no_grad()
def close_together(due: Sequence[tuple[Losses, int]]) -> None:
    """The updates of these modules and steps are done: their losses go into the sums, in one call for all."""
    sums: dict[tuple[int, str], Tensor] = {}
    totals: dict[tuple[int, str], Tensor] = {}
    for index, (losses, step) in enumerate(due):
        sums |= {(index, name): total for name, total in losses.sums.items()}
        totals |= {(index, name): total for name, total in losses.open.pop(step, {}).items()}
        losses.steps += 1
    _add(sums, totals)
    for (index, name), total in sums.items():
        due[index][0].sums[name] = total


def _add(sums: dict[K, Tensor], more: Mapping[K, Tensor]) -> None:
    """Add ``more`` to ``sums`` by name; what is not there yet is put there."""
    known = [name for name in more if name in sums]
    if known:
        added = torch._foreach_add([sums[name] for name in known], [more[name] for name in known])
        sums.update(zip(known, added, strict=True))
    sums.update({name: value for name, value in more.items() if name not in sums})
