"""Cityscapes: street scenes with a class for every pixel, read by torchvision.

    train    resized to 1/2 to 2 of its size, a random crop in which no class has more than 3/4, mirrored half of the
             time, colours distorted; where it is smaller than the crop: the mean colour, labels that do not count
    test     the whole image in tiles of the crop's size, every pixel once
    whole    the whole image, for an evaluation

Image and labels go through the same transforms (torchvision's v2 on tv_tensors), as InfoPro's code for Cityscapes does
(mmsegmentation). Labels are the 19 classes of the benchmark, in order; 255: does not count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.base.data_config import DataConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import TensorSpec
from pipeline.base.paths import path_of
from pipeline.data.catalogue import IMAGENET_MEAN, known_entry
from pipeline.data.decoding import UNREADABLE, unreadable
from pipeline.local.segmentation import IGNORED

SPLITS = {"train": "train", "test": "val"}
LARGEST_SHARE = 0.75  # of one class in a crop
TRIES = 10  # for such a crop


class CityscapesSamples:
    """One sample by its number, see :class:`pipeline.data.decoded_source.Samples`; ``whole``: tests are whole images.

    Raises:
        ConfigError: the data set is not below ``data.root``.
    """

    def __init__(self, settings: DataConfig, whole: bool = False) -> None:
        from torchvision import datasets  # a second, which other data do without

        entry = known_entry(settings)
        assert entry is not None
        self.classes = entry.classes
        self.image_shape: tuple[int, ...] = entry.image_shape
        self.target = TensorSpec(self.image_shape[1:], torch.uint8)
        self._whole, self._augments = whole, settings.augment == "auto"
        self._sets = {split: _open(datasets, settings.root, name) for split, name in SPLITS.items()}
        # What a directory lists comes in any order.
        self._order = {split: sorted(range(len(s)), key=s.images.__getitem__) for split, s in self._sets.items()}
        for split, order in self._order.items():
            if not order:
                where = f"leftImg8bit/{SPLITS[split]}"
                raise ConfigError(f"data.root = '{settings.root}': {where} has no images; copy it again")
        self._class_of_id = _class_of_id(datasets.Cityscapes.classes)
        height, width = self._read("train", 0)[0].shape[-2:]
        self._sides = (height, width)
        self._tiles = _tiles((height, width), self.image_shape[1:])

    def count(self, split: str) -> int:
        """Of "train" or "test"; of the test set all tiles."""
        tiles = 1 if split == "train" or self._whole else len(self._tiles)
        return len(self._order[split]) * tiles

    def sample(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) and uint8 (H, W)."""
        if split == "train":
            return self._random_crop(*self._read(split, index))
        if self._whole:
            return self._read(split, index)
        image, labels = self._read(split, index // len(self._tiles))
        return self._tile(image, labels, self._tiles[index % len(self._tiles)])

    def _read(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """A whole image and its labels."""
        found = self._sets[split]
        number = self._order[split][index]
        try:
            picture, ids = found[number]
            pixels = numpy.array(picture.convert("RGB"))
            labels = torch.from_numpy(self._class_of_id[numpy.array(ids)])
        except UNREADABLE as error:
            raise unreadable(found.images[number], error) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), labels

    def _random_crop(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        sides = self.image_shape[1:]
        pair: Any = (tv_tensors.Image(image), tv_tensors.Mask(labels))
        if self._augments:
            shorter = min(self._sides)
            pair = v2.RandomResize(shorter // 2, 2 * shorter + 1)(*pair)
        crop = v2.RandomCrop([min(side, given) for side, given in zip(sides, pair[1].shape, strict=True)])
        for _ in range(TRIES if self._augments else 1):
            image, labels = crop(*pair)
            counting = labels[labels != IGNORED].long()
            if counting.numel() and counting.bincount().max() < LARGEST_SHARE * counting.numel():
                break
        if self._augments:
            image, labels = v2.RandomHorizontalFlip()(image, labels)
            image, labels = v2.RandomPhotometricDistort()(image, labels)
        return _padded(torch.as_tensor(image), torch.as_tensor(labels), sides)

    def _tile(self, image: Tensor, labels: Tensor, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The tile from (row, column) on; pixels of tiles before it do not count again."""
        row, column = place
        height, width = self.image_shape[1:]
        image, labels = image[:, row : row + height, column : column + width], labels[row : row + height].clone()
        labels = labels[:, column : column + width]
        labels[: -row % height] = IGNORED
        labels[:, : -column % width] = IGNORED
        return _padded(image, labels, (height, width))


def _open(datasets: Any, root: str, split: str) -> Any:
    fix = "with leftImg8bit/train, leftImg8bit/val, gtFine/train and gtFine/val"
    if not root:
        raise ConfigError(f"data.root is empty; set it to the directory of Cityscapes, {fix}")
    try:
        return datasets.Cityscapes(str(Path(path_of(root)).expanduser()), split=split, target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"data.root = '{root}': Cityscapes is not there or is damaged; set data.root to its directory, {fix}"
        ) from error


def _class_of_id(classes: Any) -> Any:
    """uint8 (256,): label id in the files -> class, or IGNORED."""
    table = numpy.full(256, IGNORED, dtype=numpy.uint8)
    for known in classes:
        if known.id >= 0 and 0 <= known.train_id < IGNORED:
            table[known.id] = known.train_id
    return table


def _tiles(sides: tuple[int, int], crop: tuple[int, ...]) -> list[tuple[int, int]]:
    """(row, column) of tiles that cover an image; the last of a row or column overlaps the one before it."""
    last = [max(side - size, 0) for side, size in zip(sides, crop, strict=True)]
    rows, columns = ([*range(0, end, size), end] for end, size in zip(last, crop, strict=True))
    return [(row, column) for row in rows for column in columns]


def _padded(image: Tensor, labels: Tensor, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """At the right and below, to ``sides`` at least: the colour that normalisation makes 0, and IGNORED."""
    below, right = (max(side - given, 0) for side, given in zip(sides, labels.shape, strict=True))
    if not below and not right:
        return image.contiguous(), labels.contiguous()
    colours = [F.pad(c, (0, right, 0, below), value=round(255 * m)) for c, m in zip(image, IMAGENET_MEAN, strict=True)]
    return torch.stack(colours), F.pad(labels, (0, right, 0, below), value=IGNORED)
