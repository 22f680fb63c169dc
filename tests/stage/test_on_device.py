"""A training step on a device that is none (``helpers_device``): nothing on the wrong side, and no wait of the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers_device
import pytest
import torch
from helpers_device import CUDA, Device
from tiny import evaluate_on, network, tiny_batch, tiny_blocks, tiny_config, tiny_plan, train_on

from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.plan.assembly import build_modules
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage


@pytest.fixture
def device() -> Iterator[Device]:
    with helpers_device.pretended() as device:
        yield device


def stage_on(method: str, variant: str, **sections: Any) -> Stage:
    """All modules of the tiny network on the device."""
    plan = tiny_plan(tiny_config(method, variant, 2, 3, **sections))
    modules = build_modules(plan, 0, tiny_blocks(), Numerics(CUDA, torch.float32, True), fresh=True)
    return Stage(modules, plan.schedules[0], BatchInlet(micro_batches=plan.config.schedule.micro_batches), Edges())


def train(stage: Stage, device: Device, steps: int = 2) -> None:
    """Train; what is noted is that of the last step."""
    for step in range(steps):
        batch = tiny_batch(step)
        there = Batch(batch.x.to(CUDA), batch.labels.to(CUDA), batch.image.to(CUDA))
        for counts in (device.waits_in_step, device.copies, device.events_awaited):
            counts.clear()
        train_on(stage, 1, step, there)


CASES = [
    ("dgl", "plain", {}),
    ("predsim", "plain", {}),
    ("infopro", "hpff", {"schedule": {"micro_batches": 2}}),
    ("infopro-contrast", "released", {}),
    ("infopro", "hpff", {"hierarchy": {"levels": "together"}}),
    ("dgl", "plain", {"optim": {"clip_norm": 1.0}}),
]


@pytest.mark.parametrize(("method", "variant", "sections"), CASES)
def test_a_step_waits_for_two_numbers_that_are_on_their_way_and_for_nothing_else(
    device: Device, method: str, variant: str, sections: dict[str, Any]
) -> None:
    """Losses of this step, gradients of the last one; every operation has its tensors on the device."""
    train(stage_on(method, variant, **sections), device)
    assert device.waits_in_step == {}
    assert device.copies == {"to the host, beside": 2}
    assert device.events_awaited == {"Reading.finite": 2}
    assert device.races == []


def test_a_step_that_may_be_left_out_waits_for_its_own_gradients_too(device: Device) -> None:
    train(stage_on("dgl", "plain", train={"nonfinite": "skip"}), device)
    assert (device.waits_in_step, device.events_awaited) == ({}, {"Reading.finite": 2})


def test_a_test_batch_waits_for_nothing(device: Device) -> None:
    """What is counted stays on the device until the end of the test."""
    stage, batch = stage_on("dgl", "plain"), tiny_batch()
    there = Batch(batch.x.to(CUDA), batch.labels.to(CUDA), batch.image.to(CUDA))
    device.waits.clear()
    evaluate_on(stage, 1, 0, there)
    assert device.waits == {} and stage.counters.tested == len(batch.labels)


@pytest.mark.parametrize("read", ["float(t)", "bool(t)", "t.item()", "t.cpu()", "t.tolist()", "t.nonzero()"])
def test_reading_a_number_within_a_step_is_seen(device: Device, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would find."""
    stage = stage_on("dgl", "plain")
    forward = torch.nn.ReLU.forward

    def reads(module: torch.nn.ReLU, x: torch.Tensor) -> torch.Tensor:
        eval(read, {"t": x.detach().sum()})
        return forward(module, x)

    monkeypatch.setattr(torch.nn.ReLU, "forward", reads)
    train(stage, device, steps=1)
    assert sum(device.waits_in_step.values()) > 0


def test_a_constant_that_was_left_on_the_host_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_on("dgl", "plain")
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda module, x: x * torch.ones(x.size(1), 1, 1))
    with pytest.raises(RuntimeError, match=r"mul: expected all tensors to be on cuda:0, found \(4, 1, 1\) on the host"):
        train(stage, device, steps=1)


def test_the_device_is_gone_afterwards() -> None:
    with helpers_device.pretended():
        placed = network().to(CUDA)
    assert next(placed.parameters()).device == CUDA
    assert torch.cuda.device_count() == 0 or torch.cuda.is_available()
