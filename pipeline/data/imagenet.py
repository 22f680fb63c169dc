"""ImageNet, or any large folder of photographs: each is decoded where it is asked for, cropped at random to train on.

    train    a random part (8 to 100 % of the area, sides 3:4 to 4:3), resized to the size; mirrored half of the time
    test     shorter side resized to 8/7 of the size (256 for 224), the centre

(He et al. 2016, Goyal et al. 2017.) The folder has the form of :mod:`pipeline.data.folder`.
"""

from __future__ import annotations

import io
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from pipeline.base.data_config import DataConfig
from pipeline.base.flow import LABEL, TensorSpec
from pipeline.data.catalogue import known_entry
from pipeline.data.decoding import UNREADABLE, unreadable
from pipeline.data.folder import open_folder


class ImageNetSamples:
    """One sample by its number, see :class:`pipeline.data.decoded_source.Samples`.

    Raises:
        ConfigError: see :func:`pipeline.data.folder.open_folder`.
    """

    target: TensorSpec = LABEL

    def __init__(self, settings: DataConfig) -> None:
        from torchvision.transforms import v2  # takes a second

        entry = known_entry(settings)
        assert entry is not None
        self._folder = open_folder(settings.root, settings.cache_gib)
        self._labels = {split: self._folder.labels(split) for split in self._folder.names}
        self.classes = len(self._folder.classes)
        self.image_shape: tuple[int, ...] = entry.image_shape
        side = entry.image_shape[1]
        crop = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()]
        whole = [v2.Resize(side * 8 // 7), v2.CenterCrop(side)]
        self._transforms = {"train": v2.Compose(crop), "test": v2.Compose(whole)}
        if settings.augment == "none":
            self._transforms["train"] = self._transforms["test"]

    def count(self, split: str) -> int:
        """Of "train" or "test"."""
        return len(self._labels[split])

    def sample(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, S, S) and int64 ()."""
        name = self._folder.names[split][index]
        try:
            with Image.open(io.BytesIO(self._folder.files.read(name))) as picture:
                pixels = self._transforms[split](picture.convert("RGB"))
        except UNREADABLE as error:
            raise unreadable(self._folder.place(name), error) from error
        return _tensor(pixels), self._labels[split][index]


def _tensor(picture: Any) -> Tensor:
    """uint8 (C, H, W) of an RGB picture."""
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).contiguous()
