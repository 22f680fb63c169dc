"""Augmentation of whole batches on the device, as a function of (seed, epoch, sample index) only.

A sample's crop and flip come from a counter-based hash, not from a generator's state: they do not depend on the batch,
its order, the number of ranks, threads or the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Pad, crop at random to the old size, flip left-right at random.

    Attributes:
        padding: pixels on each side; 0 = no crop.
        padding_mode: "zeros" or "reflect".
        flip: whether half of the images are mirrored.
    """

    padding: int = 0
    padding_mode: str = "zeros"
    flip: bool = False


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that int64 tensors hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift; ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014) on int64, with wrap-around."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hashed(indices: Tensor, *keys: int) -> Tensor:
    """63 random bits per index, int64 (B,), a function of ``indices`` (int64 (B,)) and ``keys``."""
    x = indices
    for key in keys:
        x = _mix(x + _signed((key + 1) * _GAMMA % (1 << 64)))
    return _shift_right(_mix(x), 1)


def augment(images: Tensor, indices: Tensor, *, seed: int, epoch: int, policy: Augmentation) -> Tensor:
    """Augment a batch.

    Args:
        images: uint8 (B, C, H, W).
        indices: int64 (B,), the samples' positions in the training set.

    Returns:
        uint8 (B, C, H, W) on the device of ``images``.
    """
    if policy.padding == 0 and not policy.flip:
        return images
    indices = indices.to(images.device)
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(batch, height)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if policy.flip:
        flipped = hashed(indices, seed, epoch, 0)[:, None] % 2 == 1
        columns = torch.where(flipped, width - 1 - columns, columns)
    if policy.padding:
        pad = policy.padding
        if policy.padding_mode == "reflect":  # reflection has no uint8 kernel; float32 holds 0..255 exactly
            images = F.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8)
        else:
            images = F.pad(images, (pad,) * 4)
        steps = 2 * pad + 1
        rows = rows + hashed(indices, seed, epoch, 1)[:, None] % steps
        columns = columns + hashed(indices, seed, epoch, 2)[:, None] % steps
    sample = torch.arange(batch, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
