"""A training step on a device that is none (``helpers_device``): nothing on the wrong side, and no wait of the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers_device
import pytest
import torch
from helpers_device import CUDA, Device
from tiny import evaluate_on, network, tiny_batch, tiny_blocks, tiny_config, tiny_plan, train_on

from pipeline.base.errors import NonFiniteError
from pipeline.base.numerics import Numerics
from pipeline.base.validation import validate, with_values
from pipeline.edges.connect import Edges
from pipeline.local.guard import Reading
from pipeline.local.segmentation import MEAN_IOU
from pipeline.plan.assembly import build_modules
from pipeline.stage.averaging import Averaging
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage


@pytest.fixture
def device() -> Iterator[Device]:
    with helpers_device.pretended() as device:
        yield device


def stage_on(method: str, variant: str, dtype: torch.dtype = torch.float32, **sections: Any) -> Stage:
    """All modules of the tiny network on the device."""
    sections = dict(sections)
    span, values = sections.pop("span", 2), sections.pop("values", {})
    plan = tiny_plan(validate(with_values(tiny_config(method, variant, span, 3, **sections), values)))
    modules = build_modules(plan, 0, tiny_blocks(), Numerics(CUDA, dtype, True), fresh=True)
    return Stage(modules, plan.schedules[0], BatchInlet(micro_batches=plan.config.schedule.micro_batches), Edges())


def train(stage: Stage, device: Device, steps: int = 2, dtype: torch.dtype = torch.float32, bad: int = -1) -> None:
    """Train; what is noted is that of the last step. Batch ``bad`` has a value that is NaN."""
    for step in range(steps):
        batch = tiny_batch(step)
        if step == bad:
            batch.x[3, 1, 2, 4] = torch.nan
        there = Batch(batch.x.to(CUDA, dtype), batch.labels.to(CUDA), batch.image.to(CUDA))
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
    ("dgl", "plain", {"optim": {"name": "adamw"}, "train": {"ema": 0.9}}),
    ("greedy", "plain", {"values": {"method.front": "man++"}}),
    ("predsim", "hpff", {"span": 1, "values": {"method.reconciliation": 0.1}}),
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


@pytest.mark.parametrize(("method", "variant"), [("dgl", "hpff"), ("predsim", "plain"), ("infopro", "hpff")])
def test_so_does_a_step_in_bf16(device: Device, method: str, variant: str) -> None:
    """What a GPU computes in unless it is told otherwise."""
    train(stage_on(method, variant, torch.bfloat16), device, dtype=torch.bfloat16)
    assert (device.waits_in_step, device.copies, device.races) == ({}, {"to the host, beside": 2}, [])


def test_a_step_that_may_be_left_out_waits_for_its_own_gradients_too(device: Device) -> None:
    train(stage_on("dgl", "plain", train={"nonfinite": "skip"}), device)
    assert (device.waits_in_step, device.events_awaited) == ({}, {"Reading.finite": 2})


class OtherReplica:
    """Stands in for twins whose terms are all 0."""

    size = 2
    wait_s = 0.0

    def sum(self, tensors: Any, what: str) -> Any:
        return self

    def wait(self) -> None: ...

    def settle(self) -> None: ...


def test_what_replicas_have_summed_up_is_read_a_step_later(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own step it would be the last thing that the device does: the host would wait for all of it."""
    stage, steps, read = stage_on("dgl", "plain"), [0], []
    stage._averaging = Averaging(OtherReplica())  # type: ignore[arg-type]
    begin, finite = Reading.__init__, Reading.finite

    def begun(reading: Any, values: torch.Tensor) -> None:
        begin(reading, values)
        reading.step = steps[0]

    def looked(reading: Any, *bounds: int) -> bool:
        read.append((reading.step, steps[0]))
        return finite(reading, *bounds)

    monkeypatch.setattr(Reading, "__init__", begun)
    monkeypatch.setattr(Reading, "finite", looked)
    for steps[0] in range(3):
        train(stage, device, steps=1)
    assert read and all(now == made + 1 for made, now in read)


def test_a_loss_of_a_replica_that_is_not_finite_is_named_then(device: Device) -> None:
    stage = stage_on("dgl", "plain")
    stage._averaging = Averaging(OtherReplica())  # type: ignore[arg-type]
    train(stage, device, steps=2, bad=1)
    with pytest.raises(NonFiniteError, match=r"module 0 .*, batch of step 1: loss not finite: independent.task = nan"):
        stage.modules[0].take_losses()


def test_counting_pixels_waits_for_nothing(device: Device) -> None:
    logits, target = torch.rand(2, 3, 4, 4), torch.tensor([0, 1, 2, 255], dtype=torch.uint8).expand(2, 8, 4)
    there = logits.to(CUDA), target.to(CUDA)
    device.waits.clear()
    counted = MEAN_IOU.count(*there)
    assert device.waits == {} and counted.tolist() == MEAN_IOU.count(logits, target).tolist()


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
