"""CIFAR-10, CIFAR-100, SVHN and STL-10, read by torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import ConfigError
from pipeline.base.paths import path_of
from pipeline.data.images import CachedImages

# (torchvision.datasets, root, train, download) -> the data set. Of SVHN and STL-10 only the labelled "train" split is
# trained on.
OPENERS: dict[str, Callable[[Any, str, bool, bool], Any]] = {
    "cifar10": lambda sets, root, train, download: sets.CIFAR10(root, train=train, download=download),
    "cifar100": lambda sets, root, train, download: sets.CIFAR100(root, train=train, download=download),
    "svhn": lambda sets, root, train, download: sets.SVHN(root, _split(train), download=download),
    "stl10": lambda sets, root, train, download: sets.STL10(root, _split(train), download=download),
}


def _split(train: bool) -> str:
    return "train" if train else "test"


def load_torchvision(
    name: str, root: str, download: bool
) -> tuple[CachedImages, CachedImages, tuple[str, ...]]:
    """Training set, test set and class names of one of OPENERS.

    Raises:
        ConfigError: the data set is not below ``root`` (and may not or could not be downloaded), or SVHN is
            asked for without scipy, which torchvision reads it with.
    """
    if not root:
        raise ConfigError(
            f"data.root is empty; set it to the directory of {name} (--set data.root=DIR), or fetch it there "
            "with --set data.download=true"
        )
    train = _open(name, root, True, download)
    test = _open(name, root, False, download)
    classes = getattr(train, "classes", None) or [str(number) for number in range(10)]  # SVHN names none
    return _cached(train), _cached(test), tuple(classes)


def _open(name: str, root: str, train: bool, download: bool) -> Any:
    from torchvision import datasets  # a second, which other data do without

    try:
        return OPENERS[name](datasets, str(Path(path_of(root)).expanduser()), train, download)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data.name = '{name}' needs the package '{error.name}'; install it (pip install {error.name})"
        ) from error
    except (RuntimeError, OSError) as error:
        if not download:
            raise ConfigError(
                f"data.root = '{root}': {name} is not there or is damaged; set data.root to its directory, "
                "or fetch it with --set data.download=true"
            ) from error
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.root = '{root}': {name} could not be downloaded ({cause}); check the connection and that "
            "the directory can be written"
        ) from error


def _cached(found: Any) -> CachedImages:
    pixels = torch.as_tensor(found.data)
    if hasattr(found, "targets"):  # CIFAR: (N, H, W, C); the others, which have labels: (N, C, H, W)
        return CachedImages(pixels.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(found.targets).long())
    return CachedImages(pixels.contiguous(), torch.as_tensor(found.labels).long())
