"""Losses against naive loops written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import losses


def test_supervised_contrast_is_the_formula() -> None:
    """Anchors without a positive contribute 0 and stay in the mean."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    z = [row / row.norm() for row in embedding]
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        denominator = sum(math.exp(float(z[i] @ z[j]) / 0.07) for j in others)
        positives = [j for j in others if labels[j] == labels[i]]
        terms = [-(float(z[i] @ z[j]) / 0.07 - math.log(denominator)) for j in positives]
        total += sum(terms) / len(terms) if terms else 0.0
    assert float(losses.supervised_contrast(embedding, labels)) == pytest.approx(total / 6, rel=1e-10)


def test_similarity_of_one_hot_labels() -> None:
    """Adjusted cosine: 1 within a class, -1 / (n - 1) between classes."""
    matrix = losses.similarity_matrix(F.one_hot(torch.tensor([0, 1, 1, 3]), 10).double())
    expected = torch.full((4, 4), -1 / 9, dtype=torch.float64)
    expected.fill_diagonal_(1.0)
    expected[1, 2] = expected[2, 1] = 1.0
    torch.testing.assert_close(matrix, expected, rtol=1e-6, atol=1e-6)


def test_similarity_reduces_maps_to_the_spread_over_positions() -> None:
    feature = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reduced = torch.stack([torch.stack([channel.flatten().std() for channel in sample]) for sample in feature])
    torch.testing.assert_close(losses.similarity_matrix(feature), losses.similarity_matrix(reduced))
    three = feature[:, :3]
    torch.testing.assert_close(losses.similarity_matrix(three), losses.similarity_matrix(three.flatten(1)))


def test_similarity_matching_has_no_nan_gradient_for_constant_features() -> None:
    feature = torch.zeros(4, 5, 2, 2, requires_grad=True)
    losses.similarity_matching(feature, torch.tensor([0, 1, 0, 1]), 2).backward()
    assert feature.grad is not None and torch.isfinite(feature.grad).all()


def test_reconstruction_is_binary_cross_entropy_against_the_image() -> None:
    image = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    logits = torch.tensor([[[[0.5, -1.0], [2.0, 0.0]]]], dtype=torch.float64)
    total = 0.0
    for logit, target in zip(logits.flatten().tolist(), [0.0, 1.0, 0.2, 0.4], strict=True):
        p = 1 / (1 + math.exp(-logit))
        total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    assert float(losses.reconstruction(logits, image)) == pytest.approx(total / 4)
    assert float(losses.reconstruction(logits, image.double() / 255)) == pytest.approx(total / 4)


def test_losses_are_computed_in_full_precision_under_autocast() -> None:
    labels = torch.tensor([0, 1, 1])
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (losses.cross_entropy(logits, labels), losses.supervised_contrast(logits, labels)):
            assert value.dtype == torch.float32
    assert torch.equal(losses.cross_entropy(logits, labels), F.cross_entropy(logits.float(), labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reconstruction_is_the_published_pair_of_operations_where_the_sigmoid_saturates_too(dtype: torch.dtype) -> None:
    """Value and gradient; in float32 a sigmoid is 1 from 17 on, and 0 from -104 on."""
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([-200.0, -104, -90, -40, -28, -20, -16, 0, 16, 16.9, 17.5, 20, 40, 200])
    logits = torch.cat([extremes, 4.0 * torch.randn(50, generator=generator)]).to(dtype).view(1, 1, 8, 8)
    image = torch.randint(0, 256, (1, 1, 8, 8), generator=generator, dtype=torch.uint8)
    values = []
    for loss in (losses.reconstruction, lambda x, u: F.binary_cross_entropy(torch.sigmoid(x), u.to(dtype) / 255)):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, image)
        (0.7 * value).backward()
        values.append((value.detach(), leaf.grad))
    tolerance = {"rtol": 1e-10, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-9}
    for mine, other in zip(*values, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    assert torch.equal(values[0][1] == 0.0, values[1][1] == 0.0)


def test_the_target_has_the_layout_of_the_logits() -> None:
    logits = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    target = losses.image_target(image, logits)
    assert target.is_contiguous(memory_format=torch.channels_last) and torch.equal(target, image / 255.0)
    assert losses.image_target(image, logits.bfloat16()).dtype == torch.float32
