"""A loss that is no number, and a stage that runs out of memory: the stage stops before its update and says where."""

from __future__ import annotations

from pathlib import Path

from harness import line_of, run_forked


def test_a_nan_loss_in_the_middle_stage_ends_the_run_by_name(tmp_path: Path) -> None:
    results = run_forked(tmp_path, [{"rank": 1, "step": 7, "do": "poison"}])
    assert all(result.exit_code != 0 for result in results)
    line = line_of(results)
    assert "rank 1" in line and "module 1" in line and "step 7" in line and "nan" in line.lower()


def test_a_stage_without_memory_says_what_it_holds_and_which_knob_to_turn(tmp_path: Path) -> None:
    results = run_forked(tmp_path, [{"rank": 1, "step": 7, "do": "exhaust_memory"}])
    assert all(result.exit_code != 0 for result in results)
    line = line_of(results)
    assert "rank 1" in line and "memory" in line and "MiB" in line and "data.batch_size" in line
