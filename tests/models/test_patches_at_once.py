"""All patches of a feature at once: the same loss, gradients and running statistics as one patch after another."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.heads import (
    AuxiliaryHead,
    ContrastHead,
    DecoderHead,
    Given,
    SimilarityHead,
    TaskHead,
    dgl_head,
    pooled_linear,
    xcyf,
)
from pipeline.models.layers import VectorInput
from pipeline.models.patches import PatchedHead, rectangles

CHANNELS, CLASSES, BATCH = 8, 5, 6
NHWC, NCHW = torch.channels_last, torch.contiguous_format
TASK_HEADS = ("mlp-sr", "mlp", "cnn", "auglocal", "0c1f", "1c2f", "2c3f", "predsim")


def head(kind: str, side: int) -> AuxiliaryHead:
    """One of the built-in heads, for patches of ``side`` x ``side``; and what a task of one's own may bring."""
    shape = (CHANNELS, side, side)
    match kind:
        case "decoder":
            return DecoderHead(CHANNELS, 3, 1)
        case "similarity":
            return SimilarityHead(CHANNELS, CLASSES)
        case "contrast":
            return ContrastHead(xcyf(shape, 16, "1c2f", 16, 1), 0.07)
        case "predsim":
            return TaskHead(pooled_linear(shape, CLASSES, 16))
        case "per pixel":  # with a loss that is no mean over equal parts
            network = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(),
                                    nn.Conv2d(4, CLASSES, 1))  # fmt: skip
            return TaskHead(network, partial(F.cross_entropy, ignore_index=0))
        case "sequence":
            return TaskHead(nn.Sequential(nn.Linear(CHANNELS, CLASSES)), lambda x, y: F.cross_entropy(x.mT, y))
        case "tokens":
            return TaskHead(nn.Sequential(VectorInput(), *xcyf((CHANNELS, 1, 1), CLASSES, "0c2f", 8, 1)))
    return TaskHead(xcyf(shape, CLASSES, kind, 8, 1) if "f" in kind else dgl_head(shape, CLASSES, kind))


def feature_for(kind: str, side: int, layout: torch.memory_format) -> tuple[Tensor, Given]:
    """A feature in float64 and what goes with it."""
    labels = torch.tensor([0, 1, 2, 0, 1, 4])
    if kind in ("sequence", "tokens"):
        target = torch.randint(CLASSES, (BATCH, 12)) if kind == "sequence" else labels
        return torch.randn(BATCH, 12, CHANNELS, dtype=torch.float64), Given(target)
    feature = torch.randn(BATCH, CHANNELS, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    target = torch.randint(CLASSES, (BATCH, side, side)) if kind == "per pixel" else labels
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8) if kind == "decoder" else None
    return feature, Given(target, image)


def check_equal(patched: PatchedHead, feature: Tensor, given: Given, tolerance: float = 1e-12) -> None:
    """Two micro-batches, the second one with a gradient to add to, against one patch after another."""
    one_by_one = copy.deepcopy(patched)
    one_by_one.at_once = 1
    start = torch.randn_like(feature)
    for mine, other in ((None, None), (start.clone(), start.clone())):
        mine, value = patched.backward(feature, given, 0.3, mine)
        other, expected = one_by_one.backward(feature, given, 0.3, other)
        assert mine.stride() == other.stride() and value.dtype == expected.dtype
        assert abs(float(value - expected)) <= tolerance * abs(float(expected))
        assert float((mine - other).norm()) <= tolerance * float(other.norm())
    pairs = list(zip(patched.parameters(), one_by_one.parameters(), strict=True))
    scale = max(float(other.grad.norm()) for _, other in pairs)  # a bias before BatchNorm has none but rounding
    for mine, other in pairs:
        assert mine.grad.shape == other.grad.shape
        assert float((mine.grad - other.grad).norm()) <= tolerance * max(float(other.grad.norm()), scale)
    for (name, mine), other in zip(patched.named_buffers(), one_by_one.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, msg=name)
        assert not name.endswith("tracked") or int(mine) == 2 * (1 if patched.separate else patched.grid**2)


@pytest.mark.parametrize("layout", [NHWC, NCHW])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", [*TASK_HEADS, "decoder", "similarity", "contrast", "per pixel"])
def test_all_patches_at_once_give_what_they_give_one_by_one(
    kind: str, separate: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    patched = PatchedHead(partial(head, kind, 8), 2, separate, at_once=4).double().to(memory_format=layout)
    feature, given = feature_for(kind, 16, layout)
    assert patched.together(feature, given)
    check_equal(patched, feature, given)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("at_once", [2, 5, 9])
@pytest.mark.parametrize(("kind", "image_side"), [("2c2f", 12), ("decoder", 12), ("decoder", 15), ("decoder", 24)])
def test_some_patches_at_once_give_what_they_give_one_by_one(
    kind: str, image_side: int, at_once: int, separate: bool
) -> None:
    """In parts of a row, in rows, all of 3 x 3; a decoder that upsamples not at all, first, and after its taps."""
    torch.manual_seed(0)
    patched = PatchedHead(partial(head, kind, 4), 3, separate, at_once=at_once).double()
    feature, given = feature_for(kind, 12, NHWC)
    given = Given(given.target, torch.randint(0, 256, (BATCH, 3, image_side, image_side), dtype=torch.uint8))
    assert patched.together(feature, given)
    check_equal(patched, feature, given)


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_parts_of_a_sequence_at_once_give_what_they_give_one_by_one(kind: str) -> None:
    torch.manual_seed(0)
    patched = PatchedHead(partial(head, kind, 1), 3, at_once=3).double()
    feature, given = feature_for(kind, 12, NCHW)
    assert patched.together(feature, given)
    one_by_one = copy.deepcopy(patched)
    one_by_one.at_once = 1
    (mine, value), (other, expected) = patched.backward(feature, given, 0.3), one_by_one.backward(feature, given, 0.3)
    torch.testing.assert_close((mine, value), (other, expected), rtol=1e-12, atol=1e-15)
    for mine, other in zip(patched.parameters(), one_by_one.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-15)


def test_blocks_of_patches_cover_the_grid_once_in_order_and_are_no_larger_than_asked() -> None:
    for grid in (1, 2, 3, 5):
        for most in (1, 2, 3, 4, 7, 100):
            blocks = [[row * grid + column for row in a for column in b] for a, b in rectangles(grid, grid, most)]
            assert [patch for block in blocks for patch in block] == list(range(grid * grid))
            assert max(map(len, blocks)) <= most


class Shifted(TaskHead):
    """A loss of its own, which nobody promised for patches at once."""

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return super().loss(feature, given) + feature.square().mean()


def network(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(CHANNELS, CLASSES, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "make",
    [
        lambda: TaskHead(network(nn.Dropout(0.5))),
        lambda: TaskHead(network(nn.GroupNorm(1, CLASSES))),
        lambda: TaskHead(network(nn.BatchNorm2d(CLASSES, momentum=None))),
        lambda: TaskHead(network(nn.Conv2d(CLASSES, CLASSES, 3, padding=1, padding_mode="reflect"))),
        lambda: TaskHead(network(nn.utils.spectral_norm(nn.Conv2d(CLASSES, CLASSES, 1)))),
        lambda: Shifted(network()),
    ],
    ids=["dropout", "groupnorm", "cumulative average", "padding", "hook", "own loss"],
)
def test_heads_that_do_not_say_so_see_one_patch_after_another(make: partial[AuxiliaryHead]) -> None:
    """To the bit, random numbers too."""
    torch.manual_seed(0)
    patched = PatchedHead(make, 2, at_once=4)
    one_by_one = copy.deepcopy(patched)
    one_by_one.at_once = 1
    feature, given = torch.randn(BATCH, CHANNELS, 8, 8), Given(torch.tensor([0, 1, 2, 0, 1, 4]))
    torch.manual_seed(1)
    mine, _ = patched.backward(feature, given, 1.0)
    torch.manual_seed(1)
    other, _ = one_by_one.backward(feature, given, 1.0)
    assert torch.equal(mine, other)
    for mine, other in zip(patched.buffers(), one_by_one.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_patches_of_unequal_size_come_one_after_another() -> None:
    patched = PatchedHead(partial(head, "1c2f", 4), 2, at_once=4)
    assert not patched.together(torch.zeros(BATCH, CHANNELS, 7, 8), Given(torch.zeros(BATCH, dtype=torch.int64)))
    assert patched.together(torch.zeros(BATCH, CHANNELS, 6, 8), Given(torch.zeros(BATCH, dtype=torch.int64)))


class Calls(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["decoder", "2c2f", "mlp-sr", "similarity"])
def test_the_number_of_operations_does_not_grow_with_the_number_of_patches(kind: str) -> None:
    def operations(grid: int, at_once: int) -> int:
        patched = PatchedHead(partial(head, kind, 16 // grid), grid, at_once=at_once).to(memory_format=NHWC)
        feature, given = feature_for(kind, 16, NHWC)
        with Calls() as calls:
            patched.backward(feature.float(), given, 1.0)
        return calls.count

    assert operations(4, 16) < 1.4 * operations(2, 4)
    assert operations(2, 4) < 0.5 * operations(2, 1)
