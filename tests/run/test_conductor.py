"""When the first stage asks all stages to save or to stop."""

from __future__ import annotations

from pipeline.base.config import CheckpointConfig
from pipeline.edges.wire import Directive
from pipeline.run.conductor import Conductor


class Clock:
    """A clock that is set by hand, seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_saves_by_steps() -> None:
    conductor = Conductor(CheckpointConfig(every_steps=3), lambda: None)
    assert [step for step in range(1, 10) if conductor.after(step) is Directive.SAVE] == [3, 6, 9]
    assert Conductor(CheckpointConfig(), lambda: None).after(1000) is Directive.GO


def test_saves_by_minutes_since_the_last_save_whoever_asked_for_it() -> None:
    clock = Clock()
    conductor = Conductor(CheckpointConfig(every_minutes=2.0), lambda: None, clock)
    clock.now = 119.0
    assert conductor.after(1) is Directive.GO
    clock.now = 121.0
    assert conductor.after(2) is Directive.SAVE
    conductor.saved()
    clock.now = 240.0
    assert conductor.after(3) is Directive.GO
    clock.now = 241.0
    assert conductor.after(4) is Directive.SAVE


def test_a_request_to_stop_comes_before_everything_and_its_reason_is_kept() -> None:
    requests = iter([None, "SIGTERM on rank 2", "SIGTERM on rank 2"])
    conductor = Conductor(CheckpointConfig(every_steps=1), lambda: next(requests))
    assert conductor.after(1) is Directive.SAVE and conductor.reason is None
    assert conductor.after(2) is Directive.STOP and conductor.reason == "SIGTERM on rank 2"
    assert conductor.during_test() is Directive.STOP
    assert Conductor(CheckpointConfig(every_steps=1), lambda: None).during_test() is Directive.GO
