"""Augmentation of whole batches on the device, as a function of (seed, epoch, sample index) only.

A sample's crop and flip come from a counter-based hash, not from a generator's state: they do not depend on
the batch, its order, the number of ranks, threads or the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Pad, crop at random to the old size, flip left-right at random.

    Attributes:
        padding: pixels on each side; 0 = no crop. Reflection needs it smaller than the image.
        padding_mode: "zeros" (black) or "reflect" (mirrored, the border pixel not repeated).
        flip: whether half of the images are mirrored.
    """

    padding: int = 0
    padding_mode: Literal["zeros", "reflect"] = "zeros"
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
    """Augment a batch: crop first, then flip.

    Args:
        images: uint8 (B, C, H, W).
        indices: int64 (B,), the samples' positions in the training set.

    Returns:
        uint8 (B, C, H, W) on the device of ``images``; ``images`` itself if the policy changes nothing.
    """
    indices = indices.to(images.device)
    if policy.padding:
        height, width = images.shape[2:]
        # All crops of an image as one strided view: a batch of crops is then a single indexed copy.
        crops = _pad(images, policy).unfold(2, height, 1).unfold(3, width, 1)
        steps = 2 * policy.padding + 1
        top = hashed(indices, seed, epoch, 1) % steps
        left = hashed(indices, seed, epoch, 2) % steps
        images = crops[torch.arange(len(images), device=images.device), :, top, left]
    if policy.flip:
        flipped = hashed(indices, seed, epoch, 0) % 2 == 1
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def _pad(images: Tensor, policy: Augmentation) -> Tensor:
    """uint8 (B, C, H + 2p, W + 2p)."""
    if policy.padding_mode == "zeros":
        return F.pad(images, (policy.padding,) * 4)
    # torch has no reflection kernel for uint8, and a detour through float32 would quadruple the traffic.
    for dim in (2, 3):
        last = images.shape[dim] - 1
        outer = torch.arange(-policy.padding, last + policy.padding + 1, device=images.device)
        images = images.index_select(dim, last - (last - outer.abs()).abs())
    return images
