"""A sum of a GPU, which the device waits for and not the host: a twin that is late is named within the deadline."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import helpers_clocks
import helpers_device
import pytest
import torch
import torch.distributed as dist

from pipeline.base.errors import DeadlineExceeded
from pipeline.edges.twins import Sum, Twins
from pipeline.ranks.grid import Grid
from pipeline.ranks.team import Team

WHAT = "average module 0 over the replicas"


class Launched:
    """A Work of NCCL: waiting for it is left to the stream."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> None: ...


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when the device has come past the sum."""
    reached = threading.Event()
    with helpers_device.pretended():
        monkeypatch.setattr(helpers_clocks.Event, "query", lambda event: reached.is_set())
        monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
        yield reached


def begun(tensor: torch.Tensor, deadline_s: float) -> Sum:
    group: Any = None
    twins = Twins(Team(0, 2, dist.HashStore(), deadline_s=deadline_s), Grid(0, 2, 1), group, "gradients")
    work: Any = Launched(tensor)
    return Sum(twins, [work], [tensor], [tensor], WHAT, 1)


def test_a_twin_that_does_not_come_is_named(reached: threading.Event) -> None:
    total = begun(torch.ones(3), deadline_s=0.1)
    total.wait()
    with pytest.raises(DeadlineExceeded, match=rf"rank 0 has waited 0.1 s for rank 1 \(replica 1\) to {WHAT}; "):
        total.settle()


def test_the_host_goes_on_when_the_device_has(reached: threading.Event) -> None:
    total = begun(torch.ones(3), deadline_s=20.0)
    total.wait()
    threading.Timer(0.05, reached.set).start()
    total.settle()
    assert reached.is_set()


def test_what_is_waited_for_holds_no_gradients(reached: threading.Event) -> None:
    """They would take their memory twice: with the next ones."""
    tensor = torch.ones(3)
    total, there = begun(tensor, deadline_s=1.0), weakref.ref(tensor)
    total.wait()
    del tensor
    gc.collect()
    assert there() is None
