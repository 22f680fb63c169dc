"""The embedded data set: 1,797 handwritten digits of the UCI optical-recognition set, 8x8, values 0 to 16.

digits.npz was made from scikit-learn's copy, unchanged (attribution: digits_attribution.txt):

    digits = sklearn.datasets.load_digits()
    images, labels = digits.images.astype("uint8"), digits.target.astype("uint8")
    numpy.savez_compressed("digits.npz", images=images, labels=labels)
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.data.images import CachedImages

SIZE = 32
LARGEST = 16
TEST_EVERY = 5


def load_digits() -> tuple[CachedImages, CachedImages]:
    """Train and test split: every fifth image (index 4, 9, ...) is a test image; 1,438 and 359 images.

    Pixels are scaled to 0..255, enlarged bilinearly to 32x32 and repeated in three channels.
    """
    with resources.files("pipeline.data").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file)
        small, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]).long()
    scaled = small[:, None].float() * (255.0 / LARGEST)
    pixels = F.interpolate(scaled, size=SIZE, mode="bilinear", align_corners=False).round().to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1).contiguous()
    test = torch.arange(len(labels)) % TEST_EVERY == TEST_EVERY - 1
    return CachedImages(pixels[~test], labels[~test]), CachedImages(pixels[test], labels[test])
