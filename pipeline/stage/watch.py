"""Who looks on while a stage works: where it is (for failures), what it spends, what ran from when to when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from pipeline.stage.device_time import DeviceTime, Span
from pipeline.stage.recorder import SHORTEST_WAIT_S, Recorder
from pipeline.stage.schedule import Action


class Progress(Protocol):
    """Told where a stage is, so that an error can say so."""

    def __call__(self, epoch: int, step: int, activity: str) -> None: ...


class Watch:
    """
    Args:
        progress: told the step and the action before each action.
        before_action: called with every action before it runs (fault injection, measuring).
        recorder: told what ran from when to when; may also be set before the first step.
        device: where the work is done. On a GPU its own time counts, as far as it is known to be over.

    Attributes:
        current: the action at work.
        busy_s: seconds of work by module, waits left out, since :meth:`take_busy`.
        idle_s: seconds in which a GPU had nothing to do because a message or data were missing, so far.
    """

    def __init__(
        self,
        progress: Progress | None = None,
        before_action: Callable[[int, Action], None] | None = None,
        recorder: Recorder | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.current: Action | None = None
        self.busy_s: dict[int, float] = {}
        self.idle_s = 0.0
        self.device_time = DeviceTime() if device is not None and device.type == "cuda" else None
        self._span: Span | None = None
        self._came: Any = None
        self._progress = progress
        self._before_action = before_action
        self.recorder = recorder
        self._reached: Any = None

    def reached(self, actions: Sequence[Action], epoch: int, step: int) -> None:
        """The stage has come, in ``step``, to actions that it does together; what they need may still be missing."""
        for action in actions:
            self.current = action
            if self._progress is not None:
                self._progress(epoch, step - action.lag, str(action))
            if self._before_action is not None:
                self._before_action(step - action.lag, action)
        self._reached = self._mark()
        self._came = self.device_time.mark() if self.device_time is not None else None

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        """Around the work of these actions in ``step``; each counts as an equal part of it. ``waited``: seconds of
        waiting so far, which is no work; here it is for room in the queue of a message."""
        before, started, mark = waited(), time.perf_counter(), self._mark()
        if self.device_time is not None:
            self._span = Span(self._came, self.device_time.mark(), [action.module for action in actions])
        yield
        blocked = waited() - before
        if self._span is not None and self.device_time is not None:
            self.device_time.ended(self._span)
            self._span = None
            self.read()
        else:
            self._add([action.module for action in actions], time.perf_counter() - started - blocked)
        if self.recorder is not None:
            self.recorder.actions(actions, step, self._reached, mark, blocked)
        self.current = None

    @contextmanager
    def sending(self, waited: Callable[[], float]) -> Iterator[None]:
        """Around the sending of a message within :meth:`working`, which may wait for room in its queue."""
        if self._span is None or self.device_time is None:
            yield
            return
        before, mark = waited(), self.device_time.mark()
        yield
        if waited() - before > SHORTEST_WAIT_S:
            self._span.blocked.append((mark, self.device_time.mark()))
        else:
            self.device_time.unused(mark)

    def read(self) -> None:
        """Add what the device is through with to ``busy_s`` and ``idle_s``; waits for nothing."""
        for modules, work_s, idle_s in self.device_time.passed() if self.device_time is not None else ():
            self._add(modules, work_s)
            self.idle_s += idle_s

    def _add(self, modules: Sequence[int], seconds: float) -> None:
        for module in modules:
            self.busy_s[module] = self.busy_s.get(module, 0.0) + seconds / len(modules)

    def testing(self, epoch: int, step: int) -> None:
        """The stage is at a test batch."""
        if self._progress is not None:
            self._progress(epoch, step, "test")

    def take_busy(self) -> dict[int, float]:
        """``busy_s`` since the last call."""
        self.read()
        taken, self.busy_s = self.busy_s, {}
        return taken

    def _mark(self) -> Any:
        return self.recorder.mark() if self.recorder is not None else None
