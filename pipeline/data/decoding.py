"""From the bytes of an image file to pixels."""

from __future__ import annotations

import io
import struct

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as TF

from pipeline.errors import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")
JPEG_START = b"\xff\xd8\xff"
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
    image = _decode_jpeg(content) if content.startswith(JPEG_START) else None
    if image is None:
        with Image.open(io.BytesIO(content)) as picture:
            image = TF.pil_to_tensor(picture.convert("RGB"))
    if image_size:
        image = TF.resize(image, [image_size], antialias=True)
        image = TF.center_crop(image, [image_size, image_size])
    return image


def _decode_jpeg(content: bytes) -> Tensor | None:
    """Three times as fast as Pillow on small files; None where it fails, for Pillow to judge."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, AttributeError):  # the latter: torchvision without its image extension
        return None


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
