"""Data sets by name: recipes, and what a newcomer reads when something is missing. No network."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from pipeline.base.data_config import DATA_SETS
from pipeline.base.errors import ConfigError
from pipeline.data import CATALOGUE, Augmentation, open_data
from pipeline.data.catalogue import NAMES

CIFAR_MEAN = (0.49137, 0.48235, 0.44667)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.24706, 0.24353, 0.26157)


def error_of(name: str, root: str = "", **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_data(name, root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_names_get_a_suggestion() -> None:
    assert error_of("cifar-10") == "data.name = 'cifar-10' is no known data set; did you mean 'cifar10'?"
    assert error_of("digits", augment="non") == "data.augment = 'non' is not known; did you mean 'none'?"
    assert "valid names: auto, none" in error_of("digits", augment="xyz")
    assert "data.image_size = -1 is negative" in error_of("digits", image_size=-1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
def test_a_missing_data_set_names_root_and_fix(name: str, tmp_path: Path) -> None:
    assert error_of(name, str(tmp_path)) == (
        f"data.root = '{tmp_path}': {name} is not there or is damaged; set data.root to its directory, "
        "or fetch it with --set data.download=true"
    )
    assert list(tmp_path.iterdir()) == []
    assert error_of(name).startswith(f"data.root is empty; set it to the directory of {name}")


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(self: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)

    assert error_of("cifar10", str(tmp_path), download=True) == (
        f"data.root = '{tmp_path}': cifar10 could not be downloaded (no route to host); "
        "check the connection and that the directory can be written"
    )


def test_svhn_without_scipy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without_scipy(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return real(name, *rest)

    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr(builtins, "__import__", without_scipy)

    assert error_of("svhn", str(tmp_path)) == (
        "data.name = 'svhn' needs the package 'scipy'; install it (pip install scipy)"
    )


class FakeCifar(datasets.CIFAR10):
    """Three images, stored as torchvision stores CIFAR."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.data = np.arange(3 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(3, 32, 32, 3)
        self.targets = [2, 0, 1]
        self.classes = ["a", "b", "c"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, name.upper(), FakeCifar)
    monkeypatch.setattr(datasets, "CIFAR10", FakeCifar)
    data = open_data(name, str(tmp_path))

    assert data.image_shape == (3, 32, 32) and data.classes == ("a", "b", "c")
    assert data.train.labels.tolist() == [2, 0, 1] and data.train.labels.dtype == torch.int64
    assert data.train.images(torch.tensor([0]))[0, :, 0, 1].tolist() == [3, 4, 5]
    assert data.mean == pytest.approx(CIFAR_MEAN, abs=1e-5)
    assert data.std == pytest.approx(CIFAR_STD, abs=1e-5)
    assert data.augmentation == Augmentation(4, "reflect", flip=True)
    assert open_data(name, str(tmp_path), augment="none").augmentation == Augmentation(0)


@pytest.mark.parametrize(
    ("name", "size", "policy"),
    [("svhn", 32, Augmentation(2, "zeros", flip=False)), ("stl10", 96, Augmentation(4, "zeros", flip=True))],
)
def test_svhn_and_stl10(
    name: str, size: int, policy: Augmentation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def fake(root: str, split: str, download: bool) -> SimpleNamespace:
        asked.append((split, download))
        return SimpleNamespace(data=np.zeros((4, 3, size, size), np.uint8), labels=np.array([0, 9, 1, 0]))

    monkeypatch.setattr(datasets, name.upper(), fake)
    data = open_data(name, str(tmp_path))

    assert asked == [("train", False), ("test", False)]
    assert data.image_shape == CATALOGUE[name].image_shape == (3, size, size)
    assert len(data.classes) == CATALOGUE[name].classes == 10
    assert data.mean == data.std == (0.5, 0.5, 0.5)
    assert data.augmentation == policy


def test_the_catalogue_knows_digits_before_they_are_opened() -> None:
    data = open_data("digits")
    assert data.image_shape == CATALOGUE["digits"].image_shape
    assert len(data.classes) == CATALOGUE["digits"].classes


def test_digits_recipe() -> None:
    assert open_data("digits").augmentation == Augmentation(2, "zeros", flip=False)
    assert open_data("digits", augment="none").augmentation == Augmentation(0)


@pytest.mark.parametrize(
    ("size", "mean", "padding"), [(32, CIFAR_MEAN, 4), (64, IMAGENET_MEAN, 8), (4, IMAGENET_MEAN, 0)]
)
def test_folder_recipe(size: int, mean: tuple[float, ...], padding: int, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("x", "y"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (size, size)).save(tmp_path / split / label / "0.png")
    data = open_data("folder", str(tmp_path))

    assert data.mean == pytest.approx(mean, abs=1e-5)
    assert data.augmentation == Augmentation(padding, "reflect", flip=True)


def test_the_configuration_knows_the_names_of_the_catalogue() -> None:
    assert set(DATA_SETS) == {*NAMES, "text"}
