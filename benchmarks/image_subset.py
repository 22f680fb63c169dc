"""Some of the images of a folder, as a folder of links: the same ones every time, evenly from all classes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline import ConfigError


def subset(source: Path, images: int, root: Path) -> Path:
    """A folder below ``root`` with ``images`` of the training images of ``source`` and all of its test images; 0:
    ``source`` itself. Of every class the first by name, which is no order of difficulty in any usual data set.

    Raises:
        ConfigError: ``source`` has no train/CLASS and test/CLASS, or too few images.
    """
    source = source.absolute()
    train, test = source / "train", source / "test"
    classes = sorted(path.name for path in train.iterdir() if path.is_dir()) if train.is_dir() else []
    if not classes or not test.is_dir():
        raise ConfigError(f"--data {source}: no train/CLASS and test/CLASS in it; unpack a tar file first")
    if not images:
        return source
    target = root / f"images-{images}"
    if target.is_dir():
        return target
    building = target.with_suffix(f".{os.getpid()}")
    for index, name in enumerate(classes):
        wanted = images // len(classes) + (index < images % len(classes))
        found = sorted(path for path in (train / name).iterdir() if path.is_file())[:wanted]
        if len(found) < wanted:
            raise ConfigError(f"--train-images {images}: class '{name}' in {train} has only {len(found)} images")
        folder = building / "train" / name
        folder.mkdir(parents=True)
        for path in found:
            (folder / path.name).symlink_to(path)
    (building / "test").symlink_to(test)
    try:
        building.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(building)
    return target
