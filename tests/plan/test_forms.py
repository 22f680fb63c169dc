"""The forms that the work of heads can take, each planned like a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.base.recipes import load_config
from pipeline.base.units import mebibytes
from pipeline.plan.explain import explain
from pipeline.plan.report import PlannedForm, PlanReport
from pipeline.report.plan_view import show_plan

NETWORK = ["model.name=resnet20", "model.modules=3", "model.cuts=even"]
SMALL = [*NETWORK, "data.batch_size=8", "runtime.device=cpu", "runtime.threads=1", "partition.steps=1"]


def planned(*assignments: str, forms: bool = True) -> PlanReport:
    return explain(load_config(assignments=[*SMALL, *assignments]), 2, count=True, forms=forms)


@pytest.fixture(scope="module")
def report() -> PlanReport:
    return planned()


def by_keys(report: PlanReport) -> dict[tuple[int | str, str], PlannedForm]:
    return {(form.at_once, form.levels): form for form in report.forms}


def test_the_configured_form_comes_first_and_is_the_plan(report: PlanReport) -> None:
    first, *others = report.forms
    assert first.configured and not any(form.configured for form in others)
    assert (first.at_once, first.levels, first.step_s) == ("auto", "separate", report.step_s)
    assert first.memory_bytes == tuple(rank.memory_bytes for rank in report.ranks)
    assert set(by_keys(report)) == {("auto", "separate"), (1, "separate"), ("auto", "together")}


def test_one_patch_after_another_takes_less_memory_and_more_operations(report: PlanReport) -> None:
    at_once, one = (by_keys(report)[key, "separate"] for key in ("auto", 1))
    assert at_once.patches is not None and at_once.patches[1:] == (4, 4)
    assert one.patches == (1, 1, 4)
    assert at_once.operations is not None and one.operations is not None and one.operations > 1.5 * at_once.operations
    assert at_once.memory_bytes is not None and one.memory_bytes is not None
    assert max(one.memory_bytes) < max(at_once.memory_bytes)
    assert one.step_s is not None and one.step_s > 0 and one.step_s != at_once.step_s


def test_a_form_is_what_a_plan_of_it_says(report: PlanReport) -> None:
    """Times differ between two measurements; what is counted does not."""
    own, form = planned("patches.at_once=1", forms=False), by_keys(report)[1, "separate"]
    assert form.operations == pytest.approx(sum(module.operations or 0 for module in own.modules), rel=0.02)
    assert form.memory_bytes == pytest.approx([rank.memory_bytes for rank in own.ranks], rel=0.02)


def test_both_levels_together_are_fewer_operations(report: PlanReport) -> None:
    separate, together = (by_keys(report)["auto", levels] for levels in ("separate", "together"))
    assert separate.together == 0 < together.together
    assert together.operations is not None and separate.operations is not None
    assert together.operations < separate.operations


def test_plain_heads_of_one_level_have_one_form_only() -> None:
    assert planned("patches.grid=1", "hierarchy.cascade_span=1").forms == ()


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_shows_time_and_memory_of_each(report: PlanReport, width: int) -> None:
    out = io.StringIO()
    show_plan(report, Console(file=out, width=width))
    _, table = out.getvalue().split("Forms of the heads' work (* as configured)")
    rows = table.splitlines()[:8]
    for form in report.forms:
        assert form.step_s is not None and form.memory_bytes is not None
        (row,) = [row for row in rows if row.strip("* ").split()[:2] == [str(form.at_once), form.levels]]
        assert ("*" in row) == form.configured and f"{form.operations:,}" in row
        assert mebibytes(max(form.memory_bytes)) in row.split()


def test_levels_behind_the_copies_of_man_have_one_form_only() -> None:
    assert planned("method.name=greedy", "method.front=man", "hierarchy.cascade_span=2", "patches.grid=1").forms == ()


def test_patches_of_reconciled_heads_have_one_form_only() -> None:
    one = ["method.name=greedy", "method.reconciliation=0.1", "hierarchy.cascade_span=1", "patches.grid=2"]
    assert planned(*one).forms == ()
