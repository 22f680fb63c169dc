"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from pipeline.data.augmentation import Augmentation
from pipeline.data.digits import load_digits
from pipeline.data.folder import load_folder
from pipeline.data.images import CachedImages, ImageData, ImageSet
from pipeline.errors import ConfigError, suggest

NAMES = ("digits", "cifar10", "cifar100", "svhn", "stl10", "folder")
Channels = tuple[float, float, float]
CIFAR = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS: tuple[Channels, Channels] = ((0.3058,) * 3, (0.3241,) * 3)  # of the 1,438 training images at 32x32


@dataclass(frozen=True)
class _Recipe:
    """How a torchvision data set is opened, normalised and augmented (ALGORITHMS 1.3)."""

    make: Callable[[str, bool, bool], Any]
    normalisation: tuple[Channels, Channels]
    augmentation: Augmentation


TORCHVISION = {
    "cifar10": _Recipe(
        lambda root, train, download: datasets.CIFAR10(root, train=train, download=download),
        CIFAR,
        Augmentation(4, "reflect", True),
    ),
    "cifar100": _Recipe(
        lambda root, train, download: datasets.CIFAR100(root, train=train, download=download),
        CIFAR,
        Augmentation(4, "reflect", True),
    ),
    "svhn": _Recipe(
        lambda root, train, download: datasets.SVHN(root, split="train" if train else "test", download=download),
        HALF,
        Augmentation(2, "zeros", False),
    ),
    "stl10": _Recipe(
        lambda root, train, download: datasets.STL10(root, split="train" if train else "test", download=download),
        HALF,
        Augmentation(4, "zeros", True),
    ),
}


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
        name: one of NAMES.
        root: directory of the data set; for "folder" a directory or a tar file.
        download: let torchvision fetch what is missing.
        image_size: for "folder": resize the shorter side and crop the centre to this many pixels; 0 = as they are.
        cache_gib: decoded images are kept in memory up to this size.
        augment: "auto" for the published recipe of the data set, "none" for no augmentation.

    Raises:
        ConfigError: unknown name, missing or broken data; the message names the path and the fix.
    """
    if name not in NAMES:
        raise ConfigError(f"data.name = '{name}' is no known data set; {suggest(name, NAMES)}")
    if augment not in ("auto", "none"):
        raise ConfigError(f"data.augment = '{augment}' is not known; {suggest(augment, ('auto', 'none'))}")
    if name == "digits":
        train, test = load_digits()
        data = _data(name, train, test, tuple("0123456789"), DIGITS, Augmentation(2, "zeros", False))
    elif name == "folder":
        train, test, classes = load_folder(root, image_size, cache_gib)
        small = tuple(_shape(train)[1:]) == (32, 32)
        reach = 4 if small else max(1, _shape(train)[1] // 8)
        data = _data(name, train, test, classes, CIFAR if small else IMAGENET, Augmentation(reach, "reflect", True))
    else:
        data = _open_torchvision(name, root, download)
    return data if augment == "auto" else replace(data, augmentation=Augmentation())


def _open_torchvision(name: str, root: str, download: bool) -> ImageData:
    recipe = TORCHVISION[name]
    if not root:
        raise ConfigError(f"data.root is empty; set it to the directory of {name}, for example --set data.root=data")
    splits: list[CachedImages] = []
    classes: tuple[str, ...] = ()
    for train in (True, False):
        try:
            found = recipe.make(str(Path(root).expanduser()), train, download)
        except (RuntimeError, OSError) as error:
            fix = "check the connection" if download else "set data.root, or fetch it with --set data.download=true"
            cause = str(error).splitlines()[0]
            raise ConfigError(f"data.root = '{root}': {name} cannot be opened ({cause}); {fix}") from error
        labels = torch.as_tensor(getattr(found, "targets", None) if hasattr(found, "targets") else found.labels).long()
        pixels = torch.as_tensor(found.data)
        if pixels.shape[-1] == 3:  # CIFAR keeps (N, H, W, C), SVHN and STL-10 (N, C, H, W)
            pixels = pixels.permute(0, 3, 1, 2)
        splits.append(CachedImages(pixels.contiguous(), labels))
        classes = tuple(getattr(found, "classes", ())) or tuple(str(c) for c in range(int(labels.max()) + 1))
    return _data(name, splits[0], splits[1], classes, recipe.normalisation, recipe.augmentation)


def _shape(images: ImageSet) -> tuple[int, ...]:
    return tuple(images.images(torch.tensor([0])).shape[1:])


def _data(
    name: str,
    train: ImageSet,
    test: ImageSet,
    classes: tuple[str, ...],
    normalisation: tuple[Channels, Channels],
    augmentation: Augmentation,
) -> ImageData:
    mean, std = normalisation
    return ImageData(train, test, classes, _shape(train), mean, std, augmentation, name)
