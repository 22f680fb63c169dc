"""When to save and when to stop: the first stage decides before a step, the batch carries it to all others.

Of several replicas the first one decides; the first stages of the others ask it before every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.base.config import CheckpointConfig
from pipeline.data.source import DataSpec
from pipeline.edges.twins import Twins
from pipeline.edges.wire import Directive
from pipeline.ranks.grid import Grid


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


def shared(orders: SaveOrStop, twins: Twins | None, grid: Grid, data_spec: DataSpec) -> SaveOrStop | SharedOrders:
    """``orders`` themselves where there are no ``twins`` to agree with."""
    if twins is None:
        return orders
    return SharedOrders(orders, twins, grid.leads, data_spec.test_batches // grid.replicas)


class SharedOrders:
    """The orders of the first replica, at the first stage of each.

    Args:
        orders: of this process, asked in the first replica only.
        twins: the first stages.
        leads: whether this is the first replica.
        tests: batches of a test that all replicas have; one that only some have is tested without a question.
    """

    def __init__(self, orders: SaveOrStop, twins: Twins, leads: bool, tests: int) -> None:
        self._orders = orders
        self._twins = twins
        self._leads = leads
        self._tests = tests
        self._tested = 0

    def after(self, step: int) -> Directive:
        """What all stages of all replicas are to do once ``step`` steps are done. Collective."""
        self._tested = 0
        return self._shared(self._orders.after(step) if self._leads else Directive.GO)

    def during_test(self) -> Directive:
        """Whether to leave a test. Collective."""
        self._tested += 1
        if self._tested > self._tests:
            return Directive.GO
        return self._shared(self._orders.during_test() if self._leads else Directive.GO)

    def _shared(self, order: Directive) -> Directive:
        return Directive(self._twins.largest(int(order), "begin a step"))
