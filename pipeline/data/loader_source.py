"""A user's own loaders feed the first stage.

    main thread     loader -> batch 2, checked |  step on batch 1        | loader -> batch 3 | ...
    prefetch thread                               batch 2: copy, normalise

The loader is read in the main thread, one batch ahead: its transforms may draw from torch's random numbers, which are
global to the process, and every local module seeds them before it draws from them. Read in another thread, a loader
would draw from whatever a module has just seeded, and a module from what the loader has left: no run would repeat
another. What draws nothing is done ahead in a thread. Workers (``num_workers``) read ahead in any case.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, DataError
from pipeline.base.flow import LABEL, MAIN, Specs, Tensors, TensorSpec, bare
from pipeline.base.numerics import Numerics, stable_hash
from pipeline.data.catalogue import CIFAR_MEAN_ROUNDED, CIFAR_STD_ROUNDED
from pipeline.data.loader_errors import checked, guarded, named_errors
from pipeline.data.normaliser import Normaliser
from pipeline.data.prefetch import moved, on_device
from pipeline.data.rate import LoaderRate
from pipeline.data.share import WHOLE, Share
from pipeline.data.source import DataSpec
from pipeline.stage.inlet import Batch
from pipeline.stage.watch import Progress

Rows = tuple[Tensors, Tensor, int]
"""Inputs and labels of some rows of a batch, and how many rows that has."""


@dataclass(frozen=True)
class LoaderData:
    """A user's own loaders: iterables with a length that yield (inputs, labels).

    Inputs are images (B, C, H, W), uint8 (normalised here by ``mean`` and ``std``) or floating point, already
    normalised by them; ids (B, T), integers; features (B, T, D); or a dict of named tensors, "x" being one of those and
    the others, such as a mask, given to the network as they are. ``labels`` are integers (B,). Each batch has memory of
    its own: it is drawn before the last one is used up.

    ``max_length``: batches vary in length up to this. The length is the first axis behind the batch of "x", and of
    every tensor that is as long there in the first batch. 0: all batches have the shapes of the first one.
    """

    train: Any
    test: Any
    mean: tuple[float, ...] = CIFAR_MEAN_ROUNDED
    std: tuple[float, ...] = CIFAR_STD_ROUNDED
    max_length: int = 0


class LoaderSource:
    """Feeds the first stage from :class:`LoaderData`; ``progress`` is told of batches that are only read past. Of
    several replicas each reads the same batches and keeps its ``share``: what a loader draws depends on all before.

    Raises:
        ConfigError: a loader without a length, or an empty one, or one whose batches are no (inputs, labels).
        DataError: the loader itself failed.
    """

    def __init__(
        self,
        data: LoaderData,
        config: Config,
        numerics: Numerics,
        progress: Progress | None = None,
        inputs: Specs | None = None,
        target: TensorSpec = LABEL,
        share: Share = WHOLE,
    ) -> None:
        self._data = data
        self._share = share
        self.rate = LoaderRate()
        self._progress = progress
        self._seed = config.train.seed
        self._limit = config.data.batch_size
        self._parts = config.schedule.micro_batches
        self._micro_batch = config.data.batch_size // (config.schedule.micro_batches * share.of)
        self._normalise = Normaliser(data.mean, data.std, numerics)
        self._device = numerics.device
        self._target = target
        if data.max_length and inputs is not None and not any(spec.varies for spec in inputs.values()):
            raise ConfigError(
                f"max_length = {data.max_length}, but the inputs of your task have one length; say in its inputs and "
                "target which axis varies, TensorSpec(shape, dtype, varies=(0,)), or leave max_length out"
            )
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
        tensors, labels = checked(first, "train", inputs, target)
        self._inputs = input_specs(tensors, data.max_length) if inputs is None else inputs
        tests = counts["test"]
        if getattr(data.test, "batch_size", None) is None or data.test.batch_size > self._micro_batch:
            tests = sum(-(-len(y) // self._micro_batch) for _, y in self._tests())  # batches that will be cut
        self.data_spec = DataSpec(0, self._inputs, counts["train"], tests, counts["train"] * len(labels))

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training loader, once; a sampler with ``set_epoch`` is told the epoch. What the loader draws from the
        random numbers of torch, numpy and Python, or from a generator of its own, depends on the epoch only; batches
        before ``start`` are read and dropped. So a resumed run sees what the undisturbed one would have seen (but for
        random transforms in persistent workers: their random numbers go on from epoch to epoch)."""
        set_epoch = getattr(getattr(self._data.train, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        self.rate.begin()
        batches = on_device(self._ready, self._from(epoch, start), self._device, ahead=1)
        return guarded(batches, "train")

    def test(self) -> Iterator[Batch]:
        """The test loader, cut into micro-batches."""
        parts = (
            ({name: x[start : start + self._micro_batch] for name, x in tensors.items()}, part, len(part))
            for tensors, labels in self._tests()
            for start, part in zip(itertools.count(0, self._micro_batch), labels.split(self._micro_batch), strict=False)
        )
        mine = itertools.islice(parts, self._share.index, None, self._share.of)
        return guarded(on_device(self._ready, mine, self._device, ahead=1), "test")

    def _from(self, epoch: int, start: int) -> Iterator[Rows]:
        least = 2 * self._parts * self._share.of
        for number, batch in enumerate(self._drawn("train", "loader", epoch)):
            if number < start:
                if self._progress is not None:
                    self._progress(epoch, number, "reading past batches that are trained already")
                continue
            tensors, labels = checked(batch, "train", self._inputs, self._target)
            if len(labels) > self._limit:
                raise ConfigError(
                    f"the train loader gave {len(labels)} images, data.batch_size is {self._limit}; make them equal"
                )
            if len(labels) < least and least > 2:
                many = f" and {self._share.of} replicas" if self._share.of > 1 else ""
                raise ConfigError(
                    f"the train loader gave {len(labels)} images for schedule.micro_batches = {self._parts}{many}, "
                    "which need two each; drop the short batch (drop_last=True)"
                )
            rows = self._share.rows(len(labels))
            yield {name: x[rows] for name, x in tensors.items()}, labels[rows], len(labels)

    def _drawn(self, which: str, *parts: object) -> Iterator[Any]:
        """A loader with random numbers of its own: modules of this process seed torch's in every step."""
        seed = stable_hash(self._seed, *parts)
        numpy.random.seed(seed % 2**32)
        random.seed(seed)
        loader = getattr(self._data, which)
        for owner in (loader, getattr(loader, "sampler", None)):
            if isinstance(own := getattr(owner, "generator", None), torch.Generator):
                own.manual_seed(seed)
        state = torch.Generator().manual_seed(seed).get_state()
        batches: Iterator[Any] | None = None
        waits = getattr(loader, "num_workers", 0) > 0  # for workers, which keep their times to themselves
        while True:
            started = time.perf_counter()
            with torch.random.fork_rng(devices=[]), named_errors(which):
                torch.set_rng_state(state)
                if batches is None:
                    batches = iter(loader)
                batch = next(batches, None)
                state = torch.get_rng_state()
            if batch is None:
                return
            if not waits and which == "train":
                self.rate.add(len(batch[1]), time.perf_counter() - started)
            yield batch

    def _tests(self) -> Iterator[tuple[Tensors, Tensor]]:
        """The test set, in every replica in one order."""
        for batch in self._drawn("test", "tests"):
            yield checked(batch, "test", self._inputs, self._target)

    def _ready(self, given: Rows) -> Batch:
        """Rows of the loader on the device, normalised; draws no random numbers."""
        tensors, labels, every = given
        labels = moved(labels, self._device).to(self._target.dtype)
        tensors = {name: moved(x, self._device) for name, x in tensors.items()}
        raw = tensors[MAIN]
        pixels, boundary = raw.dtype == torch.uint8, self._normalise.numerics.boundary
        ready = {
            name: self._normalise(x) if pixels and name == MAIN else boundary(x) for name, x in tensors.items()
        }
        if pixels:
            return Batch(bare(ready), labels, raw, all_rows=every)
        is_image = raw.is_floating_point() and raw.dim() == 4
        if is_image:
            return Batch(bare(ready), labels, self._normalise.invert(raw), all_rows=every)
        return Batch(bare(ready), labels, None if raw.is_floating_point() else raw, all_rows=every)


def input_specs(tensors: Tensors, max_length: int = 0) -> Specs:
    """What one batch shows of all.

    Raises:
        ConfigError: it is longer than ``max_length``, which is not 0; it holds images, which have no length.
    """
    length = tensors[MAIN].size(1)
    if max_length and tensors[MAIN].dim() == 4:
        raise ConfigError(f"max_length = {max_length} is for sequences, but the train loader gave images; leave it out")
    if max_length and length > max_length:
        raise ConfigError(f"max_length = {max_length}, but the train loader gave batches of length {length}; raise it")
    specs = {}
    for name, x in tensors.items():
        shape = tuple(x.shape[1:])
        pixels = name == MAIN and x.dtype == torch.uint8
        dtype = torch.float32 if pixels else x.dtype
        if max_length and shape[:1] == (length,):
            specs[name] = TensorSpec((max_length, *shape[1:]), dtype, varies=(0,))
        else:
            specs[name] = TensorSpec(shape, dtype)
    return specs
