"""A run explained without starting it: what the report says, and that it says it for bad input too."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_shapes import RealTensors
from rich.console import Console

from pipeline import load_config
from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.models import backbones
from pipeline.models.backbones import Blocks
from pipeline.plan import explain as explain_module
from pipeline.plan.cost_profile import Profile
from pipeline.plan.explain import explain, measure, message_bytes
from pipeline.plan.report import PlanReport
from pipeline.plan.simulate import ModuleCost
from pipeline.report.plan_view import schedule_text, show_plan

COST = ModuleCost(0.010, 0.005, 0.0025, 0.001, 0.0075, 0.020, 0.001, state_bytes=2**20, graph_bytes=2**22)
# The first module works four times as long as the others.
PROFILE = Profile((ModuleCost(0.040, 0.0, 0.0025, 0.0, 0.0, 0.080, 0.001, 2**20, 2**22),) + (COST,) * 3, 32, 32)


def config(*assignments: str) -> Config:
    """Of the default recipe, without what is counted for its cut and for its patches."""
    settings = ["runtime.device=cpu", "precision.compute=fp32", "model.cuts=even", "patches.at_once=4"]
    return load_config(assignments=[*settings, *assignments])


@pytest.fixture(scope="module")
def report() -> PlanReport:
    return explain(config(), 4, PROFILE)


@pytest.fixture(scope="module")
def counted() -> PlanReport:
    return explain(config(), 4, PROFILE, count=True)


def shown(report: PlanReport, width: int) -> str:
    out = io.StringIO()
    show_plan(report, Console(file=out, width=width))
    return out.getvalue()


def test_the_slowest_rank_is_the_bound_and_the_rest_is_bubble(report: PlanReport) -> None:
    assert report.bound_s == pytest.approx(0.1235) == report.modules[0].step_s
    assert report.alone_s == pytest.approx(0.1235 + 2 * 0.046 + 0.032)
    assert report.step_s >= report.bound_s
    assert report.bubble == pytest.approx(1 - report.bound_s / report.step_s)
    assert report.images_per_s == pytest.approx(32 / report.step_s)
    assert report.ranks[0].busy == pytest.approx(report.bound_s / report.step_s)


def test_placement_by_measured_cost_beats_placement_by_count() -> None:
    report = explain(config("partition.kind=measured"), 2, PROFILE)
    assert [(p.kind, p.sizes) for p in report.placements] == [("measured", (1, 3)), ("count", (2, 2))]
    assert report.step_s == report.placements[0].step_s < report.placements[1].step_s
    assert [rank.modules for rank in report.ranks] == [(0, 0), (1, 3)]
    assert [module.rank for module in report.modules] == [0, 1, 1, 1]


def test_replicas_are_planned_as_one_pipeline_and_what_averaging_sends() -> None:
    profile = dataclasses.replace(PROFILE, batch_size=16, micro_batch_size=16)  # half of the batch
    settings = config("parallel.replicas=2", "partition.kind=count")
    report = explain(settings, 4, profile)
    assert report.lines[0].endswith("on 2 replicas x 2 stage(s)") and report.replicas == 2
    assert [rank.modules for rank in report.ranks] == [(0, 1), (2, 3)]
    assert report.images_per_s == pytest.approx(32 / report.step_s)
    of_ranks = [report.modules[:2], report.modules[2:]]
    weights = [sum(module.parameters + module.head_parameters for module in modules) for modules in of_ranks]
    assert [rank.averaged_bytes for rank in report.ranks] == [4 * count for count in weights]  # 2 (R-1)/R = 1
    slow = explain(settings, 4, profile, bytes_per_s=1e7)
    assert slow.modules[0].seconds["U"] == pytest.approx(
        0.001 + 4 * (slow.modules[0].parameters + slow.modules[0].head_parameters) / 1e7
    )
    assert "averaged" in shown(report, 120) and "2 replicas of 2 ranks" in shown(report, 120)
    assert "averaged" not in shown(explain(config(), 1, PROFILE), 120)
    with pytest.raises(ConfigError, match=r"^parallel\.replicas = 2 with 3 processes"):
        explain(settings, 3, profile)


def test_a_given_placement_is_compared_with_both() -> None:
    report = explain(config("partition.kind=given", "partition.stages=[3,1]"), 2, PROFILE)
    assert [p.kind for p in report.placements] == ["given", "count", "measured"]
    assert [rank.modules for rank in report.ranks] == [(0, 2), (3, 3)]


def test_placement_by_flops_asks_neither_times_nor_numbers() -> None:
    """Three modules of one residual block, and the rest of the network in the fourth."""
    cuts = 'model.cuts=["layer1.1", "layer1.2", "layer1.3"]'
    report = explain(config(cuts, "partition.kind=auto"), 2, PROFILE)
    assert [(p.kind, p.sizes) for p in report.placements] == [("auto", (3, 1)), ("count", (2, 2)), ("measured", (1, 3))]


def test_bytes_of_a_step_are_those_of_its_messages(report: PlanReport) -> None:
    activation, label, image = 16 * 32 * 32 * 4, 8, 3 * 32 * 32
    assert report.ranks[0].sent_down_bytes == pytest.approx(32 * (activation + label + image), rel=1e-3)
    assert report.ranks[1].sent_up_bytes == pytest.approx(32 * activation, rel=1e-3)
    assert report.ranks[0].sent_up_bytes == report.ranks[3].sent_down_bytes == 0
    assert report.ranks[3].sent_up_bytes == 0  # the last module's loss stays in it


def test_the_messages_of_a_placement_by_count_are_known_without_costs(report: PlanReport) -> None:
    down, up = zip(*message_bytes(config(), 4), strict=True)
    assert list(down) == [rank.sent_down_bytes for rank in report.ranks[:-1]]
    assert list(up) == [rank.sent_up_bytes for rank in report.ranks[1:]] and up[-1] == 0


def test_a_module_that_no_loss_reaches_is_named_in_the_plan() -> None:
    """HPFF's weights fall to 0 at the last module with a head; its released code lets the last loss reach it."""
    falling = ("method.reconstruction=[5,0]", "method.task=[0.5,0]", "hierarchy.cascade_span=2")

    def untrained(*more: str) -> list[str]:
        return [line for line in explain(config(*falling, *more), 4, PROFILE).lines if "IS NOT TRAINED" in line]

    (line,) = untrained()
    assert line.startswith("module 2 (") and line.endswith("or with cascades set hierarchy.final_loss=cascade")
    for reached in ("hierarchy.final_loss=cascade", "hierarchy.variant=released", "method.task=[0.5,0.1]"):
        assert not untrained(reached)


def test_an_asynchronous_schedule_has_no_bubble() -> None:
    exact = explain(config(), 4, Profile((COST,) * 4, 32, 32))
    late = explain(config("schedule.kind=async"), 4, Profile((COST,) * 4, 32, 32))
    assert exact.bubble > 0.1
    assert late.bubble == pytest.approx(0.0, abs=1e-9)


def test_weights_upstream_are_traffic_and_no_work() -> None:
    """The first blocks of modules 1 to 3 of ResNet-32 have 4.7, 18.6 and 74.1 thousand parameters."""
    found = {}
    for every in (1, 4):
        method = ("method.name=dgl", "method.head=", "method.front=man++", f"method.average_every={every}")
        found[every] = explain(config(*method, "hierarchy.cascade_span=1"), 4, Profile((COST,) * 4, 32, 32))
    often, seldom = ([rank.sent_up_bytes for rank in found[every].ranks[1:]] for every in (1, 4))
    assert often[0] > 4 * 4600 and [size // 4 for size in often] == seldom
    assert not {"S", "A"} & set(found[1].modules[1].seconds)


def test_slow_links_make_the_step_longer() -> None:
    fast = explain(config(), 4, Profile((COST,) * 4, 32, 32))
    slow = explain(config(), 4, Profile((COST,) * 4, 32, 32), latency_s=0.01)
    assert slow.step_s == pytest.approx(fast.step_s + 0.02)
    assert "messages take 10000 us and move inf GB/s" in slow.lines[-1]
    with pytest.raises(ConfigError, match="use a latency >= 0 and a rate > 0"):
        explain(config(), 4, PROFILE, latency_s=-1.0)


def test_stages_of_schedule_free_wait_for_nobody() -> None:
    report = explain(config("schedule.kind=free", "hierarchy.cascade_span=1"), 4, PROFILE)
    assert all(rank.busy == pytest.approx(1.0) for rank in report.ranks)


def test_a_rank_that_is_too_large_is_reported_with_the_plan() -> None:
    small = Profile((COST,) * 4, 32, 32, device_bytes=2**21)
    by_count = config("partition.kind=count")
    report = explain(by_count, 2, small)
    assert report.refusal is not None and report.refusal.startswith("rank ")
    assert explain(by_count, 2, PROFILE).refusal is None


def test_a_measured_plan_needs_no_profile() -> None:
    threads = torch.get_num_threads()
    small = config("model.name=resnet20", "data.batch_size=4", "partition.steps=1")
    profile = measure(small, 2)
    assert torch.get_num_threads() == threads
    assert len(profile.modules) == 4 and profile.batch_size == 4
    assert explain(small, 2, profile).step_s > 0


@pytest.mark.parametrize(
    ("assignments", "ranks", "message"),
    [
        ([], 5, "5 processes for 4 local modules; start at most 4"),
        ([], 0, "ranks = 0 must be at least 1"),
        (["model.modules=8"], 2, r"the profile is for 4 local modules, the configuration has 8"),
        (["data.batch_size=48"], 2, r"the profile is for 32 images per batch, the configuration has 48"),
        (["data.name=folder", "data.root=nowhere"], 2, "data.root = 'nowhere' does not exist"),
        (["patches.grid=64"], 2, "patches.grid = 64, but module"),
    ],
)
def test_what_would_stop_a_run_stops_the_plan(assignments: list[str], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain(config(*assignments), ranks, PROFILE)


REFUSED: list[tuple[list[str], int, dict[str, Any], str]] = [
    ([], 2, {"latency_s": -1.0}, "use a latency >= 0"),
    ([], 2, {"bytes_per_s": math.nan}, "use a latency >= 0 and a rate > 0"),
    ([], 5, {}, "5 processes for 4 local modules"),
    ([], 0, {}, "must be at least 1"),
    (["partition.kind=given", "partition.stages=[1,1]"], 2, {}, "adds up to 2"),
    (["partition.kind=given", "partition.stages=[2,2]"], 3, {}, "has 2 sizes for 3 processes"),
    (["patches.grid=64"], 2, {}, "patches.grid = 64"),
    (["model.modules=40"], 2, {}, "blocks; use at most"),
]


@pytest.mark.parametrize(("assignments", "ranks", "link", "message"), REFUSED)
def test_nothing_is_measured_before_a_refusal(
    assignments: list[str], ranks: int, link: dict[str, float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain_module, "profile_modules", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=message):
        explain(config(*assignments), ranks, **link)


def test_the_network_is_built_once_and_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Blocks] = []
    build = backbones._BACKBONES["resnet20"]
    monkeypatch.setitem(backbones._BACKBONES, "resnet20", lambda *which: built.append(build(*which)) or built[-1])
    small = config("model.name=resnet20", "data.batch_size=4", "partition.steps=1")
    report = explain(small, 2, count=True)
    assert len(built) == 1
    assert all(parameter.is_meta for block in built[0].values() for parameter in block.parameters())
    assert report.profile.modules[0].state_bytes > 0
    assert all(module.bp_units is not None and module.bp_units > 0 for module in report.modules)
    assert [m.parameters for m in report.modules] == [m.parameters for m in explain(small, 2, report.profile).modules]


def test_a_profile_without_times_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no time for any action"):
        explain(config(), 2, Profile((ModuleCost(),) * 4, 32, 32))


def test_the_tables_name_modules_ranks_and_totals(report: PlanReport) -> None:
    text = shown(report, 140)
    for piece in ("stem-layer1.2", "C I", "weights", "sent down", "bubble", "by measured", "images/s", "K = 4"):
        assert piece in text
    assert max(map(len, text.splitlines()[4:])) <= 140


@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_no_number_is_cut_off_on_a_narrow_screen(report: PlanReport, width: int) -> None:
    lines = shown(report, width).splitlines()
    rows = [line for line in lines if line.startswith(("0  ", "1  ", "2  ", "3  "))]
    assert len(rows) == 4
    for row in rows:
        assert all("…" not in cell for cell in row.split()[3:]), row
        assert len(row) <= width


@pytest.mark.parametrize("width", [100, 110, 120, 140, 160])
def test_what_is_counted_stands_beside_the_times(counted: PlanReport, width: int) -> None:
    text = shown(counted, width)
    rows = [line for line in text.splitlines() if line.startswith(("0  ", "1  ", "2  ", "3  "))]
    calls = [module.operations for module in counted.modules]
    assert None not in calls and counted.bp_operations is not None and sum(calls) > counted.bp_operations
    assert [f" {number:,.0f} " in row for row, number in zip(rows, calls, strict=False)] == [width >= 110] * 4
    assert all("…" not in cell for row in rows for cell in row.split()[3:])
    assert f"operations       {round(sum(calls)):,} calls" in text and "units of one BP step" in text
    assert max(map(len, text.splitlines()[4:])) <= width


def test_the_schedule_is_printed_a_line_per_rank_under_its_legend(report: PlanReport) -> None:
    legend, *ranks = schedule_text(report).splitlines()
    assert "F forward" in legend and "R cascade backward" in legend and "wait" not in legend
    assert ranks[1] == "rank 1  F1.0 C1.0 R1.0->0 I1.0 B1.0 U1"
    assert len(ranks) == 4


def test_the_plan_is_written_as_json(report: PlanReport, tmp_path: Path) -> None:
    report.write_json(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["step_s"] > 0 and "events" not in document
    assert [rank["modules"] for rank in document["ranks"]] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run launch/plan.py in this process; its exit code."""
    script = Path(__file__).parents[2] / "launch" / "plan.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    return runpy.run_path(str(script))["main"]()


EVEN = [
    word
    for key in ("model.cuts=even", "patches.grid=1", "partition.kind=count", "method.name=dgl", "runtime.device=cpu")
    for word in ("--set", key)
]
"""Of the default recipe, without what is counted for its cut, its placement and its patches."""


def test_the_command_line_prints_and_writes_what_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, saved, plan = tmp_path / "given.json", tmp_path / "saved.json", tmp_path / "plan.json"
    PROFILE.write(given)
    options = ["--ranks", 2, "--schedule", "--profile", given, "--save-profile", saved, "--json", plan]
    assert command_line(monkeypatch, *options, *EVEN) == 0
    printed = capsys.readouterr().out
    assert "rank 1  F2.0 C2.0 R2.0->1" in printed and "by measured" in printed
    assert Profile.read(saved) == PROFILE and plan.is_file()


def test_the_command_line_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, "--ranks", 5, *EVEN) == 2
    error = capsys.readouterr().err
    assert error.startswith("localpipe: 5 processes for 4 local modules") and error.count("\n") == 1
    dataclasses.replace(PROFILE, device_bytes=2**21).write(tmp_path / "p.json")
    assert command_line(monkeypatch, "--ranks", 2, "--profile", tmp_path / "p.json", *EVEN) == 2
    captured = capsys.readouterr()
    assert "step time" in captured.out and "localpipe: rank 0 needs" in captured.err


@pytest.mark.parametrize("option", ["--save-profile", "--chart", "--json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explain_module, "profile_modules", lambda *_: pytest.fail("measured"))
    assert command_line(monkeypatch, option, tmp_path / "nowhere" / "x") == 2
    error = capsys.readouterr().err
    assert "there is no directory" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "data", "parameters"),
    [
        ("vit_b_16", "stl10", 85_683_466),  # torchvision's number for 224 x 224 and 1000 classes: 160 positions less
        ("swin_t", "cifar10", 27_527_044),
        ("vgg13_bn", "cifar10", 128_997_706),
        ("densenet-bc-100-12", "cifar10", 769_162),
    ],
)
def test_a_network_by_name_is_planned_without_data_and_without_memory(name: str, data: str, parameters: int) -> None:
    settings = (f"model.name={name}", f"data.name={data}", "method.name=greedy", "hierarchy.cascade_span=1")
    chosen = config(*settings, "model.modules=2", "patches.grid=1", "patches.at_once=1", "partition.kind=count")
    batch = chosen.data.batch_size
    with RealTensors() as real:
        report = explain(chosen, 2, Profile((COST,) * 2, batch, batch))
    assert sum(module.parameters for module in report.modules) == parameters
    assert [rank.modules for rank in report.ranks] == [(0, 0), (1, 1)] and not real.found
