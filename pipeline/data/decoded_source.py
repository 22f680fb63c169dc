"""Large data sets feed the first stage: worker processes decode and augment one sample at a time.

    worker processes        (split, epoch, index) -> sample: decode, augment with random numbers of its own | batch
    prefetch thread         batch -> device, mixed, normalised

A sample's random numbers are seeded from (seed, epoch, index) in a process that draws nothing else: batches do not
depend on the number of workers, on the placement, or on where a run was resumed. Workers are torch's DataLoader's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.base.config import Config
from pipeline.base.data_config import CITYSCAPES
from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, TensorSpec
from pipeline.base.numerics import Numerics, stable_hash
from pipeline.data.catalogue import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.cityscapes import CityscapesSamples
from pipeline.data.epoch import Epoch
from pipeline.data.imagenet import ImageNetSamples
from pipeline.data.loader_errors import guarded, named_errors
from pipeline.data.mixing import Mixer
from pipeline.data.normaliser import Normaliser
from pipeline.data.prefetch import moved, on_device
from pipeline.data.rate import LoaderRate
from pipeline.data.share import WHOLE, Share
from pipeline.data.source import DataSpec
from pipeline.data.stream import epoch_order
from pipeline.stage.inlet import Batch

SampleKey = tuple[str, int, int]
"""Split, epoch, index."""
Decoded = tuple[Tensor, Tensor, float]
"""Images uint8 (B, 3, H, W), targets (B, ...), and the seconds that a worker took."""


class Samples(Protocol):
    """An opened data set of which samples are made one by one, in worker processes.

    Attributes:
        classes: their number.
        image_shape: (3, H, W) of those that are trained on.
        target: of one sample.
    """

    classes: int
    image_shape: tuple[int, ...]
    target: TensorSpec

    def count(self, split: str) -> int:
        """Samples of "train" or "test"."""

    def sample(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) and its target; may draw from torch's random numbers, which are its own."""


class DecodedSource:
    """ImageNet or Cityscapes (``data.name``), see their modules; of it the ``share`` of a replica; ``whole``: tests of
    whole images, for an evaluation.

    Raises:
        ConfigError: the data set is not there, or smaller than a batch.
    """

    def __init__(self, config: Config, numerics: Numerics, share: Share = WHOLE, whole: bool = False) -> None:
        settings, parts = config.data, config.schedule.micro_batches
        cityscapes = settings.name == CITYSCAPES
        samples: Samples = CityscapesSamples(settings, whole) if cityscapes else ImageNetSamples(settings)
        self._seed, self._device = config.train.seed, numerics.device
        self._normalise = Normaliser(IMAGENET_MEAN, IMAGENET_STD, numerics)
        self._mixer = Mixer(settings, samples.classes, self._seed)
        self._counts = {split: samples.count(split) for split in ("train", "test")}
        self._batch, self._test_batch = settings.batch_size, 1 if whole else settings.batch_size // (parts * share.of)
        epoch = Epoch.of(self._counts["train"], self._batch, 2 * parts, settings.drop_last)
        epoch.check(settings, self._counts["train"], share)
        self._share = share
        self.rate = LoaderRate()
        self._workers = settings.workers
        self._keys = _Batches()
        self._loader = DataLoader(
            _ByKey(samples, self._seed),
            batch_sampler=self._keys,
            collate_fn=_stacked,
            num_workers=settings.workers,
            persistent_workers=True,
            pin_memory=self._device.type == "cuda",
        )
        self.data_spec = DataSpec(
            classes=samples.classes,
            inputs={MAIN: TensorSpec(samples.image_shape)},
            train_batches=epoch.batches,
            test_batches=-(-self._counts["test"] // self._test_batch),
            train_images=epoch.samples,
        )

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The shuffled, augmented batches of ``epoch``; those before ``start`` are not read."""
        order = epoch_order(self._counts["train"], seed=self._seed, epoch=epoch)
        numbers = range(start, self.data_spec.train_batches)
        rows, keys = [], []
        for number in numbers:
            batch = order[number * self._batch : (number + 1) * self._batch]
            needed = self._mixer.needed(batch, self._share.rows(len(batch))).tolist()
            rows.append(len(batch))
            keys.append([("train", epoch, index) for index in needed])

        def make(numbered: tuple[int, int, Decoded]) -> Batch:
            number, every, (images, target, seconds) = numbered
            self.rate.add(len(images), seconds / self._workers)
            images, target = moved(images, self._device), moved(target, self._device)
            images, target = self._mixer.train(images, target, epoch, number)
            return Batch(self._normalise(images), target, images, all_rows=every)

        self.rate.begin()
        decoded = zip(numbers, rows, self._decoded("train", keys), strict=False)
        return guarded(on_device(make, decoded, self._device), "train")

    def test(self) -> Iterator[Batch]:
        """The test set in order, nothing left out."""
        count, size = self._counts["test"], self._test_batch
        mine = self._share.batches(self.data_spec.test_batches)
        keys = [[("test", 0, index) for index in range(n * size, min((n + 1) * size, count))] for n in mine]

        def make(decoded: Decoded) -> Batch:
            images, target, _ = decoded
            images = moved(images, self._device)
            return Batch(self._normalise(images), self._mixer.test(moved(target, self._device)), images)

        return guarded(on_device(make, self._decoded("test", keys), self._device), "test")

    def _decoded(self, which: str, keys: list[list[SampleKey]]) -> Iterator[Decoded]:
        """What the workers make of these batches."""
        self._keys.batches = keys
        with named_errors(which):
            yield from self._loader


class _Batches(Sampler[list[SampleKey]]):
    """The batches that the workers are to make next."""

    def __init__(self) -> None:
        self.batches: Sequence[list[SampleKey]] = ()

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _ByKey(Dataset[Decoded]):
    """Samples by split, epoch and index, in a worker."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self._samples = samples
        self._seed = seed

    def __getitem__(self, key: SampleKey) -> Decoded:
        split, epoch, index = key
        started = time.perf_counter()
        torch.manual_seed(stable_hash(self._seed, "sample", epoch, index))
        try:
            image, target = self._samples.sample(split, index)
        except ConfigError as error:  # of which torch would make several lines
            raise ValueError(str(error)) from None
        return image, target, time.perf_counter() - started


def _stacked(samples: Sequence[Decoded]) -> Decoded:
    images, targets, seconds = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(targets), sum(seconds)
