"""A class for every pixel: loss and mean IoU against literal computations, pixels that do not count, and the heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline import ConfigError
from pipeline.local.segmentation import IGNORED, MEAN_IOU, Segmentation, resized
from pipeline.local.task import refuse_unusable
from pipeline.models.heads import Given
from pipeline.models.patches import PatchedHead

TASK = Segmentation(3, (3, 8, 8))


def scene(seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (2, 8, 8), generator=generator, dtype=torch.uint8)
    target[0, :3] = IGNORED
    return torch.randn(2, 3, size, size, generator=generator), target


def test_the_loss_is_the_mean_over_the_pixels_that_count() -> None:
    refuse_unusable(TASK)
    logits, target = scene()
    counting = target != IGNORED
    each = -logits.log_softmax(dim=1).permute(0, 2, 3, 1)[counting].gather(1, target[counting].long()[:, None])
    assert TASK.loss(logits, target).allclose(each.mean())
    assert TASK.loss(logits.bfloat16(), target).dtype == torch.float32


def test_without_a_pixel_that_counts_the_loss_is_zero_with_a_gradient_of_zero() -> None:
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = TASK.loss(logits, torch.full((2, 8, 8), IGNORED, dtype=torch.uint8))
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_mean_iou_is_that_of_the_sets_of_pixels() -> None:
    statistics = torch.zeros(9, dtype=torch.int64)
    inside: dict[int, int] = {}
    either: dict[int, int] = {}
    for seed in (1, 2):
        logits, target = scene(seed)
        statistics += MEAN_IOU.count(logits, target)
        found = logits.argmax(dim=1)
        for name in range(3):
            a, b = (found == name) & (target != IGNORED), target == name
            inside[name] = inside.get(name, 0) + int((a & b).sum())
            either[name] = either.get(name, 0) + int((a | b).sum())
    wanted = 100 * sum(inside[name] / either[name] for name in range(3)) / 3
    assert MEAN_IOU.of(statistics, 4) == pytest.approx(wanted)
    assert MEAN_IOU.better == "higher"


def test_a_class_that_is_nowhere_is_left_out_of_the_mean() -> None:
    target = torch.tensor([[[0, 1], [0, 1]]], dtype=torch.uint8)
    logits = F.one_hot(target.long(), 3).permute(0, 3, 1, 2).float()
    assert MEAN_IOU.of(MEAN_IOU.count(logits, target), 1) == 100.0
    nothing = torch.full((1, 2, 2), IGNORED, dtype=torch.uint8)
    assert MEAN_IOU.of(MEAN_IOU.count(logits, nothing), 1) == 0.0


def test_scores_of_smaller_maps_are_resized_to_the_target() -> None:
    logits, target = scene(size=4)
    whole = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=True)
    assert torch.equal(resized(logits, target), whole)
    assert TASK.loss(logits, target).allclose(TASK.loss(whole, target))
    assert torch.equal(MEAN_IOU.count(logits, target), MEAN_IOU.count(whole, target))


def test_patches_one_after_another_and_at_once_have_the_same_loss() -> None:
    _, target = scene()
    feature = torch.randn(2, 5, 4, 4)
    results = []
    for at_once in (1, 4):
        torch.manual_seed(0)
        head = PatchedHead(lambda: TASK.head((5, 2, 2)), 2, at_once=at_once)
        results.append(head.backward(feature.clone(), Given(target), 1.0))
    assert results[0][1].allclose(results[1][1]) and results[0][0].allclose(results[1][0])


def test_a_module_that_ends_in_no_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="cut elsewhere"):
        TASK.head((12,))
