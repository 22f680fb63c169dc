"""The order of an epoch, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.data.augmentation import augment, hashed
from pipeline.data.images import ImageData
from pipeline.data.prefetch import prefetched

LabelledImages = tuple[Tensor, Tensor]


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The permutation of ``range(count)`` in which ``epoch`` trains, int64 (count,) on the CPU."""
    generator = torch.Generator()
    generator.manual_seed(int(hashed(torch.tensor([0]), seed, epoch, 3)))
    return torch.randperm(count, generator=generator)


class EpochLoader:
    """The batches of one pass over a split, made ahead by one thread while the consumer computes.

    Can be iterated again, with the same batches; ``len`` is their number.

    Attributes:
        batch_size: images of every batch but, perhaps, the last.
        drop_last: whether a short last batch is left out.
    """

    def __init__(
        self, make: Callable[[int], LabelledImages], batches: range, batch_size: int, drop_last: bool
    ) -> None:
        self._make = make
        self._batches = batches
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[LabelledImages]:
        return prefetched(self._make, self._batches)


class ImageStream:
    """Batches of one data set: ``(images uint8 (B, C, H, W), labels int64 (B,))`` on ``device``.

    The last, short training batch of an epoch is kept unless ``drop_last`` - or unless it would be one single
    image, which BatchNorm cannot train on (no variance over one value per channel). With ``batch_size`` 1
    that is what was asked for, and nothing is dropped. Tests leave nothing out.

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
        self._drop_last = drop_last or rest == 1
        self.train_batch_count = whole + (1 if rest and not self._drop_last else 0)
        self.test_batch_count = -(-len(data.test) // batch_size)

    def train_batches(self, epoch: int, start_batch: int = 0) -> EpochLoader:
        """The shuffled, augmented batches of ``epoch``, from ``start_batch`` on as in the whole epoch."""
        order = epoch_order(len(self._data.train), seed=self._seed, epoch=epoch)

        def make(batch: int) -> LabelledImages:
            indices = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            images = self._data.train.images(indices).to(self._device)
            policy = self._data.augmentation
            images = augment(images, indices, seed=self._seed, epoch=epoch, policy=policy)
            return images, self._data.train.labels[indices].to(self._device)

        batches = range(start_batch, self.train_batch_count)
        return EpochLoader(make, batches, self._batch_size, self._drop_last)

    def test_batches(self) -> EpochLoader:
        """The test set in order, as it is, nothing left out."""
        count = len(self._data.test)

        def make(batch: int) -> LabelledImages:
            start = batch * self._batch_size
            indices = torch.arange(start, min(start + self._batch_size, count))
            images = self._data.test.images(indices).to(self._device)
            return images, self._data.test.labels[indices].to(self._device)

        return EpochLoader(make, range(self.test_batch_count), self._batch_size, drop_last=False)
