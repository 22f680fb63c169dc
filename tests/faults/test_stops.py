"""SIGTERM and SIGINT: every rank stops after the same step, with a checkpoint, and exits 0; a second SIGINT ends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run_forked, run_with_agents

pytestmark = pytest.mark.long

SLOW = {"pause_s": 0.01}  # a step takes a tenth of a second, a stop half a second


@pytest.mark.parametrize(
    ("do", "rank", "schedule", "name"),
    [("term", 2, "async", "SIGTERM"), ("term", 0, "exact", "SIGTERM"), ("interrupt", 1, "exact", "SIGINT")],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    tmp_path: Path, undisturbed: dict[str, str], do: str, rank: int, schedule: str, name: str
) -> None:
    settings = {"schedule": {"kind": schedule}, "checkpoint": {"every_epochs": 0, "every_steps": 0}}
    results = run_forked(tmp_path, [{"rank": rank, "step": 5, "do": do}], settings=settings, **SLOW)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    stopped = results[0].value
    assert all(result.value == stopped for result in results)
    assert stopped["stopped"] == f"{name} on rank {rank}"
    assert 5 < stopped["step"] < 40
    assert Path(stopped["checkpoint"]).name == f"step-{stopped['step']:08d}"

    results = run_forked(tmp_path, [], settings=settings)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert results[0].value["weights_sha256"] == undisturbed[schedule]


def test_a_stop_while_starting_trains_nothing(tmp_path: Path) -> None:
    results = run_forked(tmp_path, [{"rank": 1, "step": -1, "do": "term"}])
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    stopped = results[0].value
    assert (stopped["step"], stopped["checkpoint"]) == (0, None)
    assert stopped["stopped"] == "SIGTERM on rank 1"


def test_a_stop_during_the_test_repeats_the_test(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """The test of the first epoch takes seconds; the signal comes in the middle of it."""
    faults = [{"rank": 0, "step": 100, "do": "term"}]
    results = run_forked(tmp_path, faults, test_pause_s=0.2, tests=10)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert results[0].value["step"] == 20
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_text() == ""
    results = run_forked(tmp_path, [])
    assert results[0].value["weights_sha256"] == undisturbed["exact"]
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2]


def test_a_stop_in_the_middle_of_a_save_keeps_both(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    results = run_forked(tmp_path, [{"rank": 1, "step": 8, "do": "term_in_save"}], **SLOW)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert results[0].value["stopped"] == "SIGTERM on rank 1"
    found = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(found) == 2 and found[1] == results[0].value["step"]  # nothing unfinished
    results = run_forked(tmp_path, [])
    assert results[0].value["weights_sha256"] == undisturbed["exact"]


def test_a_second_ctrl_c_ends_the_job_at_once(tmp_path: Path) -> None:
    """With steps of seconds, so that the stop after the common step would take far longer."""
    interrupts = [{"rank": 1, "step": 1, "do": "interrupt"}, {"rank": 1, "step": 1, "do": "interrupt"}]
    results = run_forked(tmp_path, interrupts, pause_s=0.5)
    assert results[1].exit_code == 130
    assert all(result.exit_code != 0 for result in results)
    assert "stopped by ctrl-C" in "".join(result.stderr for result in results)


@pytest.mark.parametrize("do", ["term_launcher", "interrupt_launcher"])
def test_a_signal_to_torchrun_stops_the_job_in_order(
    tmp_path: Path, undisturbed: dict[str, str], do: str
) -> None:
    (ended,) = run_with_agents(tmp_path, [{"rank": 0, "step": 5, "do": do}], [2], **SLOW)
    assert "localpipe: stopped by SIG" in ended.output and "saved in" in ended.output
    assert ended.code != 0  # of torchrun, whose own signal it was; a rank that does not exit 0 says so with a line
    assert ended.result["step"] > 5 and ended.alive() == [] and len(ended.lines) == 1
    again = run_forked(tmp_path, [], ranks=2)
    assert again[0].value["weights_sha256"] == undisturbed["exact"]


def test_a_second_ctrl_c_at_torchrun_ends_the_job_at_once(tmp_path: Path) -> None:
    """Which torchrun passes on as SIGTERM."""
    interrupts = [{"rank": 1, "step": 1, "do": "interrupt_launcher"}] * 2
    (ended,) = run_with_agents(tmp_path, interrupts, [2], pause_s=0.5)
    assert ended.code != 0 and ended.alive() == []
    assert "saved in" not in ended.output and "stopped by SIGTERM" in ended.lines[-1]
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_free_stages_stop_as_well(tmp_path: Path) -> None:
    settings = {"schedule": {"kind": "free"}}
    results = run_forked(tmp_path, [{"rank": 0, "step": 5, "do": "term"}], settings=settings, span=1, **SLOW)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    step = results[0].value["step"]
    assert 5 < step < 40 and all(result.value["step"] == step for result in results)
    results = run_forked(tmp_path, [], settings=settings, span=1)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert results[0].value["steps"] == 40


def test_one_process_stops_in_order_too(tmp_path: Path) -> None:
    (result,) = run_forked(tmp_path, [{"rank": 0, "step": 5, "do": "interrupt"}], ranks=1, **SLOW)
    assert result.exit_code == 0, result.stderr
    assert result.value["stopped"] == "SIGINT on rank 0"
