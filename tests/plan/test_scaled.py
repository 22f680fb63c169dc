"""A step that would take long is planned from a smaller one: its memory is its own, its times are scaled."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tiny import CLASSES, tiny_blocks, tiny_config
from torch import Tensor, nn

from pipeline.base.numerics import Numerics
from pipeline.local.task import Classification
from pipeline.models import backbones
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan import explain as explain_module
from pipeline.plan import scaled
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.cost_profile import Profile
from pipeline.plan.explain import explain
from pipeline.plan.profiling import profile_modules
from pipeline.plan.scaled import scaled_profile, smaller_step
from pipeline.plan.simulate import ModuleCost

CPU = Numerics(torch.device("cpu"), torch.float32, False)


class Tokens(nn.Module):
    """A map (B, C, H, W) -> (B, H W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


class Scores(nn.Linear):
    """(B, T, 4) -> (B, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(dim=1))


def tiny_blocks_for(classes: int) -> Blocks:
    blocks = tiny_blocks()
    blocks["classifier"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
    return blocks


def token_blocks() -> Blocks:
    tokens = [("cut", nn.Conv2d(3, 4, 8, 8)), ("tokens", Tokens()), ("mixed", nn.Linear(4, 4))]
    return OrderedDict([*tokens, ("classifier", Scores(4, CLASSES))])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be measured in the time there is; two networks more."""
    monkeypatch.setattr(scaled, "LONGEST_STEP_S", 1e-9)
    monkeypatch.setitem(backbones._BACKBONES, "tiny", lambda _, classes, sides: tiny_blocks_for(classes))
    monkeypatch.setitem(backbones._BACKBONES, "token-blocks", lambda *_: token_blocks())


def planned(name: str, batch: int, side: int, **sections: dict[str, Any]) -> tuple[Plan, Blocks]:
    sections = {"model": {"name": name, "cuts": "even"}, "data": {"batch_size": batch}, **sections}
    blocks = planned_blocks(name, 3, CLASSES)
    config = tiny_config("greedy", "plain", 2, 3, **sections)
    return make_plan(config, blocks, Classification(CLASSES, (3, side, side)), 1), blocks


def test_a_step_of_seconds_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "LONGEST_STEP_S", 1.0)
    assert smaller_step(*planned("tiny", 8, 128), CPU) is None


def test_memory_is_that_of_the_whole_step_and_times_grow_with_the_pixels() -> None:
    plan, blocks = planned("tiny", 8, 128, schedule={"micro_batches": 2}, train={"accumulate": 2})
    found = smaller_step(plan, blocks, CPU)
    assert found is not None
    smaller, network = found
    assert smaller.config.data.batch_size == 4 and smaller.task.image_shape == (3, 64, 64)
    assert smaller.cut == plan.cut
    profile = scaled_profile(plan, smaller, network, blocks, CPU, 1)
    assert profile.scaled_from == "4 images of 64x64" and profile.batch_size == 8
    whole = profile_modules(plan, blocks, CPU, 0, 1)
    for mine, its in zip(profile.modules, whole.modules, strict=True):
        for field in dataclasses.fields(ModuleCost):
            value, real = getattr(mine, field.name), getattr(its, field.name)
            if field.name.endswith("_bytes"):
                assert value == pytest.approx(real, rel=0.01), field.name
            else:
                assert (value > 0) == (real > 0), field.name


@pytest.mark.parametrize(("name", "side"), [("token-blocks", 128), ("tiny", 130)])
def test_images_keep_their_size_where_the_work_does_not_follow_it(name: str, side: int) -> None:
    """Tokens are no maps; 65 is odd."""
    found = smaller_step(*planned(name, 8, side), CPU)
    assert found is not None
    assert found[0].config.data.batch_size == 2
    assert found[0].task.image_shape == (3, side, side) if name == "token-blocks" else (3, 65, 65)


def test_a_plan_says_what_was_measured_unless_the_whole_step_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def profiled(plan: Plan, *others: object) -> Profile:
        measured.append(plan.config.data.batch_size)
        costs = (ModuleCost(forward_s=1e-3, backward_s=1e-3),) * len(plan.modules)
        return Profile(costs, plan.config.data.batch_size, plan.micro_batch_rows)

    for module in (scaled, explain_module):
        monkeypatch.setattr(module, "profile_modules", profiled)
    config = tiny_config("greedy", "plain", 1, 2, data={"batch_size": 16}, model={"cuts": "even"})
    report = explain(config, 1)
    assert measured == [2] and report.step_s == pytest.approx(16 / 2 * 4e-3)
    assert "on 2 images of 32x32, times scaled by the pixels, memory counted" in report.lines[-1]
    assert all(module.memory_bytes > 0 for module in report.modules)
    report = explain(config, 1, whole=True)
    assert measured == [2, 16] and "scaled" not in report.lines[-1]
