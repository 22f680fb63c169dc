"""ImageNet and Cityscapes on tiny generated folders: crops, labels, tiles, and what batches depend on."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import load_config, train
from pipeline.base.errors import ConfigError, DataError
from pipeline.base.numerics import Numerics
from pipeline.base.validation import from_dict
from pipeline.data.cityscapes import CityscapesSamples
from pipeline.data.decoded_source import DecodedSource
from pipeline.data.share import WHOLE, Share
from pipeline.local.segmentation import IGNORED
from pipeline.stage.inlet import Batch

NUMERICS = Numerics(torch.device("cpu"), torch.float32, False)
HEIGHT, WIDTH = 24, 48
ROAD, CAR, UNLABELLED = 7, 26, 0  # ids in the files of Cityscapes
ROAD_CLASS, CAR_CLASS = 0, 13


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 6 and 3 images of several sizes, in train/ and val/: class a is dark, b is bright."""
    root = tmp_path_factory.mktemp("imagenet")
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, low in (("a", 0), ("b", 128)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(low, low + 128, (30 + 4 * number, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg" if number else folder / "0.png")
    return root


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images to train on and two to test: road on the left, a car on the right, a border that is not labelled."""
    root = tmp_path_factory.mktemp("cityscapes")
    for split, count in (("train", 5), ("val", 2)):
        for number in range(count):
            ids = np.full((HEIGHT, WIDTH), ROAD, dtype=np.uint8)
            ids[:, WIDTH // 2 :], ids[:2] = CAR, UNLABELLED
            pixels = np.stack([np.where(ids == CAR, 200, 40)] * 3, axis=2).astype(np.uint8) + number
            for kind, suffix, content in (("leftImg8bit", "leftImg8bit", pixels), ("gtFine", "gtFine_labelIds", ids)):
                folder = root / kind / split / f"town{number % 2}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(folder / f"town_{number:06}_{suffix}.png")
    return root


def config(name: str, root: Path, **data: Any) -> Any:
    settings = {"name": name, "root": str(root), "batch_size": 4, "workers": 1, **data}
    return from_dict({"data": settings, "schedule": {"micro_batches": 1}})


def source(name: str, root: Path, share: Share = WHOLE, whole: bool = False, **data: Any) -> DecodedSource:
    return DecodedSource(config(name, root, **data), NUMERICS, share, whole)


def some(batches: Iterator[Batch], count: int = 99) -> list[Batch]:
    with closing(batches):  # type: ignore[type-var]
        return list(itertools.islice(batches, count))


def imagenet(root: Path, **data: Any) -> DecodedSource:
    return source("imagenet", root, image_size=16, **data)


def test_batches_depend_on_seed_and_epoch_alone(photographs: Path) -> None:
    one, two = imagenet(photographs), imagenet(photographs, workers=2)
    whole = some(one.train(1))
    assert one.data_spec.train_batches == len(whole) == 3 and one.data_spec.train_images == 12
    again, late, other = some(two.train(1)), some(two.train(1, 1)), some(one.train(2))
    for batch, same in [*zip(whole, again, strict=True), *zip(whole[1:], late, strict=True)]:
        assert torch.equal(batch.x, same.x) and torch.equal(batch.labels, same.labels)  # type: ignore[arg-type]
    assert not torch.equal(whole[0].image, other[0].image)  # type: ignore[arg-type]
    for index in range(2):
        part = some(imagenet(photographs, share=Share(index, 2)).train(1), 1)[0]
        assert torch.equal(part.image, whole[0].image[2 * index : 2 * index + 2])  # type: ignore[index, arg-type]
        assert part.all_rows == 4


def test_photographs_are_cropped_and_the_test_is_the_centre(photographs: Path) -> None:
    opened = imagenet(photographs, batch_size=12)
    assert (opened.data_spec.classes, opened.data_spec.image_shape) == (2, (3, 16, 16))
    (batch,) = some(opened.train(1))
    assert batch.image is not None and batch.image.shape == (12, 3, 16, 16) and batch.image.dtype == torch.uint8
    bright = batch.image.float().mean(dim=(1, 2, 3)) > 128
    assert torch.equal(bright.long(), batch.labels)
    tests = some(opened.test())
    assert torch.cat([t.labels for t in tests]).tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(photographs / "val" / "a" / "0.png") as picture:  # 30 x 40 -> 18 x 24 -> the centre
        wanted = np.asarray(picture.resize((24, 18), Image.Resampling.BILINEAR))[1:17, 4:20]
    found = tests[0].image[0].permute(1, 2, 0).numpy()  # type: ignore[index]
    assert np.abs(found.astype(int) - wanted).max() <= 2


def test_shares_of_classes_are_made_of_decoded_images_too(photographs: Path) -> None:
    (batch,) = some(imagenet(photographs, mixup=0.4).train(1), 1)
    assert batch.labels.shape == (4, 2) and batch.labels.sum(dim=1).allclose(torch.ones(4))


def test_an_image_that_is_none_is_named_on_one_line(photographs: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        some(imagenet(tmp_path, batch_size=2).train(1))
    assert "/0.jpg' is no readable image" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is larger than the 12 training images of 'imagenet'"):
        imagenet(photographs, batch_size=13, drop_last=True)


def test_labels_are_the_19_classes_and_crops_go_with_their_images(streets: Path) -> None:
    opened = source("cityscapes", streets, crop=(16, 16), batch_size=5)
    assert (opened.data_spec.classes, opened.data_spec.image_shape) == (19, (3, 16, 16))
    seen: set[int] = set()
    for epoch in range(1, 5):
        (batch,) = some(opened.train(epoch))
        assert batch.labels.dtype == torch.uint8 and batch.labels.shape == (5, 16, 16)
        seen |= set(batch.labels.flatten().tolist())
        image = batch.image.float().mean(dim=1)  # type: ignore[union-attr]
        for pixels, labels in zip(image, batch.labels, strict=True):
            road, car = pixels[labels == ROAD_CLASS], pixels[labels == CAR_CLASS]
            assert not len(road) or not len(car) or road.mean() + 30 < car.mean()
    assert seen == {ROAD_CLASS, CAR_CLASS, IGNORED}


def test_tiles_show_every_pixel_once_and_an_evaluation_whole_images(streets: Path) -> None:
    opened = source("cityscapes", streets, crop=(16, 20))
    tests = some(opened.test())
    assert sum(len(t.labels) for t in tests) == 2 * 2 * 3 and len(tests) == opened.data_spec.test_batches
    counted = sum(int((t.labels != IGNORED).sum()) for t in tests)
    assert counted == 2 * (HEIGHT - 2) * WIDTH
    whole = some(source("cityscapes", streets, crop=(16, 20), whole=True).test())
    assert [tuple(t.labels.shape) for t in whole] == [(1, HEIGHT, WIDTH)] * 2


def test_images_of_several_sizes_are_tested_whole_as_well(streets: Path, tmp_path: Path) -> None:
    root = tmp_path / "several"
    shutil.copytree(streets, root)
    for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        for split, number, sides in (("val", 1, (60, 40)), ("train", 1, (30, 50))):
            file = root / kind / split / "town1" / f"town_{number:06}_{suffix}.png"
            Image.open(file).resize(sides, Image.Resampling.NEAREST).save(file)
    opened = source("cityscapes", root, crop=(16, 20), batch_size=5)
    tests = some(opened.test())
    assert len(tests) == opened.data_spec.test_batches == 3
    assert sum(len(t.labels) for t in tests) == 2 * 3 + 3 * 3
    counted = sum(int((t.labels != IGNORED).sum()) for t in tests)
    assert counted == (HEIGHT - 2) * WIDTH + (40 - 3) * 60  # the border has grown with the image
    (batch,) = some(opened.train(1))
    assert batch.labels.shape == (5, 16, 20)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "^'.*/town1/town_000001_gtFine_labelIds.png', the labels of '.*leftImg8bit.png', is not there; copy it"),
        (b"junk", "'.*/gtFine/train/town1/town_000001_gtFine_labelIds.png' is no readable image"),
        ((7, 9), r"'.*_labelIds.png' holds uint8 \(7, 9\) for an image of \(24, 48\); give it a byte for every pixel"),
        ((24, 48, 3), r"'.*_labelIds.png' holds uint8 \(24, 48, 3\) for an image"),
    ],
)
def test_labels_that_cannot_be_are_named_with_their_file(
    content: Any, words: str, streets: Path, tmp_path: Path
) -> None:
    root = tmp_path / "odd"
    shutil.copytree(streets, root)
    file = root / "gtFine" / "train" / "town1" / "town_000001_gtFine_labelIds.png"
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        Image.fromarray(np.zeros(content, dtype=np.uint8)).save(file)
    with pytest.raises(ConfigError, match=words):
        CityscapesSamples(config("cityscapes", root).data).sample("train", 3)


def test_what_is_smaller_than_a_crop_is_padded_with_what_does_not_count(streets: Path) -> None:
    samples = CityscapesSamples(config("cityscapes", streets, crop=(40, 64), augment="none").data)
    image, labels = samples.sample("train", 0)
    assert image.shape == (3, 40, 64) and (labels[HEIGHT:] == IGNORED).all() and (labels[:, WIDTH:] == IGNORED).all()
    assert image[:, -1, -1].tolist() == [124, 116, 104]
    assert samples.count("test") == 2


def test_a_missing_data_set_names_root_and_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cityscapes is not there or is damaged; set data.root"):
        source("cityscapes", tmp_path)
    with pytest.raises(ConfigError, match="data.root is empty"):
        DecodedSource(from_dict({"data": {"name": "cityscapes"}}), NUMERICS)
    with pytest.raises(ConfigError, match="has no train/ directory"):
        imagenet(tmp_path)


@pytest.mark.long
def test_both_are_trained_on_and_resumed(photographs: Path, streets: Path, tmp_path: Path) -> None:
    common = ["model.modules=2", "model.cuts=even", "method.name=greedy", "partition.kind=count", "log.curve=false"]
    common += ["data.workers=1", "data.batch_size=4", "train.epochs=2", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    for name, root, more in (
        ("imagenet", photographs, ["model.name=resnet20", "data.image_size=16"]),
        ("cityscapes", streets, ["model.name=fcn_resnet20", "data.crop=[16,16]", "data.drop_last=true"]),
    ):
        settings = [*common, *more, f"data.name={name}", f"data.root={root}", "runtime.threads=1"]
        full = train(load_config(assignments=settings), run_dir=tmp_path / name, quiet=True)
        at = tmp_path / name / "checkpoints" / "step-00000001"
        resumed = train(load_config(assignments=settings), run_dir=tmp_path / f"{name}2", resume=str(at), quiet=True)
        assert resumed["weights_sha256"] == full["weights_sha256"]
