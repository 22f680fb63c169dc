"""The embedded digits: what they are, how they are split, that their origin is named."""

from __future__ import annotations

import hashlib
from importlib import resources

import numpy as np
import pytest
import torch

from pipeline.data import open_data

COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # per digit, as published for this set
# Of images and target of sklearn.datasets.load_digits(), both as uint8.
SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def stored() -> tuple[np.ndarray, np.ndarray]:
    with resources.files("pipeline.data").joinpath("digits.npz").open("rb") as file:
        found = np.load(file)
        return found["images"], found["labels"]


def test_the_file_holds_the_published_set() -> None:
    images, labels = stored()

    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    assert np.bincount(labels).tolist() == COUNTS
    assert images[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_the_file_equals_scikit_learns_copy() -> None:
    images, labels = stored()

    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == SHA256


def test_every_fifth_is_a_test_image() -> None:
    data = open_data("digits")
    _, labels = stored()

    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.test.labels.tolist() == labels[4::5].tolist()
    assert data.train.labels[:5].tolist() == labels[[0, 1, 2, 3, 5]].tolist()
    assert data.train.labels.dtype == torch.int64
    assert data.classes == tuple("0123456789") and data.name == "digits"


def test_images_are_enlarged_to_32_pixels_and_the_whole_range() -> None:
    data = open_data("digits")
    small, _ = stored()
    pixels = data.test.images(torch.arange(359))

    assert pixels.shape == (359, 3, 32, 32) and pixels.dtype == torch.uint8
    assert data.image_shape == (3, 32, 32)
    assert torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])
    assert int(pixels.min()) == 0 and int(pixels.max()) >= 240
    # In the corners only one source pixel counts.
    corner = torch.from_numpy(small[4::5, 0, 0].astype("float32")) * 255 / 16
    assert torch.equal(pixels[:, 0, 0, 0], corner.round().to(torch.uint8))


def test_constants_are_those_of_the_training_images() -> None:
    data = open_data("digits")
    values = data.train.images(torch.arange(len(data.train))).double() / 255

    assert data.mean == pytest.approx((values.mean().item(),) * 3, abs=1e-4)
    assert data.std == pytest.approx((values.std().item(),) * 3, abs=1e-4)


def test_the_origin_is_named() -> None:
    text = resources.files("pipeline.data").joinpath("digits_attribution.txt").read_text()

    for words in ("Alpaydin", "Kaynak", "UCI", "Optical Recognition of Handwritten Digits", "1998"):
        assert words in text
    for words in ("CC BY 4.0", "scikit-learn", "BSD"):
        assert words in text
