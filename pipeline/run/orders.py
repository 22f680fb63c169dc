"""When to save and when to stop: the first stage decides before a step, the batch carries it to all others."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.base.config import CheckpointConfig
from pipeline.edges.wire import Directive


class SaveOrStop:
    """Decides on rank 0.

    Args:
        settings: how often to save.
        stop_request: why the run is to stop, None while it is not.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        stop_request: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._stop_request = stop_request
        self._clock = clock
        self._last_save = clock()
        self.reason: str | None = None

    def after(self, step: int) -> Directive:
        """What all stages are to do once ``step`` steps are done."""
        self.reason = self._stop_request()
        if self.reason is not None:
            return Directive.STOP
        every_steps, every_s = self._settings.every_steps, 60 * self._settings.every_minutes
        by_steps = every_steps > 0 and step % every_steps == 0
        by_time = every_s > 0 and self._clock() - self._last_save >= every_s
        return Directive.SAVE if by_steps or by_time else Directive.GO

    def during_test(self) -> Directive:
        """Whether to leave a test: nothing is saved in the middle of one."""
        self.reason = self._stop_request()
        return Directive.GO if self.reason is None else Directive.STOP

    def saved(self) -> None:
        """A checkpoint has been made: the minutes count from now."""
        self._last_save = self._clock()
