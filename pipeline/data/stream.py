"""The order of an epoch, and its batches."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.data.augmentation import augment, hashed
from pipeline.data.epoch import Epoch
from pipeline.data.images import ImageData
from pipeline.data.mixing import Mixer
from pipeline.data.normaliser import Normaliser
from pipeline.data.prefetch import moved, on_device
from pipeline.data.rate import LoaderRate
from pipeline.data.share import WHOLE, Share
from pipeline.stage.inlet import Batch


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The permutation of ``range(count)`` in which ``epoch`` trains, int64 (count,) on the CPU."""
    generator = torch.Generator()
    generator.manual_seed(int(hashed(torch.tensor([0]), seed, epoch, 3)))
    return torch.randperm(count, generator=generator)


class ImageStream:
    """Batches of one data set on the device of ``normalise``, ahead of their consumer: a thread reads, copies, augments
    and normalises them.

    The last, short training batch of an epoch is kept unless ``drop_last``, or unless it would have fewer than
    ``least`` images: BatchNorm cannot train on a single one. With ``batch_size`` 1 that is what was asked for, and
    nothing is dropped. Tests leave nothing out.

    Of several replicas each reads its ``share`` only. ``mixer`` mixes training batches.

    Attributes:
        epoch: the batches of an epoch, of all replicas.
        test_batch_count: batches of a test, of all replicas.
        rate: of the training batches.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        seed: int,
        normalise: Normaliser,
        drop_last: bool = False,
        share: Share = WHOLE,
        mixer: Mixer | None = None,
        least: int = 2,
    ) -> None:
        self._data = data
        self._batch_size = batch_size
        self._seed = seed
        self._normalise = normalise
        self._mixer = mixer
        self._device = normalise.numerics.device
        self._share = share
        self.rate = LoaderRate()
        self.epoch = Epoch.of(len(data.train), batch_size, least, drop_last)
        self.test_batch_count = -(-len(data.test) // batch_size)

    def train_batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The shuffled, augmented batches of ``epoch``, from ``start_batch`` on as in the whole epoch."""
        order = epoch_order(len(self._data.train), seed=self._seed, epoch=epoch)

        self.rate.begin()

        def make(batch: int) -> Batch:
            started = time.perf_counter()
            indices = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            rows = len(indices)
            mine = self._share.rows(rows)
            indices = indices[mine] if self._mixer is None else self._mixer.needed(indices, mine)
            images = moved(self._data.train.images(indices), self._device)
            policy = self._data.augmentation
            images = augment(images, moved(indices, self._device), seed=self._seed, epoch=epoch, policy=policy)
            labels = moved(self._data.train.labels[indices], self._device)
            if self._mixer is not None:
                images, labels = self._mixer.train(images, labels, epoch, batch)
            made = Batch(self._normalise(images), labels, images, all_rows=rows)
            self.rate.add(len(labels), time.perf_counter() - started)
            return made

        return on_device(make, range(start_batch, self.epoch.batches), self._device)

    def test_batches(self) -> Iterator[Batch]:
        """The test set in order, as it is, nothing left out."""
        count = len(self._data.test)

        def make(batch: int) -> Batch:
            start = batch * self._batch_size
            indices = torch.arange(start, min(start + self._batch_size, count))
            images = moved(self._data.test.images(indices), self._device)
            labels = moved(self._data.test.labels[indices], self._device)
            if self._mixer is not None:
                labels = self._mixer.test(labels)
            return Batch(self._normalise(images), labels, images)

        return on_device(make, self._share.batches(self.test_batch_count), self._device)
