"""The benchmarks of speed: their measures on known inputs, and a quick run of each that must make sense."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import ConfigError

Quick = dict[str, tuple[dict[str, Any], str]]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

bursts, memory, networks, ranks, runner, tables, throughput, virtual = map(
    importlib.import_module,
    ("bursts", "memory", "networks", "ranks", "runner", "tables", "throughput", "virtual"),
)
ROW_KEYS = set(tables.make_row(1.0, [1.0], method="bp"))


def quick(name: str, folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The JSON and the page of a quick run."""
    files = {"--json": folder / "result.json", "--output": folder / "page.md"}
    options = [str(part) for item in files.items() for part in item]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", *options, *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(files["--json"].read_text()), files["--output"].read_text()


def side_by_side(folders: pytest.TempPathFactory, **wanted: list[str]) -> Quick:
    """Quick runs, two at a time, by name; with more options for each."""
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(quick, name, folders.mktemp(name), *more) for name, more in wanted.items()}
    return {name: run.result() for name, run in runs.items()}


def check_rows(result: dict[str, Any]) -> None:
    """Keys and values of any benchmark of speed."""
    assert result["hardware"] and result["date"] and set(result["versions"]) >= {"torch", "localpipe"}
    for row in result["rows"]:
        assert set(row) >= ROW_KEYS
        assert 0 < row["low"] <= row["images_per_s"] <= row["high"]
        assert 0 < row["ratio_to_bp"] <= 1.5 * row["ranks"] + 1
        assert 0 < row["efficiency"] < 1.05 and row["bound"] > 0.9 * row["images_per_s"]
        assert len(row["busy"]) == row["ranks"] and all(0 < busy <= 1 for busy in row["busy"])
        assert (row["bytes_per_step"] > 0) == (row["ranks"] > 1)


@pytest.mark.slow
@pytest.mark.alone
def test_throughput_runs_and_names_what_is_faster(tmp_path: Path) -> None:
    result, page = quick("throughput", tmp_path)
    check_rows(result)
    systems = {row["system"] for row in result["rows"]}
    assert systems >= {"BP, one device", "DDP", "naive model parallel", "torch GPipe", "torch ZBVZeroBubble"}
    assert {row["schedule"] for row in result["rows"] if row["system"] == "localpipe"} == {"exact", "async"}
    assert "The fastest system is" in page and "DDP (" in page


@pytest.fixture(scope="module")
def of_virtual_devices(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Quick runs of the benchmarks that hardly need a core: their devices wait."""
    return side_by_side(tmp_path_factory, scaling=[], slow_stage=[])


@pytest.mark.slow
@pytest.mark.alone  # with all benchmarks of virtual devices
def test_scaling_runs_and_agrees_with_the_simulator(of_virtual_devices: Quick) -> None:
    result, page = of_virtual_devices["scaling"]
    check_rows(result)
    rows = {(row["method"], row["schedule"], row["micro_batches"]): row for row in result["rows"]}
    plain = rows["dgl", "exact", 1]
    assert plain["of_optimum"] > 0.6  # 0.96 on a machine with nothing else to do
    assert rows["bp", "GPipe", 2]["local_ratio"] > 1.0  # 1.36 in theory
    simulated = [entry for entry in result["settings"]["simulated"] if entry["schedule"] == "dgl, exact"]
    assert simulated[-1]["ranks"] == 64 and simulated[-1]["efficiency"] == pytest.approx(1.0)
    assert "Expected:" in page and "Measured:" in page


def test_one_slow_stage_holds_up_exact_and_async_but_not_free(of_virtual_devices: Quick) -> None:
    result, page = of_virtual_devices["slow_stage"]
    rates = {(row["schedule"], row["slowed"]): row["images_per_s"] for row in result["rows"]}
    assert rates["exact", 3] < 0.6 * rates["exact", 1] and rates["async", 3] < 0.6 * rates["async", 1]
    assert rates["free", 3] > 0.8 * rates["free", 1]
    assert "free keeps" in page


@pytest.mark.slow
@pytest.mark.every
@pytest.mark.alone
def test_a_plan_predicts_steps_of_a_plausible_length(tmp_path: Path) -> None:
    result, page = quick("prediction", tmp_path)
    assert {row["placement"] for row in result["rows"]} == {"count", "measured"}
    for row in result["rows"]:
        assert sum(row["sizes"]) == result["settings"]["modules"] and len(row["sizes"]) == row["ranks"] == 2
        assert row["predicted_s"] > 0 and 0.3 < row["ratio"] < 3.0  # 1.01 to 1.09 on a machine with nothing else to do
    assert page.count("|") > 8 * len(result["rows"])


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Quick runs of the benchmarks that need one core."""
    return side_by_side(tmp_path_factory, step_cost=[], precision=[], operations=["--method", "BP", "DGL + HPFF"],
                        gpu=["--device", "cpu"], heads=[])  # fmt: skip


OF_ONE_PROCESS = [pytest.param("precision", marks=pytest.mark.alone), "step_cost"]  # the first one runs all


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ONE_PROCESS)
def test_benchmarks_of_one_process_run(of_one_process: Quick, name: str) -> None:
    result, page = of_one_process[name]
    assert page.count("|") > 8 * len(result["rows"])
    for row in result["rows"]:
        assert set(row) >= ROW_KEYS
        assert row["ranks"] == 1 and row["images_per_s"] > 0
        assert row["ratio_to_bp"] == pytest.approx(1.0) if row["method"] == "bp" else 0 < row["ratio_to_bp"] < 1.5
        if name == "step_cost":
            assert row["bp_units"] > 0 and row["operations"] > 100
            assert row["operations_ratio"] == 1.0 if row["method"] == "bp" else row["operations_ratio"] > 1.0
    if name == "step_cost":
        calls = {row["name"]: row["operations"] for row in result["rows"]}
        assert calls["DGL + HPFF, all at once"] < calls["DGL + HPFF"]
        aims = [entry["target"] for entry in result["targets"]]
        assert [text for text in aims if "operations_ratio of DGL + HPFF" in text and "all at once)" in text]


def test_operations_are_those_of_the_method(of_one_process: Quick) -> None:
    result, page = of_one_process["operations"]
    calls = {(row["method"], row["name"]): row["calls"] for row in result["rows"]}
    assert calls["BP", "aten::addmm"] == 1 < calls["DGL + HPFF", "aten::addmm"]  # the heads are linear layers
    assert all(row["ms"] > 0 for row in result["rows"])
    assert "### BP: " in page and "### DGL + HPFF: " in page
    assert re.search(r"\| BP \| \d+ \| [\d,]+ \| 1.00 \| 102 \|", page)  # the weights of ResNet-32, and its output


def test_what_a_gpu_is_measured_by_runs_without_one(of_one_process: Quick) -> None:
    result, page = of_one_process["gpu"]
    assert {row["system"] for row in result["rows"]} == {"BP, eager", "DGL", "InfoPro"}
    for row in result["rows"]:
        assert row["ms_per_step"] > 0 and row["ratio_to_bp"] > 0
        assert row["kernels"] is row["busy"] is row["peak_mib"] is None  # there is no GPU that could tell
    assert [target["met"] for target in result["targets"]] == [True]  # the gradients
    assert "| resnet32 | DGL | 16 |" in page


def test_what_a_gpu_is_measured_by_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every case once before any again; one that fails is named, and tried again by the next command."""
    gpu, kept = importlib.import_module("gpu"), importlib.import_module("kept")
    file, done = tmp_path / "kept.jsonl", []

    def case(name: str, fails: bool) -> Any:
        def steps(profiled: bool) -> Any:
            done.append(f"{name} {profiled}")
            if fails:
                raise RuntimeError("no kernel")
            return gpu.Steps(0.5, None, None, None)

        return "net", name, 1, steps

    def measured(fails: bool, about: int = 1) -> tuple[list[Any], list[str]]:
        done.clear()
        monkeypatch.setattr(gpu, "cases", lambda settings: [case("A", False), case("B", fails), case("C", False)])
        rows, findings = gpu.measure_speed(gpu.Settings(rounds=2), time.monotonic() + 60, kept.Kept(file, {"n": about}))
        return [row["system"] for row in rows], findings

    assert measured(fails=True) == (["A", "C"], ["net, B: failed (no kernel)."])
    assert done == ["A True", "B True", "C True", "A False", "C False"]
    file.write_text(file.read_text()[:-9])  # killed in the middle of the last line
    assert measured(fails=False) == (["A", "B", "C"], [])
    assert done == ["B True", "B False", "C False"]
    measured(fails=False)
    assert not done
    measured(fails=False, about=2)
    assert len(done) == 6


@pytest.mark.slow
def test_memory_is_counted_in_one_process_and_on_the_fullest_rank(tmp_path: Path) -> None:
    result, page = quick("memory", tmp_path)
    rows = {(row["system"], row["ranks"]): row for row in result["rows"]}
    assert {name for name, ranks in rows if ranks == 1} == {
        "BP", "BP, checkpointing", "BP, counted here", "DGL", "DGL + HiLo", "DGL + HPFF"
    }  # fmt: skip
    assert [target["met"] for target in result["targets"]] == [True]  # two ways to count backpropagation agree
    assert rows["BP, checkpointing", 1]["ratio"] < 0.9 > rows["torch 1F1B, M = 2", 2]["ratio"] > 0.3
    for (system, ranks), row in rows.items():
        assert row["gpu"] is row["paper_gb"] is None and row["peak"] > 0
        if row["work"] is not None:
            assert row["peak"] == sum(row[part] for part in ("weights", "heads", "optimiser", "messages", "work"))
            assert (row["messages"] > 0) == (ranks > 1), system
    ours = [rows[f"DGL + HPFF{parts}", 3]["peak"] for parts in ("", ", M = 2")]
    assert ours == sorted(ours, reverse=True)
    assert "| resnet20 | DGL + HPFF, M = 2 | 3 | 3 |" in page


SIZES = [(100, 0, 0), (1100, 80, 8), (12345, 1200, 32), (10**6, 99968, 312)]


@pytest.mark.parametrize(("limit", "rows", "side"), SIZES)
def test_the_largest_that_has_room_is_found_in_a_few_counts(limit: int, rows: int, side: int) -> None:
    asked = []

    def need(size: int, power: int) -> int:
        asked.append(size)
        return 300 + max(10 * size**power, 100)

    assert memory.largest(partial(need, power=1), limit, 8) == rows
    assert memory.largest(partial(need, power=2), limit, 8, power=2) == side
    assert len(asked) < 16


def test_what_a_tuned_layer_gains_is_told_of_each_that_runs(of_one_process: Quick) -> None:
    result, page = of_one_process["heads"]
    forms = [row["form"] for row in result["rows"]]
    assert forms[0] == "tuned" and forms[-1] == "all plain" and "pointwise plain" in forms
    assert all(row["heads_s"] > 0 and row["step_s"] > row["heads_s"] for row in result["rows"])
    calls = {row["form"]: row["operations"] for row in result["rows"]}
    assert len(set(calls.values())) == len(forms)  # each of them is another step
    assert "Forms of heads" in page


def test_files_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json .*there is no folder"):
        runner.check_files(json=tmp_path / "no" / "x.json")
    runner.check_files(json=tmp_path / "x.json", output=None)


def test_a_virtual_block_waits_for_what_it_stands_for() -> None:
    """Full backward I + W, also without an input gradient; the input gradient alone I; no time in evaluation."""
    clock = virtual.Clock(batch_rows=8)
    (block,) = virtual.virtual_network([virtual.Costs(0.01, 0.02, 0.04, 0.0)], clock, 4)
    x = torch.zeros(4, 4)  # half a batch

    def waited(call: Any) -> float:
        before = clock.asked
        call()
        return clock.asked - before

    h = block[0](x)
    assert clock.asked == pytest.approx(0.005)
    assert waited(lambda: h.sum().backward(inputs=list(block[0].parameters()))) == pytest.approx(0.03)
    x.requires_grad_()
    h = block[0](x)
    assert waited(lambda: torch.autograd.grad(h.sum(), x, retain_graph=True)) == pytest.approx(0.01)
    assert waited(lambda: torch.autograd.grad(h.sum(), block[0].weight)) == pytest.approx(0.02)
    assert waited(lambda: block.eval()(x)) == 0


@pytest.mark.alone
def test_waits_are_right_in_sum() -> None:
    clock = virtual.Clock(batch_rows=8)
    started = time.perf_counter()
    for _ in range(50):
        clock.wait(0.002)
    assert time.perf_counter() - started == pytest.approx(0.1, rel=0.1)
    assert clock.waited == pytest.approx(clock.asked, rel=0.05)


def test_splits_have_the_fastest_slowest_part() -> None:
    assert networks.split([1, 1, 1, 1], 2) == (2, 2)
    assert networks.split([5, 1, 1, 1, 1, 1], 2) == (1, 5)
    assert networks.split([1, 1, 1, 1, 1, 1], 2, 0.5) == (2, 4)  # 2 against 0.5 x 4
    assert networks.split_twice([1] * 8, 4, 2, 1.0) == ((2, 2), (2, 2))
    assert networks.split_twice([1] * 8, 3, 2, 1.0) == ((4,), (2, 2))
    assert networks.split_twice([9, 1], 4, 2, 1.0) == ()


def test_a_ratio_is_to_the_bursts_of_the_reference_around_it() -> None:
    times = [(0, 1.0), (1, 2.0), (2, 0.5), (0, 3.0), (1, 1.0), (0, 1.0)]
    leader = [(index, bursts.Burst(step_s, (step_s / 2,))) for index, step_s in times]
    silent = [(index, None) for index, _ in times]
    turns = bursts.merge([leader, silent])
    assert [turn.ratio for turn in turns[1]] == pytest.approx([1.5 / 2, 1.5 / 1])  # harmonic mean of 1 and 3 is 1.5
    assert turns[2][0].ratio == pytest.approx(3.0)
    assert [turn.ratio for turn in turns[0]] == pytest.approx([1, 1, 1])


def test_json_has_a_line_for_a_list_of_plain_values() -> None:
    document = {"rows": [{"values": [1, -2.5, None, "a, [b]"], "points": [[1, 2], [3, 4]], "none": []}]}
    text = runner.as_json(document)
    assert json.loads(text) == document and "[1, 2]" in text and len(text.splitlines()) < 24


def test_a_target_is_met_where_all_values_are_within() -> None:
    target = runner.Target("share", {"P = 2": 0.98, "P = 4": 0.96}, least=0.97)
    assert str(target) == "Expected: share >= 0.97. Measured: 0.960 (P = 4), 0.980 (P = 2). Missed."
    assert runner.Target("share", {"P = 2": 0.98}, least=0.97, most=1.03).met


def test_columns_make_the_table() -> None:
    row = tables.make_row(10.0, [0.5, 0.25, 0.2], method="dgl + hpff", ranks=2, work_s=[0.25, 0.1])
    table = tables.Table([tables.Column("system", tables.label), *tables.SPEED, tables.BUSY], [row])
    assert table.cells == [["dgl + hpff, exact", "40.0", "20.0", "50.0", "1.00 / 0.40"]]
    assert row["bound"] == pytest.approx(40.0) and row["efficiency"] == pytest.approx(1.0)
    many = tables.make_row(1.0, [1.0], method="dgl", ranks=8, work_s=[0.1 * rank for rank in range(1, 9)])
    assert tables.BUSY.cell(many) == "0.10 ... 0.80" and tables.Column("x", "ratio_to_bp", ".2f").cell(many) == ""


def meet_and_share(rank: Any) -> tuple[int, str, int]:
    rank.meet()
    return rank.index, rank.share("from 0" if rank.leader else "not this"), torch.get_num_threads()


def fail_on_rank_1(rank: Any) -> None:
    if rank.index == 1:
        raise ValueError("no such thing")
    rank.meet()


def hang(rank: Any) -> None:
    time.sleep(600)


def test_ranks_work_in_lockstep() -> None:
    assert ranks.run_ranks(meet_and_share, 3, deadline_s=60) == [(r, "from 0", 1) for r in range(3)]


def test_a_failing_rank_ends_all_and_says_why() -> None:
    with pytest.raises(ranks.RanksFailed, match="rank 1: ValueError: no such thing"):
        ranks.run_ranks(fail_on_rank_1, 2, deadline_s=60)


def die(rank: Any) -> None:
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.meet()


def test_a_killed_rank_ends_all() -> None:
    started = time.monotonic()
    with pytest.raises(ranks.RanksFailed, match="rank 1 ended with code -9: it wrote nothing"):
        ranks.run_ranks(die, 2, deadline_s=60)
    assert time.monotonic() - started < 30


def end_in_some_way(rank: int, ways: list[str]) -> str:
    if ways[rank] == "raise":
        raise ValueError("no such thing")
    if ways[rank] == "exit":
        sys.exit(3)
    if ways[rank] == "hang":
        time.sleep(600)
    return os.environ["RANK"] + " of " + os.environ["WORLD_SIZE"]


def test_processes_end_each_by_itself() -> None:
    results = ranks.run_processes(end_in_some_way, 3, ["return", "raise", "exit"], timeout_s=60)
    assert [(result.value, result.exit_code) for result in results] == [("0 of 3", 0), (None, 1), (None, 3)]
    assert "ValueError: no such thing" in results[1].stderr and not results[0].stderr


def test_processes_that_hang_are_killed_with_what_they_wrote() -> None:
    with pytest.raises(TimeoutError, match="no such thing"):
        ranks.run_processes(end_in_some_way, 2, ["hang", "raise"], timeout_s=3)


def test_ranks_that_hang_are_ended_at_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(ranks.RanksFailed, match="not done after 2 s"):
        ranks.run_ranks(hang, 2, deadline_s=2)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda", "ranks": 64}, "--device cuda --ranks 64 needs one GPU per rank, found"),
        ({"modules": 1}, "--modules 1 is less than --ranks 2"),
        ({"batch": 100}, "--batch 100 is no multiple of 8"),
    ],
)
def test_options_that_cannot_work_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        throughput.refuse(throughput.Settings(**{"cores": 2, **options}))
