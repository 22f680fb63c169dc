"""The losses of one module: those of steps at work, and the sums of those that were trained on.

They stay on the device; reading them is left to the end of an epoch, so nothing waits for them in between.
"""

from __future__ import annotations

from torch import Tensor


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

    def add(self, step: int, name: str, loss: Tensor, share: float) -> None:
        """A loss of one micro-batch, which is ``share`` of its batch."""
        losses = self.open.setdefault(step, {})
        losses[name] = losses.get(name, 0.0) + loss * share

    def close(self, step: int, updated: bool) -> None:
        """The update of ``step`` is done, or left out."""
        losses = self.open.pop(step, {})
        if not updated:
            self.skipped += 1
            return
        for name, total in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.steps += 1

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
