"""Data sets by name: what is known of each, with its published normalisation and augmentation, and how it is opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pipeline.base.data_config import CITYSCAPES, DECODED, SHAPES, DataConfig
from pipeline.base.errors import ConfigError, suggest
from pipeline.data.augmentation import Augmentation
from pipeline.data.digits import load_digits
from pipeline.data.folder import load_folder
from pipeline.data.images import ImageData, ImageSet
from pipeline.data.shapes import CLASSES as SHAPE_CLASSES
from pipeline.data.shapes import SIDE, load_shapes
from pipeline.data.torchvision_sets import load_torchvision

Channels = tuple[float, float, float]
"""A value per channel, of pixels in [0, 1]."""


@dataclass(frozen=True)
class CatalogueEntry:
    """What is known of a data set before it is opened.

    Attributes:
        classes: number of classes.
        image_shape: (C, H, W).
        mean, std: of the published recipe.
        augmentation: of the published recipe.
    """

    classes: int
    image_shape: tuple[int, int, int]
    mean: Channels
    std: Channels
    augmentation: Augmentation


CIFAR_MEAN: Channels = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD: Channels = (63.0 / 255, 62.1 / 255, 66.7 / 255)
# Rounded as in most code that is published; for a user's own loaders.
CIFAR_MEAN_ROUNDED: Channels = (0.4914, 0.4824, 0.4467)
CIFAR_STD_ROUNDED: Channels = (0.2471, 0.2435, 0.2616)
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
# Of the 1,438 training images at 32x32.
DIGITS_MEAN: Channels = (0.3058, 0.3058, 0.3058)
DIGITS_STD: Channels = (0.3241, 0.3241, 0.3241)
HALF: Channels = (0.5, 0.5, 0.5)

SHIFTED = Augmentation(2, "zeros", flip=False)  # digits must not be mirrored
SHIFTED_AND_MIRRORED = Augmentation(4, "reflect", flip=True)
CATALOGUE: dict[str, CatalogueEntry] = {
    "digits": CatalogueEntry(10, (3, 32, 32), DIGITS_MEAN, DIGITS_STD, SHIFTED),
    "cifar10": CatalogueEntry(10, (3, 32, 32), CIFAR_MEAN, CIFAR_STD, SHIFTED_AND_MIRRORED),
    "cifar100": CatalogueEntry(100, (3, 32, 32), CIFAR_MEAN, CIFAR_STD, SHIFTED_AND_MIRRORED),
    "svhn": CatalogueEntry(10, (3, 32, 32), HALF, HALF, SHIFTED),
    "stl10": CatalogueEntry(10, (3, 96, 96), HALF, HALF, Augmentation(4, "zeros", flip=True)),
    # Workers augment these, see decoded_source; sides are those of the papers, keys give others.
    "imagenet": CatalogueEntry(1000, (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD, Augmentation()),
    CITYSCAPES: CatalogueEntry(19, (3, 512, 1024), IMAGENET_MEAN, IMAGENET_STD, Augmentation()),
    SHAPES: CatalogueEntry(len(SHAPE_CLASSES), (3, SIDE, SIDE), HALF, HALF, Augmentation()),
}
FOLDER = "folder"
"""A directory or a tar file of images: the name without an entry, of which nothing is known before it is opened."""
NAMES = (*CATALOGUE, FOLDER)
IN_MEMORY = tuple(name for name in NAMES if name not in DECODED)
"""Those that ``open_data`` opens."""
AUGMENT = ("auto", "none")


def open_data(
    name: str,
    root: str = "",
    *,
    download: bool = False,
    image_size: int = 0,
    cache_gib: float = 4.0,
    augment: str = "auto",
) -> ImageData:
    """Open a data set by its name.

    Args:
        name: one of IN_MEMORY.
        root: directory of the data set; for "folder" a directory or a tar file. "digits" and "shapes" need none.
        download: let torchvision fetch what is missing.
        image_size: for "folder": resize the shorter side to this many pixels, crop the centre; 0 = as is.
        cache_gib: for "folder": decoded images are kept in memory up to this size, in GiB.
        augment: "auto" for the published recipe of the data set, "none" for no augmentation.

    Raises:
        ConfigError: unknown name, missing or broken data; the message names the path and the fix.
    """
    if name not in IN_MEMORY:
        raise ConfigError(f"data.name = '{name}' is no known data set; {suggest(name, IN_MEMORY)}")
    if augment not in AUGMENT:
        raise ConfigError(f"data.augment = '{augment}' is not known; {suggest(augment, AUGMENT)}")
    if image_size < 0:
        raise ConfigError(f"data.image_size = {image_size} is negative; give pixels, or 0 for images as is")
    train: ImageSet
    test: ImageSet
    if name == "digits":
        train, test = load_digits()
        classes = tuple("0123456789")
    elif name == SHAPES:
        train, test = load_shapes()
        classes = SHAPE_CLASSES
    elif name == FOLDER:
        train, test, classes = load_folder(root, image_size, cache_gib)
    else:
        train, test, classes = load_torchvision(name, root, download)
    channels, height, width = train.images(torch.zeros(1, dtype=torch.int64)).shape[1:]
    image_shape = (channels, height, width)
    entry = CATALOGUE.get(name) or _folder_entry(len(classes), image_shape)
    policy = entry.augmentation if augment == "auto" else Augmentation()
    return ImageData(train, test, classes, image_shape, entry.mean, entry.std, policy, name)


def known_entry(data: DataConfig) -> CatalogueEntry | None:
    """What is known of ``data.name`` before it is opened, with the sides that the configuration gives its images; None
    for a folder."""
    entry = CATALOGUE.get(data.name)
    if entry is None or data.name not in DECODED:
        return entry
    sides = data.crop if data.name == CITYSCAPES else (data.image_size or entry.image_shape[1],) * 2
    return dataclasses.replace(entry, image_shape=(3, sides[0], sides[1]))


def normalisation(name: str, image_shape: tuple[int, ...]) -> tuple[Channels, Channels] | None:
    """Mean and standard deviation per channel, of pixels in [0, 1], that ``open_data`` gives to images (C, H, W) of a
    data set; None for one that it does not open."""
    if name not in NAMES:
        return None
    channels, height, width = image_shape
    entry = CATALOGUE.get(name) or _folder_entry(0, (channels, height, width))
    return entry.mean, entry.std


def _folder_entry(classes: int, image_shape: tuple[int, int, int]) -> CatalogueEntry:
    """Normalised and augmented as CIFAR if the images have its size, else as ImageNet with a padding in proportion."""
    height, width = image_shape[1:]
    if (height, width) == (32, 32):
        return dataclasses.replace(CATALOGUE["cifar10"], classes=classes)
    augmentation = Augmentation(min(height, width) // 8, "reflect", flip=True)
    return CatalogueEntry(classes, image_shape, IMAGENET_MEAN, IMAGENET_STD, augmentation)
