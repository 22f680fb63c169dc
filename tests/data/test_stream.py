"""Order, batches, prefetching: what a trainer sees of an epoch."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.base.numerics import Numerics
from pipeline.data import Augmentation, CachedImages, ImageData, ImageSet, ImageStream, augment, epoch_order
from pipeline.data import stream as data_stream
from pipeline.data.normaliser import Normaliser
from pipeline.data.prefetch import prefetched
from pipeline.edges.wire import Directive
from pipeline.stage.inlet import DataInlet

NORMALISE = Normaliser((0.5,) * 3, (0.25,) * 3, Numerics(torch.device("cpu"), torch.float32, channels_last=False))
POLICY = Augmentation(2, "reflect", flip=True)
PAUSE_S = 0.02


def image_set(count: int) -> CachedImages:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return CachedImages(pixels, torch.arange(count))


def image_data(train: ImageSet, test: ImageSet) -> ImageData:
    names = tuple(str(number) for number in range(len(train)))
    return ImageData(train, test, names, (3, 8, 8), (0.5,) * 3, (0.5,) * 3, POLICY, "tiny")


def stream(count: int = 22, batch_size: int = 4, drop_last: bool = False) -> ImageStream:
    return ImageStream(image_data(image_set(count), image_set(10)), batch_size, 3, NORMALISE, drop_last)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_order_is_a_permutation_of_its_own_per_seed_and_epoch() -> None:
    first = epoch_order(100, seed=1, epoch=1)
    torch.manual_seed(99)  # the global generator has no say

    assert sorted(first.tolist()) == list(range(100))
    assert torch.equal(epoch_order(100, seed=1, epoch=1), first)
    assert not torch.equal(epoch_order(100, seed=1, epoch=2), first)
    assert not torch.equal(epoch_order(100, seed=2, epoch=1), first)


def test_an_epoch_is_every_image_once_augmented_with_its_own_index() -> None:
    source = image_set(22)
    batches = list(stream().train_batches(epoch=4))
    order = epoch_order(22, seed=3, epoch=4)

    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == order.tolist()
    expected = augment(source.images(order), order, seed=3, epoch=4, policy=POLICY)
    assert torch.equal(torch.cat([batch.image for batch in batches]), expected)
    assert torch.equal(torch.cat([batch.x for batch in batches]), NORMALISE(expected))
    assert batches[0].image.dtype == torch.uint8 and batches[0].labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "sizes"),
    [
        (10, 4, False, [4, 4, 2]),
        (10, 4, True, [4, 4]),
        (9, 4, False, [4, 4]),  # BatchNorm cannot train on a single image
        (8, 4, False, [4, 4]),
        (3, 1, False, [1, 1, 1]),  # asked for
        (1, 4, False, []),
    ],
)
def test_the_last_batch(count: int, batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    batches = stream(count, batch_size, drop_last)

    assert [len(batch.labels) for batch in batches.train_batches(1)] == sizes
    assert batches.epoch.batches == len(sizes)


@pytest.mark.parametrize("batch_size", [3, 4, 5, 100])
def test_a_test_is_everything_in_order_and_unchanged(batch_size: int) -> None:
    batches = stream(batch_size=batch_size, drop_last=True)
    found = list(batches.test_batches())
    source = image_set(10)

    assert torch.equal(torch.cat([batch.image for batch in found]), source.pixels)
    assert torch.equal(torch.cat([batch.x for batch in found]), NORMALISE(source.pixels))
    assert torch.cat([batch.labels for batch in found]).tolist() == list(range(10))
    assert batches.test_batch_count == len(found)


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_an_epoch_resumes_where_it_stopped(start: int) -> None:
    whole = list(stream().train_batches(7))[start:]

    for batch, again in zip(whole, stream().train_batches(7, start_batch=start), strict=True):
        assert torch.equal(batch.x, again.x) and torch.equal(batch.labels, again.labels)


def test_no_thread_is_left_after_an_epoch_or_an_early_stop() -> None:
    batches = stream().train_batches(1)
    assert not prefetch_threads()  # nothing starts before the first batch
    next(batches)
    assert len(prefetch_threads()) == 1
    del batches
    assert not prefetch_threads()

    for _ in stream().train_batches(1):
        break
    assert not prefetch_threads()
    assert len(list(stream().train_batches(1))) == 6
    assert not prefetch_threads()


def test_the_thread_does_all_the_work_on_a_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the training thread did of it would count as waiting for data."""
    done: list[tuple[str, str]] = []

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def and_note(*arguments: Any, **options: Any) -> Any:
            done.append((name, threading.current_thread().name.partition("_")[0]))
            return work(*arguments, **options)

        return and_note

    for name in ("moved", "augment"):
        monkeypatch.setattr(f"pipeline.data.stream.{name}", noted(name, getattr(data_stream, name)))
    monkeypatch.setattr(Normaliser, "__call__", noted("normalise", Normaliser.__call__))
    monkeypatch.setattr(CachedImages, "images", noted("read", CachedImages.images))

    batches = list(stream().train_batches(1))
    once = {"read": 1, "moved": 3, "augment": 1, "normalise": 1}  # images, their indices and labels are moved
    assert Counter(done) == {(name, "prefetch"): len(batches) * times for name, times in once.items()}
    done.clear()
    batches = list(stream().test_batches())
    once = {"read": 1, "moved": 2, "normalise": 1}  # nothing is drawn by index
    assert Counter(done) == {(name, "prefetch"): len(batches) * times for name, times in once.items()}


def test_the_first_stage_waits_for_no_batch_that_is_normalised_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    normalise = Normaliser.__call__

    def slowly(self: Normaliser, image: Tensor) -> Tensor:
        time.sleep(PAUSE_S)
        made.append(PAUSE_S)
        return normalise(self, image)

    monkeypatch.setattr(Normaliser, "__call__", slowly)
    orders = SimpleNamespace(after=lambda step: Directive.GO)
    inlet = DataInlet(SimpleNamespace(train=stream().train_batches), 1, orders)
    at_first = 0.0
    for step in inlet.steps(1, 0, 0, 6):
        inlet.next(1, step, 0)
        at_first = at_first or inlet.wait_s
        end = time.monotonic() + 5
        while len(made) < min(step + 2, 6) and time.monotonic() < end:  # a step that takes longer than that
            time.sleep(PAUSE_S / 10)
    assert len(made) == 6
    assert inlet.wait_s - at_first < sum(made) / 2


class Broken:
    """A set whose image 5 cannot be decoded."""

    labels = torch.arange(12)

    def __len__(self) -> int:
        return 12

    def images(self, indices: Tensor) -> Tensor:
        if 5 in indices.tolist():
            raise ValueError("image 5 is broken")
        return torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)


def test_an_error_of_the_thread_reaches_the_consumer_after_the_good_batches() -> None:
    seen = []
    with pytest.raises(ValueError, match="image 5 is broken"):
        for batch in ImageStream(image_data(image_set(4), Broken()), 4, 0, NORMALISE).test_batches():
            seen.append(batch.labels.tolist())
    assert seen == [[0, 1, 2, 3]]
    assert not prefetch_threads()


def test_work_runs_ahead_but_not_without_bound() -> None:
    taken: list[int] = []
    made: list[int] = []
    values = prefetched(made.append, (taken.append(item) or item for item in range(100)), ahead=2)

    next(values)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert taken == made == [0, 1, 2]  # one handed out, two ahead
    next(values)
    assert taken == [0, 1, 2, 3]
    values.close()
    assert not prefetch_threads()


def test_an_error_among_the_items_comes_after_the_values_of_those_before_it() -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise ValueError("no third item")

    seen = []
    with pytest.raises(ValueError, match="no third item"):
        for value in prefetched(lambda item: item + 1, items()):
            seen.append(value)
    assert seen == [1, 2] and not prefetch_threads()


def test_what_is_ahead_when_the_consumer_stops_is_not_made() -> None:
    made: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def make(item: int) -> None:
        if item == 1:
            begun.set()
            go.wait(5)
        made.append(item)

    values = prefetched(make, range(100), ahead=2)
    next(values)
    begun.wait(5)
    threading.Timer(0.1, go.set).start()
    values.close()  # waits for the one in hand
    assert made == [0, 1] and not prefetch_threads()
