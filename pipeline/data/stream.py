"""The order of an epoch, and batches prepared one ahead by a background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.data.augmentation import augment, hashed
from pipeline.data.images import ImageData

T = TypeVar("T")
PREFETCH = 2
POLL_S = 0.2


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The permutation of ``range(count)`` in which ``epoch`` trains, int64 (count,)."""
    generator = torch.Generator()
    generator.manual_seed(int(hashed(torch.tensor([0]), seed, epoch, 3)))
    return torch.randperm(count, generator=generator)


class ImageStream:
    """Batches of one data set: ``(images uint8 (B, C, H, W), labels int64 (B,))`` on ``device``.

    The last, short batch of an epoch is kept unless ``drop_last``.

    Attributes:
        train_batch_count, test_batch_count: batches of an epoch and of a test.
    """

    def __init__(
        self, data: ImageData, batch_size: int, seed: int, device: torch.device, drop_last: bool = False
    ) -> None:
        self._data = data
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        whole, rest = divmod(len(data.train), batch_size)
        self.train_batch_count = whole + (1 if rest and not drop_last else 0)
        self.test_batch_count = -(-len(data.test) // batch_size)

    def train_batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of ``epoch``, from ``start_batch`` on: the same as the tail of the whole epoch."""
        order = epoch_order(len(self._data.train), seed=self._seed, epoch=epoch)

        def make(batch: int) -> tuple[Tensor, Tensor]:
            indices = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            images = self._data.train.images(indices).to(self._device)
            policy = self._data.augmentation
            images = augment(images, indices, seed=self._seed, epoch=epoch, policy=policy)
            return images, self._data.train.labels[indices].to(self._device)

        return prefetched(make, range(start_batch, self.train_batch_count))

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, as it is, nothing left out."""

        def make(batch: int) -> tuple[Tensor, Tensor]:
            indices = torch.arange(
                batch * self._batch_size, min((batch + 1) * self._batch_size, len(self._data.test))
            )
            images = self._data.test.images(indices).to(self._device)
            return images, self._data.test.labels[indices].to(self._device)

        return prefetched(make, range(self.test_batch_count))


def prefetched(make: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """``make(item)`` for every item, up to PREFETCH of them made ahead in a thread.

    An exception in ``make`` is raised here. When the consumer stops early (or closes the generator), the thread ends.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(PREFETCH)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=POLL_S)
                return

    def work() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                put((make(item), None, False))
            put((None, None, True))
        except BaseException as error:  # handed to the consumer, who raises it
            put((None, error, True))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            assert value is not None
            yield value
    finally:
        stopped.set()
        thread.join()
