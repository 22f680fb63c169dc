"""Mixup and CutMix: what an image and its classes become, and that it depends on seed, epoch and batch only."""

from __future__ import annotations

import itertools
from contextlib import closing
from typing import Any

import helpers_device
import pytest
import torch
from torch import Tensor

from pipeline.base.data_config import DataConfig
from pipeline.base.numerics import Numerics
from pipeline.base.validation import from_dict
from pipeline.data.image_source import ImageSource
from pipeline.data.mixing import Mixer
from pipeline.data.share import Share

IMAGES = torch.randint(0, 256, (6, 3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 3, 3, 0])


def mixed(epoch: int = 1, batch: int = 0, seed: int = 5, **alphas: float) -> tuple[Tensor, Tensor]:
    mixer = Mixer(DataConfig(**alphas), 4, seed)
    needed = mixer.needed(torch.arange(6), slice(0, 6))
    return mixer.train(IMAGES[needed], LABELS[needed], epoch, batch)


def first(batches: Any, number: int = 0) -> Any:
    """A batch of an iterator, whose thread is ended."""
    with closing(batches):
        return next(itertools.islice(batches, number, None))


def of_both(labels: Tensor, before: Tensor, share: Tensor) -> Tensor:
    one_hot = torch.eye(4)
    return share * one_hot[labels] + (1 - share) * one_hot[before]


def test_mixup_blends_an_image_with_the_one_before_it_and_their_classes_alike() -> None:
    images, shares = mixed(mixup=0.4)
    share = shares[1, 1]
    assert 0 < share < 1 and images.dtype == torch.uint8
    assert torch.allclose(shares, of_both(LABELS, LABELS.roll(1), share))
    wanted = share * IMAGES + (1 - share) * IMAGES.roll(1, 0).float()
    assert (images - wanted).abs().max() <= 0.5 + 1e-3


def test_cutmix_pastes_a_box_whose_area_the_classes_show() -> None:
    boxes = []
    for batch in range(20):
        images, shares = mixed(batch=batch, cutmix=1.0)
        pasted = (images != IMAGES).any(dim=1)
        assert torch.equal(images, torch.where(pasted[:, None], IMAGES.roll(1, 0), IMAGES))
        assert torch.allclose(shares, of_both(LABELS, LABELS.roll(1), shares[1, 1]))
        boxes.append((round(float((1 - shares[1, 1]) * 63)), int(pasted.any(dim=0).sum())))
    assert all(by_classes == pixels for by_classes, pixels in boxes) and len(set(boxes)) > 5


def test_what_is_drawn_depends_on_seed_epoch_and_batch_and_not_on_torch() -> None:
    torch.manual_seed(1)
    first = mixed(mixup=1.0, cutmix=1.0)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, mixed(mixup=1.0, cutmix=1.0), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    for other in ({"epoch": 2}, {"batch": 1}, {"seed": 6}):
        assert not torch.equal(first[1], mixed(mixup=1.0, cutmix=1.0, **other)[1])


def test_without_alphas_nothing_is_touched() -> None:
    images, labels = mixed()
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {}])
def test_replicas_make_the_same_of_their_parts_of_a_batch(alphas: dict[str, float]) -> None:
    mixer, batch = Mixer(DataConfig(**alphas), 4, 5), torch.arange(6)
    whole = mixed(**alphas)
    for index in range(3):
        rows = Share(index, 3).rows(6)
        needed = mixer.needed(batch, rows)
        images, labels = mixer.train(IMAGES[needed], LABELS[needed], 1, 0)
        assert torch.equal(images, whole[0][rows]) and torch.equal(labels, whole[1][rows])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_batches_of_a_data_set_carry_shares_for_training_and_whole_classes_for_the_test(kind: str) -> None:
    values: dict[str, Any] = {"data": {"name": "digits", kind: 0.5, "batch_size": 32}}
    source = ImageSource(from_dict(values), Numerics(torch.device("cpu"), torch.float32, False))
    train, test = first(source.train(1)), first(source.test())
    assert train.labels.shape == (32, 10) and train.labels.sum(dim=1).allclose(torch.ones(32))
    assert test.labels.shape == (32, 10) and set(test.labels.flatten().tolist()) == {0.0, 1.0}
    assert train.image is not None and train.image.dtype == torch.uint8
    again, second = first(source.train(1, 1)), first(source.train(1), 1)
    assert torch.equal(again.labels, second.labels) and torch.equal(again.x, second.x)  # type: ignore[arg-type]


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_on_a_device_nothing_waits_and_the_images_are_the_same(
    monkeypatch: pytest.MonkeyPatch, alphas: dict[str, float]
) -> None:
    from torchvision.transforms.v2 import _augment

    monkeypatch.setattr(_augment, "one_hot", lambda labels, num_classes: helpers_device._one_hot(labels, num_classes))
    expected = mixed(**alphas)
    with helpers_device.pretended() as device:
        there = [x[[5, *range(6)]].to(helpers_device.CUDA) for x in (IMAGES, LABELS)]
        device.waits.clear()
        found = Mixer(DataConfig(**alphas), 4, 5).train(*there, 1, 0)
        assert device.waits == {}
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
