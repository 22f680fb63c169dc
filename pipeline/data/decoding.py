"""From the bytes of an image file to pixels."""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.base.errors import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")
# What Pillow's readers raise on damaged files; reading the file itself may add OSError.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    IndexError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def decode(content: bytes, image_size: int) -> Tensor:
    """One image as uint8 (3, H, W), whatever its colours were.

    Args:
        content: the file.
        image_size: if not 0, resize the shorter side to it and crop the centre to a square of it.

    Raises:
        one of UNREADABLE: damaged, or no image.
    """
    with Image.open(io.BytesIO(content)) as picture:
        # Through numpy: half the time of pil_to_tensor. Not torchvision.io, whose decoders are deprecated.
        pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image_size:
        from torchvision.transforms.v2 import functional as TF  # takes a second

        image = TF.resize(image, [image_size], antialias=True)
        image = TF.center_crop(image, [image_size, image_size])
    return image


def size_of(content: bytes) -> tuple[int, int]:
    """(height, width) from the header alone; raises as :func:`decode`."""
    with Image.open(io.BytesIO(content)) as picture:
        return picture.height, picture.width


def unreadable(name: str, error: Exception) -> ConfigError:
    """The error for a file that could not be read or decoded."""
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, UnidentifiedImageError):  # its own text names an object in memory
        cause = "unknown format"
    return ConfigError(f"'{name}' is no readable image ({cause}); remove or replace this file")
