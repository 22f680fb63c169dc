"""Cityscapes: street scenes with a class for every pixel, read by torchvision.

    train    resized to 1/2 to 2 of its size, a random crop in which no class has more than 3/4, mirrored half of the
             time, colours distorted; where it is smaller than the crop: the mean colour, labels that do not count
    test     the whole image in tiles of the crop's size, every pixel once
    whole    the whole image, for an evaluation

Those of the benchmark have one size; others in its directories may have several, an image and its labels one.

Image and labels go through the same transforms (torchvision's v2 on tv_tensors), as InfoPro's code for Cityscapes does
(mmsegmentation). Labels are the 19 classes of the benchmark, in order; 255: does not count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.base.data_config import DataConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import TensorSpec
from pipeline.base.paths import path_of
from pipeline.data.catalogue import IMAGENET_MEAN, known_entry
from pipeline.data.decoding import UNREADABLE, unreadable
from pipeline.data.images import in_parallel
from pipeline.local.segmentation import IGNORED

SPLITS = {"train": "train", "test": "val"}
LARGEST_SHARE = 0.75  # of one class in a crop
TRIES = 10  # for such a crop


class CityscapesSamples:
    """One sample by its number, see :class:`pipeline.data.decoded_source.Samples`; ``whole``: tests are whole images.

    Raises:
        ConfigError: the data set is not below ``data.root``, labels of an image are not there, or a test image is none.
    """

    def __init__(self, settings: DataConfig, whole: bool = False) -> None:
        from torchvision import datasets  # a second, which other data do without

        entry = known_entry(settings)
        assert entry is not None
        self.classes = entry.classes
        self.image_shape: tuple[int, ...] = entry.image_shape
        self.target = TensorSpec(self.image_shape[1:], torch.uint8)
        self._whole, self._augments = whole, settings.augment == "auto"
        self._files = {split: _files(datasets, settings.root, name) for split, name in SPLITS.items()}
        self._class_of_id = _class_of_id(datasets.Cityscapes.classes)
        tests = [] if whole else self._files["test"]
        sides = [(0, 0)] * len(tests)

        def look(number: int) -> None:
            sides[number] = _sides_of(tests[number][0])

        in_parallel(look, len(tests))
        self._tiles = [(n, place) for n, size in enumerate(sides) for place in _tiles(size, self.image_shape[1:])]

    def count(self, split: str) -> int:
        """Of "train" or "test"; of the test set all tiles."""
        return len(self._files[split] if split == "train" or self._whole else self._tiles)

    def sample(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) and uint8 (H, W)."""
        if split == "train":
            return self._random_crop(*self._read(split, index))
        if self._whole:
            return self._read(split, index)
        number, place = self._tiles[index]
        return self._tile(*self._read(split, number), place)

    def _read(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """A whole image and its labels."""
        path, of_labels = self._files[split][index]
        pixels, ids = _content(path, "RGB"), _content(of_labels)
        if ids.shape != pixels.shape[:2] or ids.dtype != numpy.uint8:
            raise ConfigError(
                f"'{of_labels}' holds {ids.dtype} {ids.shape} for an image of {pixels.shape[:2]}; give it a byte for "
                "every pixel, the label"
            )
        labels = torch.from_numpy(self._class_of_id[ids])
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), labels

    def _random_crop(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        sides = self.image_shape[1:]
        pair: Any = (tv_tensors.Image(image), tv_tensors.Mask(labels))
        if self._augments:
            shorter = min(labels.shape)
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


def _files(datasets: Any, root: str, split: str) -> list[tuple[str, str]]:
    """Image and labels of every sample, in order of the images."""
    fix = "with leftImg8bit/train, leftImg8bit/val, gtFine/train and gtFine/val"
    if not root:
        raise ConfigError(f"data.root is empty; set it to the directory of Cityscapes, {fix}")
    try:
        found = datasets.Cityscapes(str(Path(path_of(root)).expanduser()), split=split, target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"data.root = '{root}': Cityscapes is not there or is damaged; set data.root to its directory, {fix}"
        ) from error
    # What a directory lists comes in any order.
    files = sorted((image, target) for image, (target,) in zip(found.images, found.targets, strict=True))
    if not files:
        raise ConfigError(f"data.root = '{root}': leftImg8bit/{split} has no images; copy it again")
    missing = next((pair for pair in files if not Path(pair[1]).is_file()), None)
    if missing is not None:
        image = Path(missing[0]).name
        raise ConfigError(f"'{missing[1]}', the labels of '{image}', is not there; copy it, or remove the image")
    return files


def _content(path: str, mode: str = "") -> Any:
    """(H, W, 3) of "RGB"; else what the file holds, such as (H, W)."""
    try:
        with Image.open(path) as picture:
            return numpy.array(picture.convert(mode) if mode else picture)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _sides_of(path: str) -> tuple[int, int]:
    """(H, W), of the header alone."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except UNREADABLE as error:
        raise unreadable(path, error) from error


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
