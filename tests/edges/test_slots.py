"""A slot is not touched before its last use is over: on a device that is none, whose checker knows no luck."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import helpers_clocks as clocks
import helpers_device
import pytest
import torch
from helpers_device import CUDA, Device, bare

from pipeline.edges.wire import FieldSpec, MessageSpec, Slot

SPEC = MessageSpec((FieldSpec("activation", torch.float32, (3,)),), max_rows=4)
WORDS = [0, 0, 0, 1]


@pytest.fixture
def device() -> Iterator[Device]:
    with helpers_device.pretended() as device:
        yield device


def transfer(device: Device, slot: Slot, arrives: bool) -> None:
    """NCCL sends or fills the fields, from a stream of its own; it is over when this returns."""
    stream = clocks.Stream(name="stream of NCCL")
    with clocks.on_stream(stream):
        device.launched("transfer", [slot.payload] if arrives else [], [] if arrives else [slot.payload])
    stream.synchronize()


def computed() -> torch.Tensor:
    """What the main stream makes."""
    return torch.arange(12.0, device=CUDA).view(4, 3) * 2


def test_a_split_slot_is_sent_once_it_is_filled_and_filled_again_once_it_is_sent(device: Device) -> None:
    slot = Slot(SPEC, CUDA, split=True, copies=None)
    for _ in range(2):
        slot.pack(WORDS, 4, {"activation": computed()})
        slot.leave()
        transfer(device, slot, arrives=False)
    assert device.races == []
    assert not slot.wire.is_pinned() and len(slot.wire) == SPEC.header_bytes


def test_a_split_slot_is_filled_by_the_peer_once_it_is_read(device: Device) -> None:
    slot = Slot(SPEC, CUDA, split=True, copies=None)
    slot.words[3] = 1
    for _ in range(2):
        slot.settle()
        transfer(device, slot, arrives=True)
        slot.arrive()
        slot.unpack(4)["activation"].sum()
        slot.queued()
    assert device.races == []


def test_a_slot_of_ranks_that_share_a_gpu_goes_through_pinned_memory_beside_the_main_stream(device: Device) -> None:
    there, back = (Slot(SPEC, CUDA, split=False, copies=clocks.Stream()) for _ in range(2))
    for _ in range(2):
        there.pack(WORDS, 4, {"activation": computed()})
        there.leave()
        device.on_host("gloo sends", there.wire, writes=False)
        back.settle()
        device.on_host("gloo receives", back.wire, writes=True)
        bare(back.wire).copy_(there.wire)
        back.arrive()
        assert bare(back.unpack(4)["activation"]).tolist() == bare(computed()).tolist()
        back.queued()
    assert device.races == []
    assert device.copies["to the host, beside"] == device.copies["to the device, beside"] == 2
    assert not [place for place in device.waits if place.startswith("Slot.") and place != "Slot.__init__"]


@pytest.mark.parametrize("missing", ["settle", "queued"])
@pytest.mark.parametrize("copies", [False, True], ids=["split", "shared"])
def test_without_its_events_the_checker_finds_it(device: Device, missing: str, copies: bool) -> None:
    slot = Slot(SPEC, CUDA, split=not copies, copies=clocks.Stream() if copies else None)
    with patch.object(Slot, missing, lambda slot: None):
        slot.pack(WORDS, 4, {"activation": computed()})
        slot.leave()
        if not copies:
            transfer(device, slot, arrives=False)
    assert len(device.races) == 1 and "does not follow" in device.races[0]


def test_pinned_memory_that_is_written_before_its_copy_has_ended_is_found(device: Device) -> None:
    """What the tests above would find."""
    pinned, stream = torch.zeros(4).pin_memory(), clocks.Stream()
    with clocks.on_stream(stream):
        pinned.to(CUDA, non_blocking=True)
    with patch.object(device, "races", []):
        stream.synchronize()
        pinned.fill_(1.0)
        assert device.races == []
    with clocks.on_stream(stream):
        pinned.to(CUDA, non_blocking=True)
    pinned.fill_(2.0)
    assert len(device.races) == 1 and "fill_ (writes) on the thread" in device.races[0]
