"""Who looks on while a stage works: where it is (for failures), what it spends, what ran from when to when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pipeline.stage.recorder import Recorder
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

    Attributes:
        current: the action at work.
        busy_s: seconds of work by module, waits left out, since :meth:`take_busy`.
    """

    def __init__(
        self,
        progress: Progress | None = None,
        before_action: Callable[[int, Action], None] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.current: Action | None = None
        self.busy_s: dict[int, float] = {}
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

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        """Around the work of these actions in ``step``; each counts as an equal part of it. ``waited``: seconds of
        waiting so far, which is no work; here it is for room in the queue of a message."""
        before, started, mark = waited(), time.perf_counter(), self._mark()
        yield
        blocked = waited() - before
        elapsed = time.perf_counter() - started - blocked
        for action in actions:
            self.busy_s[action.module] = self.busy_s.get(action.module, 0.0) + elapsed / len(actions)
        if self.recorder is not None:
            self.recorder.actions(actions, step, self._reached, mark, blocked)
        self.current = None

    def testing(self, epoch: int, step: int) -> None:
        """The stage is at a test batch."""
        if self._progress is not None:
            self._progress(epoch, step, "test")

    def take_busy(self) -> dict[int, float]:
        """``busy_s`` since the last call."""
        taken, self.busy_s = self.busy_s, {}
        return taken

    def _mark(self) -> Any:
        return self.recorder.mark() if self.recorder is not None else None
