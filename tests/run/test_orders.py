"""When the first stage asks all stages to save or to stop."""

from __future__ import annotations

from pipeline.base.config import CheckpointConfig
from pipeline.edges.wire import Directive
from pipeline.run.orders import SaveOrStop


class Clock:
    """A clock that is set by hand, seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_saves_by_steps() -> None:
    orders = SaveOrStop(CheckpointConfig(every_steps=3), lambda: None)
    assert [step for step in range(1, 10) if orders.after(step) is Directive.SAVE] == [3, 6, 9]
    assert SaveOrStop(CheckpointConfig(), lambda: None).after(1000) is Directive.GO


def test_saves_by_minutes_since_the_last_save_whoever_asked_for_it() -> None:
    clock = Clock()
    orders = SaveOrStop(CheckpointConfig(every_minutes=2.0), lambda: None, clock)
    clock.now = 119.0
    assert orders.after(1) is Directive.GO
    clock.now = 121.0
    assert orders.after(2) is Directive.SAVE
    orders.saved()
    clock.now = 240.0
    assert orders.after(3) is Directive.GO
    clock.now = 241.0
    assert orders.after(4) is Directive.SAVE


def test_a_request_to_stop_comes_before_everything_and_its_reason_is_kept() -> None:
    requests = iter([None, "SIGTERM on rank 2", "SIGTERM on rank 2"])
    orders = SaveOrStop(CheckpointConfig(every_steps=1), lambda: next(requests))
    assert orders.after(1) is Directive.SAVE and orders.reason is None
    assert orders.after(2) is Directive.STOP and orders.reason == "SIGTERM on rank 2"
    assert orders.during_test() is Directive.STOP
    assert SaveOrStop(CheckpointConfig(every_steps=1), lambda: None).during_test() is Directive.GO
