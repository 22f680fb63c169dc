"""What feeds the first stage.

Only the process that owns the first local module reads images; the others are told their :class:`DataSpec`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.base.flow import MAIN, Specs
from pipeline.data.rate import LoaderRate
from pipeline.stage.inlet import Batch


@dataclass(frozen=True)
class DataSpec:
    """What every rank must know of the data, whoever reads them.

    Attributes:
        classes: number of classes; 0 if only the network knows.
        inputs: what the network gets; shapes of the longest batch.
        train_batches, test_batches: batches of one epoch and of one test.
        train_images: images of one epoch.
    """

    classes: int
    inputs: Specs
    train_batches: int
    test_batches: int
    train_images: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of "x": (C, H, W) of images, (T,) of ids."""
        return self.inputs[MAIN].shape


class Source(Protocol):
    """Feeds the first stage with batches that are ready on its device.

    Attributes:
        data_spec: what all ranks are told.
        rate: of the training batches of the epoch at work.
    """

    data_spec: DataSpec
    rate: LoaderRate

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` (1-based) from number ``start`` on, at most ``data.batch_size`` images each. They do
        not depend on ``start``."""

    def test(self) -> Iterator[Batch]:
        """The test set, at most one micro-batch of images at a time, nothing left out."""
