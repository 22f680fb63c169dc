"""``hierarchy.levels = "together"``: both levels in one action give what they give one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers_calls import Calls
from tiny import METHODS, VARIANTS, gradients, tiny_batch, tiny_config, tiny_stage, train_on, without_updates

from pipeline.base.config import HierarchyConfig
from pipeline.local.local_module import LocalModule
from pipeline.local.roles import plan_hierarchy
from pipeline.stage.schedule import Kind, stage_schedule
from pipeline.stage.stage import Stage


def trained(
    levels: str, method: str, variant: str, image: tuple[int, int, int] = (3, 8, 8), **sections: dict[str, Any]
) -> tuple[Stage, list[LocalModule], int]:
    """A stage of the tiny network after one step without its update, in float64; and the operations of that step."""
    sections["hierarchy"] = {**VARIANTS[variant].get("hierarchy", {}), "levels": levels}
    config = tiny_config(method, variant, 2, 5, **sections)
    stage, modules, _ = tiny_stage(config, torch.float64, image)
    batch = tiny_batch(dtype=torch.float64, image_shape=image)
    with Calls() as calls:
        train_on(without_updates(stage), 0, 0, batch)
    return stage, modules, calls.count


def check_same(method: str, variant: str, **arguments: Any) -> None:
    (one, mine, _), (other, expected, _) = (trained(levels, method, variant, **arguments) for levels in CHOICES)
    alone = [sum(action.kind is Kind.INDEPENDENT for action in stage.schedule) for stage in (one, other)]
    assert alone[0] < alone[1]
    found, wanted = gradients(mine), gradients(expected)
    scale = max(float(g.norm()) for g in wanted.values() if g is not None)
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:  # a bias before BatchNorm has none but rounding
            assert float((found[name] - gradient).norm()) <= 1e-12 * max(float(gradient.norm()), scale), name
    for module, reference in zip(mine, expected, strict=True):
        for level, heads in module.levels.items():
            for mean, other_mean in zip(heads.buffers(), reference.levels[level].buffers(), strict=True):
                torch.testing.assert_close(mean, other_mean, rtol=1e-12, atol=1e-12)
        losses, others = module.losses.open.get(0, {}), reference.losses.open.get(0, {})
        assert losses.keys() == others.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, others[name], rtol=1e-12, atol=0.0)


CHOICES = ("together", "separate")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_both_levels_at_once_give_what_they_give_one_after_the_other(method: str, variant: str) -> None:
    check_same(method, variant)


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("image", [(3, 8, 8), (3, 6, 10)])
def test_also_with_fewer_patches_at_once_or_unequal_ones_and_in_micro_batches(
    at_once: int, image: tuple[int, int, int]
) -> None:
    check_same("infopro", "hpff", image=image, patches={"grid": 2, "at_once": at_once}, schedule={"micro_batches": 2})


def test_both_levels_at_once_take_fewer_operations() -> None:
    together, separate = (trained(levels, "infopro", "hpff", patches={"grid": 2, "at_once": 4}) for levels in CHOICES)
    assert together[2] < 0.75 * separate[2]


def test_the_cascade_level_brings_the_independent_one_along() -> None:
    paper = HierarchyConfig(cascade_span=2, independent_weight=1.0, cascade_weight=1.0)

    def schedule(levels: str) -> str:
        plans = plan_hierarchy(4, dataclasses.replace(paper, levels=levels))
        return " ".join(map(str, stage_schedule(plans, range(1, 2), 1)))

    assert schedule("separate") == "F1.0 C1.0 R1.0->0 I1.0 B1.0 U1"
    assert schedule("together") == "F1.0 C1.0 R1.0->0 B1.0 U1"


def test_a_module_without_one_of_the_levels_is_as_it_was() -> None:
    config = HierarchyConfig(cascade_span=2, independent_weight=0.0, cascade_weight=1.0, levels="together")
    assert not any(plan.together for plan in plan_hierarchy(5, config))
    config = dataclasses.replace(config, independent_weight=1.0)
    assert [plan.together for plan in plan_hierarchy(5, config)] == [False, True, True, True, False]
