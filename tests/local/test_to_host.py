"""The state of a module leaves the device without a wait: on a device that is none, whose checker knows no luck."""

from __future__ import annotations

from collections.abc import Iterator

import helpers_device
import pytest
import torch
from helpers_device import CUDA, Device
from tiny import tiny_batch, tiny_blocks, tiny_config, tiny_plan, tiny_stage, train_on

from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.local.module_state import module_state
from pipeline.local.to_host import arrival, to_host
from pipeline.plan.assembly import build_modules
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage


@pytest.fixture
def device() -> Iterator[Device]:
    with helpers_device.pretended() as device:
        yield device


def late_modules(place: torch.device) -> list[LocalModule]:
    """Those of the tiny network after two steps, with the work of a third one late."""
    config = tiny_config("dgl", "plain", 2, 3, schedule={"kind": "async"}, precision={"layers": "plain"})
    if place.type == "cpu":
        stage, modules, _ = tiny_stage(config)
    else:
        plan = tiny_plan(config)
        modules = build_modules(plan, 0, tiny_blocks(), Numerics(place, torch.float32, False), fresh=True)
        stage = Stage(modules, plan.schedules[0], BatchInlet(), Edges())
    stage.begin_epoch(0, 0)
    for step in range(3):
        batch = tiny_batch(step)
        train_on(stage, 1, step, Batch(batch.x.to(place), batch.labels.to(place), batch.image.to(place)))
    return modules


def test_a_state_is_queued_in_one_go_and_is_that_of_the_cpu(device: Device) -> None:
    modules = late_modules(CUDA)
    device.waits.clear()
    device.copies.clear()
    states = [module_state(module) for module in modules]
    arrived = arrival(CUDA)
    assert device.waits == {}
    assert device.copies.keys() == {"to the host, beside"}
    arrived()
    for state, expected in zip(states, map(module_state, late_modules(torch.device("cpu"))), strict=True):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(state[name], value) and state[name].stride() == value.stride(), name
    assert device.races == []


def test_a_copy_is_that_of_the_moment_and_is_read_after_its_arrival(device: Device) -> None:
    weight = torch.ones(4, device=CUDA)
    copied = to_host(weight)
    arrived = arrival(CUDA)
    weight.fill_(2.0)
    arrived()
    assert copied.tolist() == [1.0] * 4 and device.races == []
    early = to_host(weight)
    early.sum()
    assert len(device.races) == 1 and "sum (reads) on the thread" in device.races[0]


def test_on_the_cpu_a_copy_is_there_at_once() -> None:
    weight = torch.ones(4, requires_grad=True)
    copied = to_host(weight)
    arrival(torch.device("cpu"))()
    weight.data.fill_(2.0)
    assert copied.tolist() == [1.0] * 4 and not copied.requires_grad
