"""``hierarchy.levels = "auto"``: both levels together where that is cheaper and nobody waits for the cascade first."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CLASSES, IMAGE, METHODS, tiny_blocks, tiny_config, tiny_plan
from torch import nn

from pipeline import TaskHead, Term, load_config, register_method
from pipeline.base.numerics import Numerics
from pipeline.local.task import Classification
from pipeline.plan import counted_costs as counted_costs_module
from pipeline.plan import explain as explain_module
from pipeline.plan import measured_placement
from pipeline.plan.assembly import Plan, write_plan
from pipeline.plan.cost_profile import Profile
from pipeline.plan.counted_costs import counted_costs
from pipeline.plan.explain import explain
from pipeline.plan.level_choice import choose_levels, joinable, levels_line
from pipeline.plan.module_flops import Uncountable, by_kind
from pipeline.plan.predicted import predicted
from pipeline.plan.profiling import profile_modules
from pipeline.plan.simulate import ModuleCost
from pipeline.ranks.team import Team
from pipeline.stage.schedule import Kind

CPU = Numerics(torch.device("cpu"), torch.float32, False)
# Together they save 1 of 6 s, and what the cascade sends upstream leaves 3 s later.
COST = ModuleCost(forward_s=1.0, cascade_s=2.0, independent_s=4.0, relay_s=1.0, backward_s=2.0, together_s=5.0)
LONG_FORWARD = dataclasses.replace(COST, forward_s=4.0)
"""A rank waits for the gradient of the next one: that one's forward is as long as its own independent level."""


def auto_plan(stages: Sequence[int] = (5,), method: str = "infopro", variant: str = "hpff", **sections: Any) -> Plan:
    """Of five modules, so many on each rank; modules 1 to 3 have both levels."""
    levels = {"levels": "auto", **sections.pop("hierarchy", {})}
    plan = tiny_plan(tiny_config(method, variant, 2, 5, hierarchy=levels, **sections), len(stages))
    ends = list(itertools.accumulate(stages))
    return plan.placed(tuple(range(end - size, end) for size, end in zip(stages, ends, strict=True)))


def chosen(stages: Sequence[int], cost: ModuleCost, **sections: Any) -> list[int]:
    return list(choose_levels(auto_plan(stages, **sections), [cost] * 5).levels_together)


# --- who waits --------------------------------------------------------------------------------------------------------


def test_ranks_keep_the_cascade_first_where_the_rank_before_waits_for_it() -> None:
    assert chosen([1, 1, 1, 1, 1], LONG_FORWARD) == []


def test_where_nobody_waits_both_levels_run_together() -> None:
    assert chosen([1, 1, 1, 1, 1], COST) == [1, 2, 3]  # the rank before is still at its own independent level
    assert chosen([1, 1, 1, 1, 1], LONG_FORWARD, schedule={"kind": "async"}) == [1, 2, 3]  # it waits for an earlier one
    assert chosen([5], LONG_FORWARD) == [1, 2, 3]  # there is no rank before


def test_the_last_rank_of_a_cascade_that_crosses_an_edge_may_alone_keep_it_first() -> None:
    assert chosen([3, 2], LONG_FORWARD) == [1, 2]


def test_what_is_not_cheaper_or_not_known_stays_separate() -> None:
    for together_s in (0.0, 6.0, 7.0):
        assert chosen([5], dataclasses.replace(COST, together_s=together_s)) == []


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_makes_a_step_longer_or_a_rank_busier(seed: int) -> None:
    dice = random.Random(seed)
    stages = dice.choice([[5], [2, 3], [3, 2], [1, 2, 2], [2, 1, 1, 1], [1, 1, 1, 1, 1]])
    parts = dice.choice([1, 2])
    plan = auto_plan(stages, schedule={"micro_batches": parts})
    times = [[dice.randint(1, 16) / 4 for _ in range(7)] for _ in range(5)]
    costs = [ModuleCost(*own, together_s=dice.randint(1, 32) / 4) for own in times]
    best = choose_levels(plan, costs)
    _, separate = predicted(plan, costs)
    _, found = predicted(best, costs)
    assert found.step_s <= separate.step_s * (1 + 1e-8)
    assert all(costs[module].together_s < costs[module].separate_s for module in best.levels_together)
    assert all(mine <= before + 1e-9 for mine, before in zip(found.stage_s, separate.stage_s, strict=True))
    assert choose_levels(best, costs) == best  # whatever form the plan had


def test_only_auto_chooses() -> None:
    for levels, expected in (("separate", ()), ("together", (1, 2, 3))):
        plan = auto_plan([5], hierarchy={"levels": levels})
        assert choose_levels(plan, [COST] * 5) is plan and plan.levels_together == expected
        assert levels_line(plan) == ""


def test_nothing_is_said_where_no_module_has_both_levels() -> None:
    assert levels_line(tiny_plan(tiny_config("dgl", "plain", 1, 5, hierarchy={"levels": "auto"}))) == ""


# --- what may go together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "hpff", "released"])
@pytest.mark.parametrize("method", METHODS)
def test_heads_of_our_methods_may_go_together(method: str, variant: str) -> None:
    assert joinable(auto_plan(method=method, variant=variant)) == {1, 2, 3}


def test_heads_that_draw_random_numbers_may_not() -> None:
    if "dropping" not in METHODS:
        METHODS["dropping"] = {"name": "dropping"}
        layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout()]
        register_method(
            "dropping",
            lambda config, task, position: [
                Term("task", 1.0, lambda shape: TaskHead(nn.Sequential(*layers, nn.Linear(shape[0], task.classes))))
            ],
        )
    try:
        assert joinable(auto_plan(method="dropping")) == frozenset()
    finally:
        del METHODS["dropping"]


# --- costs ------------------------------------------------------------------------------------------------------------


def test_counted_costs_weigh_operations_against_products_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images: the step is bound by the number of operations. Many: groups take longer than one head after the
    other on a CPU."""
    once: dict[tuple[int, ...], Any] = {}  # the count does not depend on the number of images

    def count(plan: Plan, *rest: Any) -> Any:
        if plan.levels_together not in once:
            once[plan.levels_together] = by_kind(plan, *rest)
        return once[plan.levels_together]

    monkeypatch.setattr(counted_costs_module, "by_kind", count)
    patches = {"grid": 2, "at_once": 4}
    few, many = (auto_plan(method="dgl", patches=patches, data={"batch_size": images}) for images in (8, 2**20))
    small, large = (counted_costs(plan, joinable(plan), tiny_blocks(), CPU) for plan in (few, many))
    for module in (1, 2, 3):
        assert 0 < small[module].together_s < small[module].separate_s
        assert large[module].separate_s < large[module].together_s
    assert choose_levels(few, small).levels_together == (1, 2, 3)
    assert choose_levels(many, large).levels_together == ()
    assert small[0].together_s == small[4].together_s == 0.0 and small[4].final_s > 0


def test_counted_costs_do_not_depend_on_the_placement_or_the_form() -> None:
    short = {"method": "greedy", "variant": "plain"}
    plans = auto_plan([5], **short), auto_plan([2, 3], **short).with_levels_together({2})
    one, other = [counted_costs(plan, joinable(plan), tiny_blocks(), CPU) for plan in plans]
    assert one == other


def test_a_profile_measures_both_forms() -> None:
    profile = profile_modules(auto_plan(), tiny_blocks(), CPU, warmup=0, steps=1)
    assert [cost.together_s > 0 for cost in profile.modules] == [False, True, True, True, False]
    assert all(cost.cascade_s > 0 and cost.independent_s > 0 for cost in profile.modules[1:4])
    fixed = profile_modules(auto_plan(hierarchy={"levels": "together"}), tiny_blocks(), CPU, warmup=0, steps=1)
    assert [cost.together_s > 0 for cost in fixed.modules] == [False, True, True, True, False]
    assert not any(cost.cascade_s or cost.independent_s for cost in fixed.modules[1:4])


def test_the_work_of_a_module_is_that_of_its_form() -> None:
    plan = auto_plan([5]).with_levels_together({2})
    assert [COST.step_s(plan.modules[m]) for m in (1, 2)] == [10.0, 9.0]
    unknown = dataclasses.replace(COST, together_s=0.0)
    assert unknown.step_s(plan.modules[2]) == 10.0


# --- what people see --------------------------------------------------------------------------------------------------

SETTINGS = ["runtime.device=cpu", "precision.compute=fp32", "hierarchy.levels=auto", "model.cuts=even"]  # K = 4


def profiled(cost: ModuleCost) -> Profile:
    return Profile((cost,) * 4, 32, 32)


def test_the_plan_says_for_every_rank_how_its_levels_run(tmp_path: Path) -> None:
    report = explain(load_config(assignments=SETTINGS), 4, profiled(COST))
    assert [rank.levels_together for rank in report.ranks] == [(), (1,), (2,), ()]
    (line,) = [line for line in report.lines if line.startswith("hierarchy.levels=auto: ")]
    assert "both levels together on rank 1-2 (module 1-2), one after the other on rank 0, 3; " in line
    assert "bits of float32 may therefore depend on the placement" in line
    assert not any(action.startswith(("I1", "I2")) for actions in report.schedules for action in actions)
    assert report.modules[1].seconds["C"] == COST.together_s and "I" not in report.modules[1].seconds
    assert report.modules[1].step_s == COST.step_s(auto_plan().with_levels_together({1}).modules[1])
    report.write_json(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["ranks"][1]["levels_together"] == [1]

    waiting = explain(load_config(assignments=SETTINGS), 4, profiled(LONG_FORWARD))
    assert not any(rank.levels_together for rank in waiting.ranks)
    assert any("one after the other on rank 0-3; " in line for line in waiting.lines)


def test_a_plan_that_measures_only_for_itself_chooses_as_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "_measure", lambda *_: profiled(LONG_FORWARD))
    monkeypatch.setattr(explain_module, "counted_costs", lambda *_: [COST] * 4)
    for kind, expected in (("count", (1,)), ("measured", ())):
        report = explain(load_config(assignments=[*SETTINGS, f"partition.kind={kind}"]), 4)
        assert report.ranks[1].levels_together == expected


def test_what_cannot_be_counted_stays_separate_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise Uncountable("local module 1 cannot be counted without values")

    monkeypatch.setattr(explain_module, "_measure", lambda *_: profiled(COST))
    for user in (explain_module, measured_placement):
        monkeypatch.setattr(user, "counted_costs", refuse)
    expected = "levels separate: local module 1 cannot be counted without values"
    report = explain(load_config(assignments=[*SETTINGS, "partition.kind=count"]), 4)
    assert expected in report.lines and not any(rank.levels_together for rank in report.ranks)
    config, task = auto_plan(partition={"kind": "count"}).config, Classification(CLASSES, IMAGE)
    plan, words = measured_placement.placed_plan(config, tiny_blocks(), task, CPU, SimpleNamespace(team=Team()))
    assert (plan.levels_together, words) == ((), expected)


def test_a_measured_placement_chooses_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config, task = auto_plan(partition={"kind": "measured"}).config, Classification(CLASSES, IMAGE)
    runtime = SimpleNamespace(team=Team(), local_world_size=1)
    for cost, expected in ((COST, (1, 2, 3)), (dataclasses.replace(COST, together_s=7.0), ())):
        profile = Profile((cost,) * 5, 8, 8, device_bytes=2**40)
        monkeypatch.setattr(measured_placement, "profile_modules", lambda *_, found=profile: found)
        plan, words = measured_placement.placed_plan(config, tiny_blocks(), task, CPU, runtime)
        assert plan.levels_together == expected
        work_s = sum(cost.step_s(role) for role in plan.modules)
        assert words.startswith(f"measured placement: {1e3 * work_s:.0f} ms of work a step, ")


def test_a_choice_is_written_where_the_placement_is(tmp_path: Path) -> None:
    write_plan(auto_plan([2, 3]).with_levels_together({1, 3}), tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["levels_together"] == [1, 3]


def test_a_module_with_both_levels_together_has_no_independent_action() -> None:
    plan = auto_plan([2, 3]).with_levels_together({3})
    kinds = {(action.module, action.kind) for schedule in plan.schedules for action in schedule}
    assert (2, Kind.INDEPENDENT) in kinds and (3, Kind.INDEPENDENT) not in kinds and (3, Kind.CASCADE) in kinds
