"""Sets of labelled images, in memory or decoded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.augmentation import Augmentation

DECODE_THREADS = 4


class ImageSet(Protocol):
    """Labelled images of one size."""

    labels: Tensor
    """int64 (N,)"""

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (int64 (B,)) as uint8 (B, C, H, W)."""


@dataclass(frozen=True)
class CachedImages:
    """All images decoded, in memory: ``pixels`` uint8 (N, C, H, W), ``labels`` int64 (N,)."""

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
    """

    def __init__(self, decode: Callable[[int], Tensor], labels: Tensor) -> None:
        self._decode = decode
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        """uint8 (B, C, H, W)."""
        return decode_all(self._decode, indices.tolist())


def decode_all(decode: Callable[[int], Tensor], indices: Sequence[int]) -> Tensor:
    """Decode several images in parallel into one uint8 (B, C, H, W)."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        return torch.stack(list(pool.map(decode, indices)))


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
