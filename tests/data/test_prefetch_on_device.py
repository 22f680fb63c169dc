"""Batches that are made on a stream beside: on a device that is none, whose checker knows no luck."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import helpers_clocks as clocks
import helpers_device
import pytest
import torch
from helpers_device import CUDA, Device, OnDevice
from torch import Tensor

from pipeline.base.numerics import Numerics
from pipeline.data.augmentation import Augmentation
from pipeline.data.images import CachedImages, ImageData
from pipeline.data.normaliser import Normaliser
from pipeline.data.prefetch import moved, on_device
from pipeline.data.stream import ImageStream
from pipeline.stage.inlet import Batch


@pytest.fixture
def device() -> Iterator[Device]:
    with helpers_device.pretended() as device:
        yield device


def make(item: Tensor) -> Batch:
    """On the device, and computed there."""
    x = moved(item, CUDA)
    return Batch(x * 2.0, moved(torch.zeros(4, dtype=torch.int64), CUDA), None)


def train_on(device: Device, items: Iterator[Tensor]) -> list[float]:
    """A step on every batch, which is let go of at once."""
    sums = []
    for batch in on_device(make, items, CUDA):
        assert isinstance(batch.x, Tensor)
        sums.append(batch.x.sum())
        del batch
    device.look_at_freed()
    return [float(total) for total in sums]


def of_the_host() -> Iterator[Tensor]:
    return (torch.full((4,), float(step)) for step in range(6))


def of_the_device() -> Iterator[Tensor]:
    """Made by the consumer's stream, as by a loader that computes there; nobody else keeps them."""
    return (torch.full((4,), float(step), device=CUDA) for step in range(6))


@pytest.mark.parametrize("items", [of_the_host, of_the_device])
def test_batches_are_used_once_they_are_made_and_freed_once_they_are_used(device: Device, items: object) -> None:
    assert callable(items)
    assert train_on(device, items()) == [8.0 * step for step in range(6)]
    assert device.races == []
    beside = 6 * (2 if items is of_the_host else 1)
    assert device.copies["to the device, beside"] == beside and device.copies["to the device, waited for"] == 0


@pytest.mark.parametrize("items", [of_the_host, of_the_device])
@pytest.mark.parametrize(
    ("kind", "missing", "found"),
    [(clocks.Stream, "wait_event", "does not follow"), (OnDevice, "record_stream", "is free while")],
)
def test_without_events_or_the_allocators_knowledge_the_checker_finds_it(
    device: Device, items: object, kind: type, missing: str, found: str
) -> None:
    assert callable(items)
    with patch.object(kind, missing, lambda *arguments: None):
        train_on(device, items())
    assert any(found in race for race in device.races)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_images_are_augmented_and_normalised_there_as_on_a_cpu(device: Device, mode: str) -> None:
    """Pixels cross as uint8, from pinned memory, beside; what is made of them is the same to the bit."""
    pixels = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = CachedImages(pixels, torch.arange(12) % 4)
    policy = Augmentation(2, mode, True)  # type: ignore[arg-type]
    data = ImageData(images, images, ("a", "b", "c", "d"), (3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), policy, "made")
    found = {}
    for where in (torch.device("cpu"), CUDA):
        stream = ImageStream(data, 4, 7, Normaliser(data.mean, data.std, Numerics(where, torch.float32, True)))
        found[where] = [(b.x, b.labels, b.image) for b in stream.train_batches(2)]
    torch.cuda.current_stream().synchronize()
    for one, other in zip(found[torch.device("cpu")], found[CUDA], strict=True):
        for here, there in zip(one, other, strict=True):
            assert isinstance(here, Tensor) and isinstance(there, OnDevice) and torch.equal(here, there.cpu())
    assert device.races == []
    assert device.copies["to the device, beside"] == 9  # images, labels and indices of three batches
    assert device.copies["to the device, waited for"] == 2  # mean and standard deviation, once
