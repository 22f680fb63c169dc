"""Image folders: class directories below train/ and test/ (or val/), in a directory or inside a tar file.

    ROOT/train/CLASS/*.jpg      ROOT may also be ROOT.tar, .tar.gz, .tar.xz, ...; one directory above train/ is allowed
    ROOT/test/CLASS/*.jpg

Images are decoded once and kept in memory where they fit, else each time they are needed. Nothing is extracted to disk.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from pipeline.data.images import DECODE_THREADS, CachedImages, ImageSet, LazyImages
from pipeline.errors import ConfigError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"}
TEST_NAMES = ("test", "val")
GIB = 1 << 30
CHUNK = 512


@dataclass
class _Split:
    """The files of one split: ``read(position)`` gives the encoded bytes of the file ``names[position]``."""

    names: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    read: Callable[[int], bytes] = field(default=lambda position: b"")


def load_folder(root: str, image_size: int, cache_gib: float) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Both splits and the class names (sorted, as torchvision's ImageFolder).

    Raises:
        ConfigError: no such path, missing or empty split, different classes in the splits, a file that is no image, or
            images of different sizes without ``image_size``.
    """
    path = Path(root).expanduser()
    if not root or not path.exists():
        raise ConfigError(
            f"data.root = '{root}': no such directory or tar file; set data.root to a folder with train/ and test/"
        )
    if path.is_dir():
        splits = _scan_directory(path)
        return _build(path, splits, image_size, cache_gib, may_be_lazy=True)
    if not tarfile.is_tarfile(path):
        raise ConfigError(f"data.root = '{root}' is neither a directory nor a tar file")
    compressed = _is_compressed(path)
    splits = _scan_tar(path, compressed, int(cache_gib * GIB))
    return _build(path, splits, image_size, cache_gib, may_be_lazy=not compressed)


def _place(path: PurePosixPath) -> tuple[str, str] | None:
    """(split, class) of a file, or None if it is not an image of a split."""
    if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
        return None
    parts = path.parts[:-1]
    if len(parts) == 3:  # one directory above the splits
        parts = parts[1:]
    if len(parts) != 2 or parts[0] not in ("train", *TEST_NAMES):
        return None
    return ("train" if parts[0] == "train" else "test"), parts[1]


def _scan_directory(root: Path) -> dict[str, _Split]:
    splits = {"train": _Split(), "test": _Split()}
    top = root
    if not (root / "train").is_dir():
        below = [child for child in sorted(root.iterdir()) if (child / "train").is_dir()]
        top = below[0] if len(below) == 1 else root
    for name, folders in (("train", ("train",)), ("test", TEST_NAMES)):
        folder = next((top / f for f in folders if (top / f).is_dir()), None)
        if folder is None:
            wanted = " or ".join(f"{f}/" for f in folders)
            raise ConfigError(f"data.root = '{root}' has no {wanted} directory with one directory per class")
        split = splits[name]
        for file in sorted(folder.glob("*/*")):
            if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
                split.names.append(str(file))
                split.classes.append(file.parent.name)
        split.read = lambda position, split=split: Path(split.names[position]).read_bytes()
    return splits


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _scan_tar(path: Path, compressed: bool, budget: int) -> dict[str, _Split]:
    """One pass over the members. Of a compressed tar the encoded bytes are kept, since it cannot be read at random."""
    splits = {"train": _Split(), "test": _Split()}
    content: dict[str, list[tuple[str, str, bytes | tuple[int, int]]]] = {"train": [], "test": []}
    held = 0
    try:
        with tarfile.open(path, "r|*" if compressed else "r:") as archive:
            for member in archive:
                place = _place(PurePosixPath(member.name)) if member.isfile() else None
                if place is None:
                    continue
                split, label = place
                if compressed:
                    file = archive.extractfile(member)
                    assert file is not None
                    data: bytes | tuple[int, int] = file.read()
                    held += member.size
                    if held > budget:
                        raise ConfigError(
                            f"data.root = '{path}' holds more than data.cache_gib = {budget / GIB:g} GiB and is "
                            "compressed, so it cannot be read at random; extract it, or raise data.cache_gib"
                        )
                else:
                    data = (member.offset_data, member.size)
                content[split].append((member.name, label, data))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(f"data.root = '{path}' cannot be read as a tar file: {error}") from error
    for name, entries in content.items():
        entries.sort(key=lambda entry: (entry[1], entry[0]))
        split_files = splits[name]
        split_files.names = [entry[0] for entry in entries]
        split_files.classes = [entry[1] for entry in entries]
        split_files.read = lambda position, entries=entries: _bytes_at(path, entries[position][2])
    return splits


def _bytes_at(path: Path, where: bytes | tuple[int, int]) -> bytes:
    if isinstance(where, bytes):
        return where
    with path.open("rb") as file:
        file.seek(where[0])
        return file.read(where[1])


def _build(
    path: Path, splits: dict[str, _Split], image_size: int, cache_gib: float, may_be_lazy: bool
) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    for name, split in splits.items():
        if not split.names:
            wanted = "train/" if name == "train" else "test/ or val/"
            raise ConfigError(f"data.root = '{path}' has no images below {wanted}CLASS/; check the layout")
    classes = tuple(sorted(set(splits["train"].classes)))
    other = tuple(sorted(set(splits["test"].classes)))
    if classes != other:
        odd = sorted(set(classes) ^ set(other))
        raise ConfigError(
            f"data.root = '{path}': train has {len(classes)} classes, test has {len(other)}; "
            f"only one of them has '{odd[0]}'; both need the same class directories"
        )
    first = _decode(splits["train"], 0, image_size, None)
    shape = tuple(first.shape)
    total = sum(len(split.names) for split in splits.values()) * first.numel()
    if total > cache_gib * GIB and not may_be_lazy:
        raise ConfigError(
            f"data.root = '{path}' decodes to {total / GIB:.1f} GiB, more than data.cache_gib = {cache_gib:g}, and is "
            "compressed; extract it, or raise data.cache_gib"
        )
    number = {name: index for index, name in enumerate(classes)}
    sets: list[ImageSet] = []
    for name in ("train", "test"):
        split = splits[name]
        labels = torch.tensor([number[label] for label in split.classes])

        def decode(position: int, split: _Split = split) -> Tensor:
            return _decode(split, position, image_size, shape)

        if total > cache_gib * GIB:
            sets.append(LazyImages(decode, labels))
            continue
        pixels = torch.empty(len(labels), *shape, dtype=torch.uint8)
        for start, images in _decoded(decode, len(labels)):
            pixels[start : start + len(images)] = torch.stack(images)
        sets.append(CachedImages(pixels, labels))
    return sets[0], sets[1], classes


def _decoded(decode: Callable[[int], Tensor], count: int) -> Iterator[tuple[int, list[Tensor]]]:
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for start in range(0, count, CHUNK):
            yield start, list(pool.map(decode, range(start, min(start + CHUNK, count))))


def _decode(split: _Split, position: int, image_size: int, shape: tuple[int, ...] | None) -> Tensor:
    """One image as uint8 (3, H, W), resized and cropped to ``image_size`` if that is not 0."""
    name = split.names[position]
    try:
        with Image.open(io.BytesIO(split.read(position))) as picture:
            image = TF.pil_to_tensor(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"'{name}' is no readable image ({error}); remove or replace the file") from error
    if image_size:
        image = TF.resize(image, [image_size], antialias=True)
        image = TF.center_crop(image, [image_size, image_size])
    if shape is not None and tuple(image.shape) != shape:
        raise ConfigError(
            f"'{name}' is {image.shape[2]}x{image.shape[1]} pixels, others are {shape[2]}x{shape[1]}; "
            "give all one size with --set data.image_size=N"
        )
    return image
