"""Image folders: class directories below train/ and test/ (or val/), in a directory or inside a tar file.

    ROOT/train/CLASS/*.jpg      ROOT may also be a .tar, .tar.gz, .tar.bz2 or .tar.xz file,
    ROOT/test/CLASS/*.jpg       and there may be one directory above train/ and test/.

Images are decoded once and kept in memory where they fit, else each time they are needed.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.base.errors import ConfigError
from pipeline.base.paths import path_of
from pipeline.data.decoding import UNREADABLE, decode, size_of, unreadable
from pipeline.data.files import GIB, SPLIT_NAMES, SPLITS, DirectoryFiles, Files, TarFiles
from pipeline.data.images import CachedImages, ImageSet, LazyImages, in_parallel


@dataclass(frozen=True)
class Folder:
    """The image files below a root.

    Attributes:
        root: as the user gave it.
        files: what reads them.
        names: split ("train", "test") -> images, sorted by class and then by file name.
        classes: their names, sorted (as torchvision's ImageFolder).
    """

    root: str
    files: Files
    names: dict[str, list[str]]
    classes: tuple[str, ...]

    def labels(self, split: str) -> Tensor:
        """int64 (N,), the classes of the images of a split."""
        number = {name: index for index, name in enumerate(self.classes)}
        return torch.tensor([number[_class_of(name)] for name in self.names[split]])

    def place(self, name: str) -> str:
        """Where a user finds the file: a path, or for a tar file the archive and the member."""
        return f"{self.root.rstrip('/')}/{name}"


def open_folder(root: str, cache_gib: float) -> Folder:
    """The files of both splits.

    Raises:
        ConfigError: no such path, missing or empty split, different classes in the splits, or a compressed tar larger
            than ``cache_gib``.
    """
    path = Path(path_of(root)).expanduser()
    fix = "set it to a directory or tar file with train/CLASS/*.jpg and test/CLASS/*.jpg"
    if not root:
        raise ConfigError(f"data.root is empty; {fix}")
    if not path.exists():
        raise ConfigError(f"data.root = '{root}' does not exist; {fix}")
    if path.is_dir():
        files: Files = DirectoryFiles(path)
    elif tarfile.is_tarfile(path):
        files = TarFiles(path, cache_gib * GIB)
    else:
        raise ConfigError(f"data.root = '{root}' is no directory and no (gzip, bzip2, xz) tar file; {fix}")
    top = _top(root, files)
    names = {split: _names(root, files, top, split) for split in SPLITS}
    return Folder(root, files, names, _classes(root, names))


def load_folder(root: str, image_size: int, cache_gib: float) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Training set, test set and class names.

    Raises:
        ConfigError: as :func:`open_folder`; a file that is no image, images of different sizes without ``image_size``,
            or a compressed tar too large to cache.
    """
    folder = open_folder(root, cache_gib)
    images = _Images(folder, image_size, cache_gib)
    first = images.decode(folder.names["train"][0], None)
    total = sum(len(n) for n in folder.names.values()) * first.numel()
    lazy = images.must_be_lazy(total)
    sets = [images.make_set(split, tuple(first.shape), lazy) for split in SPLITS]
    return sets[0], sets[1], folder.classes


def _top(root: str, files: Files) -> str:
    """What stands before the splits: "" or one directory with a slash."""
    if any(name in files.folders for name in SPLIT_NAMES):
        return ""
    tops = sorted({f.partition("/")[0] for f in files.folders if f.partition("/")[2] in SPLIT_NAMES})
    if len(tops) > 1:
        raise ConfigError(
            f"data.root = '{root}' has train/, test/ or val/ in several directories ('{tops[0]}', "
            f"'{tops[1]}'); set data.root to one data set"
        )
    return tops[0] + "/" if tops else ""


def _names(root: str, files: Files, top: str, split: str) -> list[str]:
    """The images of a split, sorted by class and then by file name."""
    present = [name for name in SPLITS[split] if top + name in files.folders]
    wanted = " or ".join(f"{name}/" for name in SPLITS[split])
    if not present:
        raise ConfigError(
            f"data.root = '{root}' has no {wanted} directory; put the {split} images in {split}/CLASS/*.jpg"
        )
    below = f"{top}{present[0]}/"
    found = [name for name in files.names if name.startswith(below) and name.count("/", len(below)) == 1]
    if not found:
        raise ConfigError(
            f"data.root = '{root}': {below} has no images in class directories; put them in "
            f"{below}CLASS/*.jpg"
        )
    return sorted(found, key=lambda name: name.split("/"))


def _class_of(name: str) -> str:
    return name.split("/")[-2]


def _classes(root: str, names: dict[str, list[str]]) -> tuple[str, ...]:
    train, test = ({_class_of(name) for name in names[split]} for split in SPLITS)
    for odd, there, missing in ((train - test, "train", "test"), (test - train, "test", "train")):
        if odd:
            raise ConfigError(
                f"data.root = '{root}': class '{min(odd)}' has images in the {there} split but not in the "
                f"{missing} split ({len(train)} and {len(test)} classes in train and test); give both "
                "the same classes"
            )
    if len(train) < 2:
        raise ConfigError(
            f"data.root = '{root}' has only one class ('{min(train)}'); make a directory for each class, at "
            "least two"
        )
    return tuple(sorted(train))


class _Images:
    """Turns names into sets of images of one size."""

    def __init__(self, folder: Folder, image_size: int, cache_gib: float) -> None:
        self._folder = folder
        self._files = folder.files
        self._image_size = image_size
        self._cache_gib = cache_gib

    def must_be_lazy(self, total: int) -> bool:
        """Whether ``total`` decoded bytes do not fit; an error if they cannot be read again."""
        if total <= self._cache_gib * GIB:
            return False
        if not self._files.random_access:
            raise ConfigError(
                f"data.root = '{self._folder.root}' is compressed and its images take {total / GIB:.2g} GiB, more "
                f"than data.cache_gib = {self._cache_gib:g}; extract it and set data.root to the directory, "
                "or raise data.cache_gib"
            )
        return True

    def make_set(self, split: str, shape: tuple[int, ...], lazy: bool) -> ImageSet:
        """The images of a split, which must all have ``shape`` (C, H, W)."""
        names, labels = self._folder.names[split], self._folder.labels(split)
        if lazy:
            if not self._image_size:  # better now, from the headers, than in the middle of an epoch
                in_parallel(lambda position: self._check_header(names[position], shape), len(names))
            return LazyImages(lambda position: self.decode(names[position], shape), labels, shape)
        pixels = torch.empty(len(names), *shape, dtype=torch.uint8)

        def fill(position: int) -> None:
            pixels[position] = self.decode(names[position], shape)

        in_parallel(fill, len(names))
        return CachedImages(pixels, labels)

    def decode(self, name: str, shape: tuple[int, ...] | None) -> Tensor:
        """One image, uint8 (3, H, W); ``shape`` is what it must have."""
        try:
            image = decode(self._files.read(name), self._image_size)
        except UNREADABLE as error:
            raise unreadable(self._folder.place(name), error) from error
        if shape is not None:
            self._check_size(name, (image.shape[1], image.shape[2]), shape)
        return image

    def _check_header(self, name: str, shape: tuple[int, ...]) -> None:
        try:
            size = size_of(self._files.read(name))
        except UNREADABLE as error:
            raise unreadable(self._folder.place(name), error) from error
        self._check_size(name, size, shape)

    def _check_size(self, name: str, size: tuple[int, int], shape: tuple[int, ...]) -> None:
        if size != tuple(shape[1:]):
            raise ConfigError(
                f"'{self._folder.place(name)}' is {size[1]}x{size[0]} pixels, the first image is "
                f"{shape[2]}x{shape[1]}; bring all to one size with --set "
                f"data.image_size=N (for example {min(shape[1:])})"
            )
