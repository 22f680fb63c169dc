"""Precision: bf16 gives nearly the losses of float32, boundaries have one dtype and layout, seeds are stable."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import METHODS, tiny_batch, tiny_config, tiny_stage

from pipeline.base.numerics import Numerics, stable_hash


@pytest.mark.parametrize("variant", ["plain", "hpff", "released"])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_gives_nearly_the_losses_of_float32(method: str, variant: str) -> None:
    config = tiny_config(method, variant, 2)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        stage, modules, _ = tiny_stage(config, dtype)
        batch = tiny_batch()
        stage.train_step(1, 0, dataclasses.replace(batch, x=batch.x.to(dtype)))
        stage.test_step(1, 0, dataclasses.replace(batch, x=batch.x.to(dtype)))
        losses.append({(m.plan.index, name): loss for m in modules for name, loss in m.take_losses().items()})
        assert all(p.dtype == torch.float32 for m in modules for p in m.parameters)
    exact, rounded = losses
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value, rel=0.02), name
    assert exact != rounded  # autocast was on


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_boundary_has_one_dtype_and_layout(channels_last: bool) -> None:
    numerics = Numerics(torch.device("cpu"), torch.bfloat16, channels_last)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        passed = numerics.boundary(given)
        assert passed.dtype == torch.bfloat16 and not passed.requires_grad
        assert passed.is_contiguous(memory_format=numerics.layout)


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    assert stable_hash(0, "block", "stem") == stable_hash(0, "block", "stem")
    assert stable_hash(1, "step") == 514933349039795699
    assert 0 <= stable_hash("x") < 1 << 63
