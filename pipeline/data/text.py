"""Text as bytes: a file feeds the first stage with sequences of them and those that follow.

    file     ............................................ | .........      the last tenth is the test set
    epoch      |--- T ---|--- T ---|--- T ---|                             in another order and from another place
               0 .. T-1 shifted                                            in every epoch

A sequence is T + 1 bytes: T that the network is given, and for each the one behind it. What is left behind the last
whole sequence is left out, T bytes at most.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.base.paths import path_of
from pipeline.data.augmentation import hashed
from pipeline.data.epoch import Epoch
from pipeline.data.prefetch import moved, on_device
from pipeline.data.rate import LoaderRate
from pipeline.data.share import WHOLE, Share
from pipeline.data.source import DataSpec
from pipeline.data.stream import epoch_order
from pipeline.local.next_token import NextToken
from pipeline.stage.inlet import Batch

VOCABULARY = 256
_TEST_SHARE = 10
_SHIFT_KEY = 4


def next_byte(config: Config) -> NextToken:
    """What the text is for: the next byte of ``data.length`` ones."""
    return NextToken(VOCABULARY, (config.data.length,))


class TextSource:
    """The bytes of a file (``data.root``), in sequences of ``data.length``; of them the ``share`` of a replica.

    Raises:
        ConfigError: there is no such file, or it is too short.
    """

    def __init__(self, config: Config, numerics: Numerics, share: Share = WHOLE) -> None:
        settings, self._share = config.data, share
        self._length, self._seed, self._device = settings.length, config.train.seed, numerics.device
        self.rate = LoaderRate()
        self._shifts = settings.augment == "auto"
        content = _read(settings.root)
        split = len(content) - len(content) // _TEST_SHARE
        self._train, self._test = content[:split], content[split:]
        # as many sequences from every place that an epoch may begin at
        self._count = (len(self._train) - 1 - (self._length - 1 if self._shifts else 0)) // self._length
        self._tests = (len(self._test) - 1) // self._length
        parts = config.schedule.micro_batches
        self._batch, self._micro_batch = settings.batch_size, settings.batch_size // (parts * share.of)
        epoch = Epoch.of(self._count, self._batch, parts, settings.drop_last)
        if self._tests < 1 or epoch.batches < 1:
            needed = max(self._batch * self._length * _TEST_SHARE // (_TEST_SHARE - 1), _TEST_SHARE * self._length)
            raise ConfigError(
                f"data.root = '{settings.root}' has {len(content):,} bytes, too few for a batch of {self._batch} "
                f"sequences of data.length = {self._length} and a test set; use a file of {2 * needed:,} or more, or "
                "smaller batches"
            )
        epoch.check(settings, self._count, share)
        self.data_spec = DataSpec(
            classes=VOCABULARY,
            inputs=next_byte(config).inputs,
            train_batches=epoch.batches,
            test_batches=-(-self._tests // self._micro_batch),
            train_images=epoch.samples,
        )

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The shuffled sequences of ``epoch``."""
        order = epoch_order(self._count, seed=self._seed, epoch=epoch)
        shift = 0
        if self._shifts:
            shift = int(hashed(torch.tensor([0]), self._seed, epoch, _SHIFT_KEY)) % self._length

        self.rate.begin()

        def make(batch: int) -> Batch:
            started = time.perf_counter()
            numbers = order[batch * self._batch : (batch + 1) * self._batch]
            mine = numbers[self._share.rows(len(numbers))]
            made = self._sequences(self._train, shift + self._length * mine, len(numbers))
            self.rate.add(len(mine), time.perf_counter() - started)
            return made

        return on_device(make, range(start, self.data_spec.train_batches), self._device)

    def test(self) -> Iterator[Batch]:
        """The test sequences in order."""

        def make(batch: int) -> Batch:
            first = batch * self._micro_batch
            numbers = torch.arange(first, min(first + self._micro_batch, self._tests))
            return self._sequences(self._test, self._length * numbers, len(numbers))

        return on_device(make, self._share.batches(self.data_spec.test_batches), self._device)

    def _sequences(self, content: Tensor, starts: Tensor, all_rows: int) -> Batch:
        places = starts[:, None] + torch.arange(self._length + 1)
        found = moved(content[places], self._device).long()
        ids, target = found[:, :-1].contiguous(), found[:, 1:].contiguous()
        return Batch(ids, target, ids, all_rows=all_rows)


def _read(root: str) -> Tensor:
    """uint8 (N,)"""
    if not root:
        raise ConfigError("data.name = 'text' needs a file of text; set data.root=FILE")
    path = Path(path_of(root)).expanduser()
    try:
        return torch.from_numpy(numpy.fromfile(path, dtype=numpy.uint8))
    except OSError as error:
        raise ConfigError(
            f"data.root = '{root}' cannot be read ({error.strerror or error}); give a file of text"
        ) from error
