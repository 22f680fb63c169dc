"""No update with a loss or a gradient that is not finite: the run stops there, or the update is left out.

    forward  heads --losses--> host   backward --norms-> host   update        "skip": waits for both, before the update
                     read before the update    read one update later on a GPU        "stop"

Losses, and norms of gradients, of all modules that are updated together travel in one tensor. The losses are on their
way to the host while the last backward runs, so waiting for them leaves the device its work. Waiting for the gradients
would not: on a GPU a run that stops on them looks one update later (``confirm``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.base.errors import NonFiniteError
from pipeline.local.losses import Losses


class Reading:
    """Numbers of the device, (n,), on their way to the host: reading them waits for them alone, not for later work."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._numbers: list[float] | None = None
        self._arrival: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def finite(self, first: int, end: int) -> bool:
        """Whether the numbers from ``first`` on, before ``end``, are neither NaN nor infinite."""
        if self._numbers is None:
            if self._arrival is not None:
                self._arrival.synchronize()
            self._numbers = self._values.tolist()
        return all(map(math.isfinite, self._numbers[first:end]))

    def parts(self, sizes: Iterable[int]) -> list[Callable[[], bool]]:
        """:meth:`finite` of consecutive parts."""
        bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        return [partial(self.finite, first, end) for first, end in bounds]


class FiniteGuard:
    """Watches over the updates of one module.

    Args:
        losses: the module's losses.
        buffers: statistics of blocks and heads.
        skips: leave bad updates out instead of stopping the run.
        reads_late: a run that stops looks at the gradients of an update in the next one, so as not to wait for them.
        error: makes the error from the step, what is wrong, and whether it is in the losses.
    """

    def __init__(
        self,
        losses: Losses,
        buffers: Iterable[Tensor],
        skips: bool,
        reads_late: bool,
        error: Callable[[int, str, bool], NonFiniteError],
    ) -> None:
        self.losses = losses
        self.skips = skips
        self.reads_late = reads_late
        self.losses_finite: dict[int, Callable[[], bool]] = {}  # by step, once its losses are sent, until its update
        self.unconfirmed: tuple[int, Callable[[], bool]] | None = None  # step and gradients of the last update
        self._error = error
        self._good = [(b, b.detach().clone()) for b in buffers if b.is_floating_point()] if skips else []

    def confirm(self) -> None:
        """Look at the gradients of the last update; do it before its weights are saved.

        Raises:
            NonFiniteError: they were not finite.
        """
        _stop_at_the_first([self.gradient_error()])

    def gradient_error(self) -> NonFiniteError | None:
        """What is wrong with the gradients of the last update, unless that has been looked at. It waits for them."""
        if self.unconfirmed is None:
            return None
        (step, finite), self.unconfirmed = self.unconfirmed, None
        return None if finite() else self._error(step, "losses are finite, gradients of weights are not", False)

    def loss_error(self, step: int) -> NonFiniteError | None:
        """What is wrong with the losses of ``step``, whose update is still to come. It waits for the device."""
        bad = ", ".join(
            f"{name} = {value}" for name, value in self.losses.values(step).items() if not math.isfinite(value)
        )
        return self._error(step, f"loss not finite: {bad}", True) if bad else None

    def mend_buffers(self) -> None:
        """Where updates are skipped: undo what a bad batch did to running statistics, and keep the good ones.

        Also called once the buffers have been set from outside.
        """
        for buffer, good in self._good:
            torch.where(buffer.isfinite(), buffer, good, out=good)
            buffer.data.copy_(good)  # .data: open graphs hold BatchNorm's statistics, and their backward reads none


def send_losses(due: Sequence[tuple[FiniteGuard, int]]) -> None:
    """All losses of these modules and steps are there: the device sends them before it goes on."""
    totals = [list(guard.losses.open.get(step, {}).values()) for guard, step in due]
    every = list(itertools.chain(*totals))
    reading = Reading(torch.stack(every) if every else torch.empty(0))
    for (guard, step), finite in zip(due, reading.parts(map(len, totals)), strict=True):
        guard.losses_finite[step] = finite


def allowed(due: Sequence[tuple[FiniteGuard, int]], norms: Tensor, sizes: Iterable[int]) -> list[bool]:
    """Whether these modules' updates of these steps may be done; False only where one is to be left out.

    Args:
        due: module and step, updated together.
        norms: of all gradients, module by module, (n,).
        sizes: how many of them are of each module.

    Raises:
        NonFiniteError: a loss of these steps, or a gradient, is not finite, and the run is to stop; the first of them.
    """
    gradients = Reading(norms).parts(sizes)
    unsent = [(guard, step) for guard, step in due if step not in guard.losses_finite]
    if unsent:
        send_losses(unsent)
    losses = [guard.losses_finite.pop(step) for guard, step in due]
    if due[0][0].skips:
        return [of_losses() and of_gradients() for of_losses, of_gradients in zip(losses, gradients, strict=True)]
    _stop_at_the_first(guard.gradient_error() for guard, _ in due)
    _stop_at_the_first(
        None if finite() else guard.loss_error(step) for (guard, step), finite in zip(due, losses, strict=True)
    )
    for (guard, step), finite in zip(due, gradients, strict=True):
        guard.unconfirmed = step, finite
    if not due[0][0].reads_late:
        _stop_at_the_first(guard.gradient_error() for guard, _ in due)
    return [True] * len(due)


def _stop_at_the_first(errors: Iterable[NonFiniteError | None]) -> None:
    found = [error for error in errors if error is not None]
    if found:
        raise min(found, key=lambda error: error.precedence)
