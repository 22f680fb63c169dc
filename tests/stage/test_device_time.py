"""Work and waiting of a GPU by events: on a stream and a host whose clocks the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers_device
import pytest
import torch
from helpers_device import CUDA
from tiny import tiny_batch, tiny_blocks, tiny_config, tiny_plan, train_on

from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.plan.assembly import build_modules
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.schedule import Action, Kind
from pipeline.stage.stage import Stage
from pipeline.stage.watch import Watch

FORWARD = (Action(Kind.FORWARD, 3, 0),)


class Times:
    """Host and stream, seconds."""

    def __init__(self) -> None:
        self.host = self.stream = self.blocked = 0.0
        self.made = 0

    def kernel(self, seconds: float) -> None:
        self.stream = max(self.stream, self.host) + seconds

    def waited(self) -> float:
        return self.blocked

    def block(self, seconds: float) -> None:
        self.host += seconds
        self.blocked += seconds


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Iterator[Times]:
    times = Times()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            times.made += 1

        def record(self) -> None:
            self.at = max(times.host, times.stream)

        def query(self) -> bool:
            return times.host >= self.at

        def elapsed_time(self, later: Any) -> float:
            assert self.query() and later.query()
            return float(later.at - self.at) * 1e3

        def synchronize(self) -> None:
            raise AssertionError("the host waits")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    yield times


def work(watch: Watch, times: Times, message_s: float, kernel_s: float, room_s: float = 0.0) -> None:
    """One action: its message comes, a kernel is queued, a message is sent."""
    watch.reached(FORWARD, 1, 0)
    times.host += message_s
    with watch.working(FORWARD, 0, times.waited):
        times.kernel(kernel_s)
        with watch.sending(times.waited):
            times.block(room_s)


def test_a_device_that_is_behind_the_host_has_not_waited(times: Times) -> None:
    watch = Watch(device=CUDA)
    work(watch, times, 0.0, 8.0)
    work(watch, times, 3.0, 2.0)  # the host waits 3 s for a message, the device works meanwhile
    assert (watch.busy_s, watch.idle_s) == ({}, 0.0)  # not read before it is over
    times.host = 20.0
    assert watch.take_busy() == {3: pytest.approx(10.0)} and watch.idle_s == pytest.approx(0.0)


def test_a_device_without_work_waits_for_the_message_and_not_for_its_launch(times: Times) -> None:
    watch = Watch(device=CUDA)
    work(watch, times, 0.0, 1.0)
    work(watch, times, 4.0, 2.0)
    times.host = 20.0
    assert watch.take_busy() == {3: pytest.approx(3.0)} and watch.idle_s == pytest.approx(3.0)
    assert watch.take_busy() == {}


def test_room_in_a_queue_is_waited_for_only_once_the_device_has_nothing_left(times: Times) -> None:
    watch = Watch(device=CUDA)
    work(watch, times, 0.0, 2.0, room_s=5.0)
    times.host = 20.0
    assert watch.take_busy() == {3: pytest.approx(2.0)} and watch.idle_s == pytest.approx(3.0)


def test_events_are_used_again(times: Times) -> None:
    watch = Watch(device=CUDA)
    for _ in range(50):
        work(watch, times, 0.0, 1.0)
        times.host += 2.0
    assert times.made <= 6


def test_on_the_host_its_own_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, times = Watch(device=torch.device("cpu")), Times()
    monkeypatch.setattr("pipeline.stage.watch.time.perf_counter", lambda: times.host)
    watch.reached(FORWARD, 1, 0)
    with watch.working(FORWARD, 0, times.waited), watch.sending(times.waited):
        times.host += 2.0
        times.block(5.0)
    assert watch.take_busy() == {3: pytest.approx(2.0)} and watch.idle_s == 0.0


def test_a_step_is_measured_without_a_wait_of_the_host() -> None:
    with helpers_device.pretended() as device:
        plan = tiny_plan(tiny_config("dgl", "plain", 2, 3))
        modules = build_modules(plan, 0, tiny_blocks(), Numerics(CUDA, torch.float32, True), fresh=True)
        stage = Stage(modules, plan.schedules[0], BatchInlet(), Edges(), watch=Watch(device=CUDA))
        batch = tiny_batch()
        assert isinstance(batch.x, torch.Tensor) and batch.image is not None
        there = Batch(batch.x.to(CUDA), batch.labels.to(CUDA), batch.image.to(CUDA))
        stage.begin_epoch(0, 0)
        train_on(stage, 1, 0, there)
        assert device.waits_in_step == {} and set(device.events_awaited) == {"Reading.finite"}
        assert stage.take_counters().busy_s.keys() == {0, 1, 2}
        assert 0.0 <= stage.wait_since_epoch() < 60.0
