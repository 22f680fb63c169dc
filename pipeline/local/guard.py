"""No update with a loss or a gradient that is not finite: the run stops there, or the update is left out.

    forward  heads --losses--> host   backward --norms-> host   update        "skip": waits for both, before the update
                     read before the update    read one update later on a GPU        "stop"

Losses, and norms of gradients, of all modules that are updated together travel in one tensor. The losses are on their
way to the host while the last backward runs, so waiting for them leaves the device its work. Waiting for the gradients
would not: on a GPU a run that stops on them looks one update later (``confirm``). So it does for losses that come with
the gradients, as those that replicas have summed up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce

import torch
from torch import Tensor

from pipeline.base.errors import NonFiniteError
from pipeline.local.losses import Losses


class Reading:
    """Numbers of the device, (n,), on their way to the host: reading them waits for them alone, not for later work."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._all_finite: bool | None = None  # not known yet
        self._arrival: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def finite(self, first: int, end: int) -> bool:
        """Whether the numbers from ``first`` on, before ``end``, are neither NaN nor infinite."""
        if self._all_finite is None:
            if self._arrival is not None:
                self._arrival.synchronize()
            largest = torch.linalg.vector_norm(self._values, math.inf) if len(self._values) else 0.0
            self._all_finite = math.isfinite(float(largest))
        return self._all_finite or all(map(math.isfinite, self._values[first:end].tolist()))

    def parts(self, sizes: Iterable[int]) -> list[Callable[[], bool]]:
        """:meth:`finite` of consecutive parts."""
        bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        return [partial(self.finite, first, end) for first, end in bounds]


@dataclass(frozen=True)
class _Update:
    """An update that is done though it may have been a bad one: its step, what is known of its gradients, and of its
    losses where nobody has looked at them before."""

    step: int
    gradients: Callable[[], bool]
    losses: Callable[[], bool] = lambda: True
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class FiniteGuard:
    """Watches over the updates of one module.

    Args:
        losses: the module's losses.
        buffers: statistics of blocks and heads.
        skips: leave bad updates out instead of stopping the run.
        reads_late: a run that stops looks at what is known last of an update in the next one, so as not to wait for it.
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
        self.unconfirmed: _Update | None = None  # the last one
        self._error = error
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()] if skips else []
        self._found, self._good = _flat_copies(self._buffers), _flat_copies(self._buffers)

    def confirm(self) -> None:
        """Look at the last update; do it before its weights are saved.

        Raises:
            NonFiniteError: its gradients were not finite, or its losses.
        """
        _stop_at_the_first([self.update_error()])

    def update_error(self) -> NonFiniteError | None:
        """What is wrong with the last update, unless that has been looked at. It waits for its gradients."""
        if self.unconfirmed is None:
            return None
        update, self.unconfirmed = self.unconfirmed, None
        if not update.losses():
            return self._loss_error(update.step, {name: float(value) for name, value in update.terms.items()})
        what = "losses are finite, gradients of weights are not"
        return None if update.gradients() else self._error(update.step, what, False)

    def loss_error(self, step: int) -> NonFiniteError | None:
        """What is wrong with the losses of ``step``, whose update is still to come. It waits for the device."""
        return self._loss_error(step, self.losses.values(step))

    def _loss_error(self, step: int, losses: Mapping[str, float]) -> NonFiniteError | None:
        bad = ", ".join(f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value))
        return self._error(step, f"loss not finite: {bad}", True) if bad else None

    def mend_buffers(self) -> None:
        """Where updates are skipped: undo what a bad batch did to running statistics, and keep the good ones.

        Also called once the buffers have been set from outside.
        """
        if self._buffers:
            # .data: open graphs hold BatchNorm's statistics, and their backward reads none
            buffers, (found, parts), (good, good_parts) = [b.data for b in self._buffers], self._found, self._good
            torch._foreach_copy_(parts, buffers)
            torch.where(found.isfinite(), found, good, out=good)
            torch._foreach_copy_(buffers, good_parts)


def _flat_copies(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies one after another in one tensor, (elements,), of the widest dtype; and each of them, in its shape."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors]) if tensors else torch.empty(0)
    parts = flat.split([tensor.numel() for tensor in tensors]) if tensors else ()
    return flat, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


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
    _stop_at_the_first(guard.update_error() for guard, _ in due)
    if unsent and due[0][0].reads_late:  # nothing of this update is on the host yet
        for (guard, step), of_gradients, of_losses in zip(due, gradients, losses, strict=True):
            guard.unconfirmed = _Update(step, of_gradients, of_losses, dict(guard.losses.open.get(step, {})))
        return [True] * len(due)
    _stop_at_the_first(
        None if finite() else guard.loss_error(step) for (guard, step), finite in zip(due, losses, strict=True)
    )
    for (guard, step), finite in zip(due, gradients, strict=True):
        guard.unconfirmed = _Update(step, finite)
    if not due[0][0].reads_late:
        _stop_at_the_first(guard.update_error() for guard, _ in due)
    return [True] * len(due)


def _stop_at_the_first(errors: Iterable[NonFiniteError | None]) -> None:
    found = [error for error in errors if error is not None]
    if found:
        raise min(found, key=lambda error: error.precedence)
