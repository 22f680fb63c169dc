"""No update with a loss or a gradient that is not finite: the run stops there, or the update is left out.

    forward  heads --losses--> host   backward --norm--> host   update        "skip": waits for both, before the update
                     read before the update    read one update later on a GPU        "stop"

The losses are on their way to the host while the backward runs, so waiting for them leaves the device its work. Waiting
for the gradients would not: on a GPU a run that stops on them looks one update later (``confirm``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pipeline.base.errors import NonFiniteError
from pipeline.local.losses import Losses


class Reading:
    """A number of the device, on its way to the host: reading it waits for it alone, and not for later work."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._arrival: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def finite(self) -> bool:
        """Whether it is neither NaN nor infinite."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return math.isfinite(float(self._value))


class FiniteGuard:
    """Watches over the updates of one module.

    Args:
        losses: the module's losses.
        parameters: what its updates change.
        buffers: statistics of blocks and heads.
        skips: leave bad updates out instead of stopping the run.
        reads_late: a run that stops looks at the gradients of an update in the next one, so as not to wait for them.
        error: makes the error from the step, what is wrong, and whether it is in the losses.
    """

    def __init__(
        self,
        losses: Losses,
        parameters: Sequence[nn.Parameter],
        buffers: Iterable[Tensor],
        skips: bool,
        reads_late: bool,
        error: Callable[[int, str, bool], NonFiniteError],
    ) -> None:
        self._losses = losses
        self._parameters = parameters
        self._skips = skips
        self._reads_late = reads_late
        self._error = error
        self._readings: dict[int, Reading] = {}  # by step: its losses, until its update
        self._unconfirmed: tuple[int, Reading] | None = None  # step and gradients of the last update
        self._good = [(b, b.detach().clone()) for b in buffers if b.is_floating_point()] if skips else []

    def heads_done(self, step: int) -> None:
        """All losses of ``step`` are there: the device sends them before it begins the backward."""
        losses = self._losses.open.get(step)
        if losses:
            self._readings[step] = Reading(torch.stack(tuple(losses.values())).sum())

    def allows(self, step: int) -> bool:
        """Whether the update of ``step`` may be done; False only where it is to be left out.

        Raises:
            NonFiniteError: a loss of that step, or a gradient, is not finite, and the run is to stop.
        """
        losses = self._readings.pop(step, None)
        present = [p.grad for p in self._parameters if p.grad is not None]
        gradients = Reading(torch.nn.utils.get_total_norm(present, math.inf))
        losses_finite = losses is None or losses.finite()
        if self._skips:
            return losses_finite and gradients.finite()
        self.confirm()
        error = None if losses_finite else self.loss_error(step)
        if error is not None:
            raise error
        self._unconfirmed = step, gradients
        if not self._reads_late:
            self.confirm()
        return True

    def confirm(self) -> None:
        """Look at the gradients of the last update; do it before its weights are saved.

        Raises:
            NonFiniteError: they were not finite.
        """
        if self._unconfirmed is None:
            return
        (step, gradients), self._unconfirmed = self._unconfirmed, None
        if not gradients.finite():
            raise self._error(step, "losses are finite, gradients of weights are not", False)

    def loss_error(self, step: int) -> NonFiniteError | None:
        """What is wrong with the losses of ``step``, whose update is still to come. It waits for the device."""
        bad = ", ".join(
            f"{name} = {value}" for name, value in self._losses.values(step).items() if not math.isfinite(value)
        )
        return self._error(step, f"loss not finite: {bad}", True) if bad else None

    def mend_buffers(self) -> None:
        """Where updates are skipped: undo what a bad batch did to running statistics, and keep the good ones.

        Also called once the buffers have been set from outside.
        """
        for buffer, good in self._good:
            torch.where(buffer.isfinite(), buffer, good, out=good)
            buffer.data.copy_(good)  # .data: open graphs hold BatchNorm's statistics, and their backward reads none
