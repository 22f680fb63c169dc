"""Patches as rows of one batch: the losses and gradients of one patch after another, but for BatchNorm's statistics."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_plan, tiny_stage
from torch import nn

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.models.heads import AuxiliaryHead, DecoderHead, Given, TaskHead, xcyf
from pipeline.models.patch_rows import AsRows
from pipeline.models.patches import PatchedHead

SHARED = {"grid": 2, "statistics": "shared", "at_once": 4}


def head(kind: str) -> AuxiliaryHead:
    if kind == "decoder":
        return DecoderHead(4, 3, 1)
    if kind == "per pixel":
        return TaskHead(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)))
    return TaskHead(xcyf((4, 6, 4), 5, "1c2f", 8, 1))


def two_heads(kind: str) -> tuple[PatchedHead, PatchedHead]:
    """One patch after another, and as rows; the same weights."""
    torch.manual_seed(0)
    patched = PatchedHead(partial(head, kind), 2).double()
    rows = PatchedHead(partial(head, kind), 1, reading=AsRows(2)).double()
    rows.load_state_dict(patched.state_dict())
    return patched, rows


def given_for(kind: str) -> Given:
    target = torch.randint(5, (3, 12, 8) if kind == "per pixel" else (3,))
    return Given(target, torch.randint(256, (3, 3, 12, 8), dtype=torch.uint8) if kind == "decoder" else None)


@pytest.mark.parametrize("kind", ["1c2f", "decoder", "per pixel"])
def test_with_given_statistics_rows_are_patches(kind: str) -> None:
    """Loss, gradients and output, on maps that are no squares."""
    patched, rows = (each.eval() for each in two_heads(kind))
    feature, given = torch.randn(3, 4, 12, 8, dtype=torch.float64), given_for(kind)
    (expected, expected_loss), (found, loss) = (each.backward(feature, given, 0.3) for each in (patched, rows))
    torch.testing.assert_close((found, loss), (expected, expected_loss), rtol=1e-12, atol=1e-15)
    for mine, other in zip(rows.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(rows.logits(feature), patched.logits(feature), rtol=1e-12, atol=1e-15)


def test_in_training_the_statistics_are_those_of_all_patches() -> None:
    patched, rows = two_heads("per pixel")
    feature, given = torch.randn(3, 4, 12, 8, dtype=torch.float64), given_for("per pixel")
    feature[..., :6, :4] += 3
    _, alone = patched.backward(feature, given, 1.0)
    _, shared = rows.backward(feature, given, 1.0)
    norm = rows.first.get_submodule("head.1")
    assert abs(float(alone - shared)) > 1e-3 and int(norm.num_batches_tracked) == 1
    cut = [F.pad(feature[..., r : r + 6, c : c + 4], (1, 1, 1, 1)) for r in (0, 6) for c in (0, 4)]
    with torch.no_grad():
        maps = F.conv2d(torch.cat(cut), *rows.first.get_submodule("head.0").parameters())
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)


def grids(config: Config) -> dict[str, tuple[int, bool]]:
    """Term -> patches along a side, and whether they are rows, of the first module."""
    _, modules, _ = tiny_stage(config)
    heads = [pair for level in modules[0].levels.values() for pair in level.heads()]
    return {name: (patched.grid, isinstance(patched.reading, AsRows)) for name, patched in heads}


def test_the_keys_say_which_heads_see_patches_and_which_statistics() -> None:
    def keys(**more: object) -> Config:
        return tiny_config("infopro", "hpff", 2, patches={"grid": 2, **more})

    assert grids(keys()) == {"reconstruction": (2, False), "task": (2, False)}
    assert grids(keys(heads="reconstruction")) == {"reconstruction": (2, False), "task": (1, False)}
    assert grids(keys(**SHARED)) == {"reconstruction": (1, True), "task": (1, True)}
    assert grids(keys(heads="reconstruction", **SHARED)) == {"reconstruction": (1, True), "task": (1, False)}


@pytest.mark.parametrize(
    ("method", "patches", "told"),
    [
        ("predsim", SHARED, "method.name = 'predsim', whose loss compares the rows"),
        ("infopro-contrast", SHARED, "method.name = 'infopro-contrast', whose loss compares the rows"),
        ("dgl", {**SHARED, "grid": 3}, "which make no patches of one size"),
        ("dgl", {"grid": 2, "heads": "reconstruction"}, "has no head that reconstructs"),
    ],
)
def test_what_cannot_be_is_refused(method: str, patches: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_stage(tiny_config(method, "plain", patches=patches))


def test_separate_decoders_do_not_share_statistics() -> None:
    with pytest.raises(ConfigError, match="a decoder for every patch"):
        tiny_plan(tiny_config("infopro", "released", 2, patches=SHARED))
