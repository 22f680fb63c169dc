"""A user's own loaders feed the first stage.

    main thread     loader -> batch 2, checked |  step on batch 1        | loader -> batch 3 | ...
    prefetch thread                               batch 2: copy, normalise

The loader is read in the main thread, one batch ahead: its transforms may draw from torch's random numbers, which are
global to the process, and every local module seeds them before it draws from them. Read in another thread, a loader
would draw from whatever a module has just seeded, and a module from what the loader has left: no run would repeat
another. What draws nothing is done ahead in a thread. Workers (``num_workers``) read ahead in any case.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, DataError
from pipeline.base.numerics import Numerics, stable_hash
from pipeline.data.catalogue import CIFAR_MEAN_ROUNDED, CIFAR_STD_ROUNDED
from pipeline.data.loader_errors import checked, named_deaths, named_errors
from pipeline.data.normaliser import Normaliser
from pipeline.data.prefetch import moved, on_device
from pipeline.data.source import DataSpec
from pipeline.stage.stage import Batch, Progress


@dataclass(frozen=True)
class LoaderData:
    """A user's own loaders: iterables with a length that yield (images, labels).

    ``images`` (B, C, H, W) are uint8 (normalised here by ``mean`` and ``std``) or floating point, already normalised
    by them. ``labels`` are integers (B,). Each batch has memory of its own: it is drawn before the last one is used up.
    """

    train: Any
    test: Any
    mean: tuple[float, ...] = CIFAR_MEAN_ROUNDED
    std: tuple[float, ...] = CIFAR_STD_ROUNDED


class LoaderSource:
    """Feeds the first stage from :class:`LoaderData`; ``progress`` is told of batches that are only read past.

    Raises:
        ConfigError: a loader without a length, or an empty one, or one whose batches are no (images, labels).
        DataError: the loader itself failed.
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
        self._device = numerics.device
        counts = {}
        for name, loader in (("train", data.train), ("test", data.test)):
            try:
                counts[name] = len(loader)
            except TypeError:
                raise ConfigError(f"the {name} loader has no length; give it __len__") from None
            if counts[name] == 0:
                raise ConfigError(f"the {name} loader is empty; it must yield at least one batch")
        with named_errors("train"):
            first = next(iter(data.train), None)
        if first is None:
            raise DataError(f"the train loader gave no batch; its len() had announced {counts['train']}")
        image, labels = checked(first, "train")
        self._image_shape = tuple(image.shape[1:])
        tests = counts["test"]
        if getattr(data.test, "batch_size", None) is None or data.test.batch_size > self._micro_batch:
            tests = sum(-(-len(y) // self._micro_batch) for _, y in self._tests())  # batches that will be cut
        self.data_spec = DataSpec(0, self._image_shape, counts["train"], tests, counts["train"] * len(labels))

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training loader, once; a sampler with ``set_epoch`` is told the epoch. What the loader draws from the
        random numbers of torch, numpy and Python, or from a generator of its own, depends on the epoch only; batches
        before ``start`` are read and dropped. So a resumed run sees what the undisturbed one would have seen (but for
        random transforms in persistent workers: their random numbers go on from epoch to epoch)."""
        set_epoch = getattr(getattr(self._data.train, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        batches = on_device(self._ready, self._from(epoch, start), self._device, ahead=1)
        return self._named(batches, "train")

    def test(self) -> Iterator[Batch]:
        """The test loader, cut into micro-batches."""
        parts = (
            part
            for image, labels in self._tests()
            for part in zip(image.split(self._micro_batch), labels.split(self._micro_batch), strict=True)
        )
        return self._named(on_device(self._ready, parts, self._device, ahead=1), "test")

    @staticmethod
    def _named(batches: Generator[Batch, None, None], which: str) -> Iterator[Batch]:
        with closing(batches):
            first = next(batches, None)  # starts the workers
            if first is not None:
                with named_deaths(which):
                    yield first
                    yield from batches

    def _from(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._drawn(epoch)):
            if number < start:
                if self._progress is not None:
                    self._progress(epoch, number, "reading past batches that are trained already")
                continue
            image, labels = checked(batch, "train", self._image_shape)
            if len(labels) > self._limit:
                raise ConfigError(
                    f"the train loader gave {len(labels)} images, data.batch_size is {self._limit}; make them equal"
                )
            if self._parts > 1 and len(labels) < 2 * self._parts:
                raise ConfigError(
                    f"the train loader gave {len(labels)} images for schedule.micro_batches = {self._parts}, which "
                    "need two each; drop the short batch (drop_last=True)"
                )
            yield image, labels

    def _drawn(self, epoch: int) -> Iterator[Any]:
        """The training loader with random numbers of its own: modules of this process seed torch's in every step."""
        seed = stable_hash(self._seed, "loader", epoch)
        numpy.random.seed(seed % 2**32)
        random.seed(seed)
        train = self._data.train
        for owner in (train, getattr(train, "sampler", None)):
            if isinstance(own := getattr(owner, "generator", None), torch.Generator):
                own.manual_seed(seed)
        state = torch.Generator().manual_seed(seed).get_state()
        batches: Iterator[Any] | None = None
        while True:
            with torch.random.fork_rng(devices=[]), named_errors("train"):
                torch.set_rng_state(state)
                if batches is None:
                    batches = iter(self._data.train)
                batch = next(batches, None)
                state = torch.get_rng_state()
            if batch is None:
                return
            yield batch

    def _tests(self) -> Iterator[tuple[Tensor, Tensor]]:
        with named_errors("test"):
            for batch in self._data.test:
                yield checked(batch, "test", self._image_shape)

    def _ready(self, pair: tuple[Tensor, Tensor]) -> Batch:
        """A pair of the loader on the device, normalised; draws no random numbers."""
        image, labels = pair
        labels = moved(labels, self._device).to(torch.int64)
        image = moved(image, self._device)
        if image.dtype == torch.uint8:
            return Batch(self._normalise(image), labels, image)
        x = self._normalise.numerics.boundary(image)
        return Batch(x, labels, self._normalise.invert(image) if image.dim() == 4 else None)
