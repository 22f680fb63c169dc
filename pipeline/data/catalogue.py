"""Data sets by name, each with its published normalisation and augmentation."""

from __future__ import annotations

from pipeline.base.config import DATA_SETS
from pipeline.base.errors import ConfigError, suggest
from pipeline.data.augmentation import Augmentation
from pipeline.data.digits import load_digits
from pipeline.data.folder import load_folder
from pipeline.data.images import ImageData
from pipeline.data.torchvision_sets import load_torchvision

AUGMENT = ("auto", "none")
Channels = tuple[float, float, float]
CIFAR: tuple[Channels, Channels] = (
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
)
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Of the 1,438 training images at 32x32.
DIGITS: tuple[Channels, Channels] = ((0.3058, 0.3058, 0.3058), (0.3241, 0.3241, 0.3241))
RECIPES: dict[str, tuple[tuple[Channels, Channels], Augmentation]] = {
    "digits": (DIGITS, Augmentation(2, "zeros", flip=False)),
    "cifar10": (CIFAR, Augmentation(4, "reflect", flip=True)),
    "cifar100": (CIFAR, Augmentation(4, "reflect", flip=True)),
    "svhn": (HALF, Augmentation(2, "zeros", flip=False)),
    "stl10": (HALF, Augmentation(4, "zeros", flip=True)),
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
        name: one of DATA_SETS.
        root: directory of the data set; for "folder" a directory or a tar file. "digits" needs none.
        download: let torchvision fetch what is missing.
        image_size: for "folder": resize the shorter side to this many pixels, crop the centre; 0 = as is.
        cache_gib: for "folder": decoded images are kept in memory up to this size, in GiB.
        augment: "auto" for the published recipe of the data set, "none" for no augmentation.

    Raises:
        ConfigError: unknown name, missing or broken data; the message names the path and the fix.
    """
    if name not in DATA_SETS:
        raise ConfigError(f"data.name = '{name}' is no known data set; {suggest(name, DATA_SETS)}")
    if augment not in AUGMENT:
        raise ConfigError(f"data.augment = '{augment}' is not known; {suggest(augment, AUGMENT)}")
    if image_size < 0:
        raise ConfigError(f"data.image_size = {image_size} is negative; give pixels, or 0 for images as is")
    if name == "digits":
        train, test = load_digits()
        classes = tuple("0123456789")
    elif name == "folder":
        train, test, classes = load_folder(root, image_size, cache_gib)
    else:
        train, test, classes = load_torchvision(name, root, download)
    image_shape = tuple(train.images(train.labels.new_zeros(1)).shape[1:])
    (mean, std), policy = RECIPES.get(name) or _folder_recipe(image_shape)
    if augment == "none":
        policy = Augmentation()
    return ImageData(train, test, classes, image_shape, mean, std, policy, name)


def _folder_recipe(image_shape: tuple[int, ...]) -> tuple[tuple[Channels, Channels], Augmentation]:
    """As CIFAR if the images have its size, else as ImageNet with a padding in proportion."""
    height, width = image_shape[1:]
    if (height, width) == (32, 32):
        return RECIPES["cifar10"]
    return IMAGENET, Augmentation(min(height, width) // 8, "reflect", flip=True)
