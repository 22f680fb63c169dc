"""What feeds the first stage: batches of images and labels, from a data set of ours or from a user's loaders.

Only the process that owns the first local module reads images; the others are told its :class:`DataSpec`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics, stable_hash
from pipeline.data import ImageStream, open_data
from pipeline.data.catalogue import CIFAR_MEAN_ROUNDED, CIFAR_STD_ROUNDED
from pipeline.stage.stage import Batch, Progress


@dataclass(frozen=True)
class DataSpec:
    """What every rank must know of the data, whoever reads them.

    Attributes:
        classes: number of classes; 0 if only the network knows.
        image_shape: (C, H, W).
        train_batches, test_batches: batches of one epoch and of one test.
        train_images: images of one epoch.
    """

    classes: int
    image_shape: tuple[int, ...]
    train_batches: int
    test_batches: int
    train_images: int


class Source(Protocol):
    """Feeds the first stage."""

    data_spec: DataSpec

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` (1-based) from number ``start`` on, at most ``data.batch_size`` images each. They do
        not depend on ``start``."""

    def test(self) -> Iterator[Batch]:
        """The test set, at most one micro-batch of images at a time, nothing left out."""


@dataclass(frozen=True)
class Normaliser:
    """Turns uint8 images into what a network eats: (x / 255 - mean) / std in the boundary dtype and layout."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    numerics: Numerics

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> floating point (B, C, H, W)."""
        dtype = torch.float64 if self.numerics.dtype == torch.float64 else torch.float32
        x = image.to(self.numerics.device, dtype).div_(255.0)
        return self.numerics.boundary(x.sub_(self._per_channel(self.mean, x)).div_(self._per_channel(self.std, x)))

    def invert(self, x: Tensor) -> Tensor:
        """Normalised floating point (B, C, H, W) -> uint8, rounded."""
        image = x.float() * self._per_channel(self.std, x) + self._per_channel(self.mean, x)
        return image.mul_(255.0).round_().clamp_(0, 255).to(torch.uint8)

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)


class ImageSource:
    """A data set by name (``data.name``), augmented on the device.

    Raises:
        ConfigError: see :func:`pipeline.data.open_data`.
    """

    def __init__(self, config: Config, numerics: Numerics) -> None:
        settings = config.data
        data = open_data(
            settings.name,
            settings.root,
            download=settings.download,
            image_size=settings.image_size,
            cache_gib=settings.cache_gib,
            augment=settings.augment,
        )
        parts = config.schedule.micro_batches
        short = len(data.train) % settings.batch_size
        # A short batch must leave every micro-batch at least two images, or BatchNorm has nothing to average.
        drop_last = settings.drop_last or 0 < short < 2 * parts
        if drop_last and len(data.train) < settings.batch_size:
            raise ConfigError(
                f"data.batch_size = {settings.batch_size} is larger than the {len(data.train)} training images of "
                f"'{settings.name}'; use a smaller batch"
            )
        device, seed = numerics.device, config.train.seed
        self._train = ImageStream(data, settings.batch_size, seed, device, drop_last=drop_last)
        self._test = ImageStream(data, settings.batch_size // parts, seed, device)
        self._normalise = Normaliser(data.mean, data.std, numerics)
        images = len(data.train) - (short if drop_last else 0)
        self.data_spec = DataSpec(
            len(data.classes), data.image_shape, self._train.train_batch_count, self._test.test_batch_count, images
        )

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The augmented batches of ``epoch``."""
        return self._batches(self._train.train_batches(epoch, start))

    def test(self) -> Iterator[Batch]:
        """The test set as it is."""
        return self._batches(self._test.test_batches())

    def _batches(self, raw: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        device = self._normalise.numerics.device
        for image, labels in raw:
            yield Batch(self._normalise(image), labels.to(device), image.to(device))


@dataclass(frozen=True)
class LoaderData:
    """A user's own loaders: iterables with a length that yield (images, labels).

    ``images`` (B, C, H, W) are uint8 (normalised here by ``mean`` and ``std``) or floating point, already normalised
    by them. ``labels`` are integers (B,).
    """

    train: Any
    test: Any
    mean: tuple[float, ...] = CIFAR_MEAN_ROUNDED
    std: tuple[float, ...] = CIFAR_STD_ROUNDED


class LoaderSource:
    """Feeds the first stage from :class:`LoaderData`; ``progress`` is told of batches that are only read past.

    Raises:
        ConfigError: a loader without a length, or an empty one.
    """

    def __init__(
        self, data: LoaderData, config: Config, numerics: Numerics, progress: Progress | None = None
    ) -> None:
        self._data = data
        self._progress = progress
        self._seed = config.train.seed
        self._limit = config.data.batch_size
        self._parts = config.schedule.micro_batches
        self._micro_batch = config.data.batch_size // config.schedule.micro_batches
        self._normalise = Normaliser(data.mean, data.std, numerics)
        counts = {}
        for name, loader in (("train", data.train), ("test", data.test)):
            try:
                counts[name] = len(loader)
            except TypeError:
                raise ConfigError(f"the {name} loader has no length; give it __len__") from None
            if counts[name] == 0:
                raise ConfigError(f"the {name} loader is empty; it must yield at least one batch")
        image, labels = next(iter(data.train))
        rows = len(labels)
        tests = counts["test"]
        if getattr(data.test, "batch_size", None) is None or data.test.batch_size > self._micro_batch:
            tests = sum(-(-len(y) // self._micro_batch) for _, y in data.test)  # batches that will be cut
        self.data_spec = DataSpec(0, tuple(image.shape[1:]), counts["train"], tests, counts["train"] * rows)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training loader, once; a sampler with ``set_epoch`` is told the epoch. What the loader draws from the
        random numbers of torch, numpy and Python, or from a generator of its own, depends on the epoch only; batches
        before ``start`` are read and dropped. So a resumed run sees what the undisturbed one would have seen (but for
        random transforms in persistent workers: their random numbers go on from epoch to epoch)."""
        set_epoch = getattr(getattr(self._data.train, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        for number, (image, labels) in enumerate(self._drawn(epoch)):
            if number < start:
                if self._progress is not None:
                    self._progress(epoch, number, "reading past batches that are trained already")
                continue
            if len(labels) > self._limit:
                raise ConfigError(
                    f"the train loader gave {len(labels)} images, data.batch_size is {self._limit}; make them equal"
                )
            if self._parts > 1 and len(labels) < 2 * self._parts:
                raise ConfigError(
                    f"the train loader gave {len(labels)} images for schedule.micro_batches = {self._parts}, which "
                    "need two each; drop the short batch (drop_last=True)"
                )
            yield self._batch(image, labels)

    def _drawn(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training loader with random numbers of its own: modules of this process seed torch's in every step."""
        seed = stable_hash(self._seed, "loader", epoch)
        numpy.random.seed(seed % 2**32)
        random.seed(seed)
        train = self._data.train
        for owner in (train, getattr(train, "sampler", None)):
            if isinstance(own := getattr(owner, "generator", None), torch.Generator):
                own.manual_seed(seed)
        state = torch.Generator().manual_seed(seed).get_state()
        batches: Iterator[tuple[Tensor, Tensor]] | None = None
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                if batches is None:
                    batches = iter(self._data.train)
                batch = next(batches, None)
                state = torch.get_rng_state()
            if batch is None:
                return
            yield batch

    def test(self) -> Iterator[Batch]:
        """The test loader, cut into micro-batches."""
        for image, labels in self._data.test:
            for part, part_labels in zip(
                image.split(self._micro_batch), labels.split(self._micro_batch), strict=True
            ):
                yield self._batch(part, part_labels)

    def _batch(self, image: Tensor, labels: Tensor) -> Batch:
        numerics = self._normalise.numerics
        labels = labels.to(numerics.device, torch.int64)
        if image.dtype == torch.uint8:
            return Batch(self._normalise(image), labels, image.to(numerics.device))
        x = image.to(numerics.device)
        return Batch(numerics.boundary(x), labels, self._normalise.invert(x) if x.dim() == 4 else None)
