"""Sets of labelled images, in memory or decoded when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.augmentation import Augmentation

DECODE_THREADS = min(8, os.cpu_count() or 1)
# A task per tiny image costs more than decoding it; a task of many large images leaves threads without work.
MOST_IMAGES_PER_TASK = 64


class ImageSet(Protocol):
    """Labelled images of one size."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,), or uint8 (N, H, W) of classes of pixels."""

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (int64 (B,)) as uint8 (B, C, H, W)."""


@dataclass(frozen=True)
class CachedImages:
    """All images decoded, in memory: ``pixels`` uint8 (N, C, H, W), ``labels`` as of :class:`ImageSet`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        """uint8 (B, C, H, W)."""
        return self.pixels[indices]


class LazyImages:
    """Images that are decoded, by a few threads, each time they are asked for.

    Args:
        decode: index -> uint8 (C, H, W); must be safe to call from several threads.
        labels: int64 (N,).
        shape: (C, H, W) of every image.
    """

    def __init__(self, decode: Callable[[int], Tensor], labels: Tensor, shape: Sequence[int]) -> None:
        self._decode = decode
        self._shape = tuple(shape)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        """uint8 (B, C, H, W)."""
        pixels = torch.empty(len(indices), *self._shape, dtype=torch.uint8)
        wanted = indices.tolist()

        def fill(position: int) -> None:
            pixels[position] = self._decode(wanted[position])

        in_parallel(fill, len(wanted))
        return pixels


def in_parallel(work: Callable[[int], object], count: int) -> None:
    """Call ``work`` with 0 .. count-1 from a few threads.

    Of several errors the one with the lowest number is raised, and what has not started is left undone.
    """
    size = max(1, min(MOST_IMAGES_PER_TASK, count // (2 * DECODE_THREADS)))

    def some(start: int) -> None:
        for position in range(start, min(start + size, count)):
            work(position)

    pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
    try:
        for _ in pool.map(some, range(0, count, size)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class ImageData:
    """A data set, ready to train on.

    Attributes:
        train, test: the two splits.
        classes: names, in the order of the labels.
        image_shape: (C, H, W).
        mean, std: per channel, of pixel values in [0, 1].
        augmentation: of the training images.
        name: as in ``data.name``.
    """

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    name: str
