"""A rank that dies, raises or hangs in the middle of a step: everything ends, with one line that names it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import alive, line_of, run_forked, run_with_agents

pytestmark = pytest.mark.long

ENDS_WITHIN_S = 10.0
DEADLINE_S = 3.0
SLOW_DEADLINE_S = 2.0


@pytest.mark.parametrize(
    ("do", "rank", "words"),
    [
        ("raises", 1, ["rank 1", "module 1", "step 3", "ValueError: boom in the middle of a step"]),
        ("raises", 0, ["rank 0", "module 0", "step 3", "ValueError"]),
        ("kill", 1, ["rank 1", "module 1", "died without a message"]),
        ("kill", 2, ["rank 2", "modules 2-3", "died without a message"]),
    ],
)
def test_all_processes_end_with_one_message(tmp_path: Path, do: str, rank: int, words: list[str]) -> None:
    results = run_forked(tmp_path, [{"rank": rank, "step": 3, "do": do}], settings={"runtime": {"deadline_s": 60.0}})
    assert all(result.exit_code != 0 for result in results)
    line = line_of(results)
    for word in words:
        assert word in line
    assert time.time() - float((tmp_path / "fault-0").read_text()) < ENDS_WITHIN_S
    if do == "raises":
        traceback = (tmp_path / "run" / f"failure-rank{rank}.txt").read_text()
        assert "before_action" not in line and "boom" in traceback


def test_a_hung_rank_is_named_with_who_waits_for_it(tmp_path: Path) -> None:
    fault = {"rank": 1, "step": 8, "do": "stop"}  # about a second after the start: it has been heard of
    results = run_forked(tmp_path, [fault], settings={"runtime": {"deadline_s": DEADLINE_S}}, pause_s=0.03)
    assert time.time() - float((tmp_path / "fault-0").read_text()) < DEADLINE_S + ENDS_WITHIN_S
    assert all(result.exit_code != 0 for result in results)
    line = line_of(results)
    assert "rank 1" in line and "module 1" in line and "not been heard of for" in line
    assert "waits for" in line and "since" in line


def test_ranks_end_when_torchrun_itself_is_stopped(tmp_path: Path) -> None:
    """It serves the store; nobody but its ranks can end them."""
    fault = {"rank": 1, "step": 5, "do": "stop_launcher"}
    settings = {"runtime": {"deadline_s": DEADLINE_S}}
    with pytest.raises(TimeoutError, match=r"the store has not answered for .* s \(the launcher stopped\?"):
        run_with_agents(tmp_path, [fault], [2], settings=settings, pause_s=0.02, timeout_s=20.0)
    assert alive(tmp_path) == []


def test_a_save_waits_for_a_rank_that_is_slow(tmp_path: Path) -> None:
    """It writes two modules, each within the deadline, while all wait for it: two saves of one rank never overlap."""
    settings = {"runtime": {"deadline_s": DEADLINE_S}, "checkpoint": {"every_steps": 2, "keep": 9}}
    results = run_forked(tmp_path, [{"rank": 2, "step": 1, "do": "save_slowly"}], settings=settings, epochs=1, steps=5)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-00000002", "step-00000004", "step-00000005"]


def test_ranks_wait_for_one_that_is_slow_to_open_the_data(tmp_path: Path) -> None:
    settings = {"runtime": {"deadline_s": SLOW_DEADLINE_S}}
    results = run_forked(tmp_path, [], settings=settings, open_pause_s=2.5 * SLOW_DEADLINE_S, epochs=1, steps=5)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert results[0].value["steps"] == 5
