"""Timelines: rates in the steady state, traces on disk, and events recorded by a real stage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from helpers_edges import start_group, team_of
from helpers_spawn import run_ranks
from tiny import tiny_batch, tiny_config, tiny_stage, train_on

from pipeline.base.errors import ConfigError
from pipeline.edges.wire import Header, MessageKind
from pipeline.stage import recorder as recording
from pipeline.stage.events import SEND, WAIT, Event, read_trace, steady_state, write_trace
from pipeline.stage.recorder import Recorder, clock_offset_s
from pipeline.stage.schedule import together
from pipeline.stage.watch import Watch


def step_events(rank: int, step: int, start_s: float, work_s: float, wait_s: float) -> list[Event]:
    return [
        Event(rank, "F", rank, 0, step, start_s, start_s + work_s),
        Event(rank, WAIT, rank, 0, step, start_s + work_s, start_s + work_s + wait_s),
        Event(rank, "U", rank, -1, step, start_s + work_s + wait_s, start_s + work_s + wait_s),
    ]


def two_ranks(steps: int = 10) -> list[Event]:
    """A step every second; rank 0 works 0.8 s of it, rank 1 half of it. The pipe takes 3 s to fill."""
    events = []
    for step in range(steps):
        events += step_events(0, step, step + 0.0, 0.8, 0.2) + step_events(1, step, step + 3.0, 0.5, 0.5)
    return events


def test_the_steady_state_has_period_busy_shares_and_bound() -> None:
    state = steady_state(two_ranks(), 2, 8)
    assert state.step_s == pytest.approx(1.0)
    assert state.busy == pytest.approx((0.8, 0.5))
    assert state.stage_s == pytest.approx((0.8, 0.5))
    assert state.bound_s == pytest.approx(0.8) and state.efficiency == pytest.approx(0.8)


def test_messages_on_their_way_are_no_work() -> None:
    sends = [Event(0, SEND, 0, 0, step, step + 0.1, step + 0.9) for step in range(10)]
    assert steady_state([*two_ranks(), *sends], 2, 8) == steady_state(two_ranks(), 2, 8)


def test_a_window_without_events_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 has no event of step 12"):
        steady_state(two_ranks(), 2, 12)
    with pytest.raises(ValueError, match="no window"):
        steady_state(two_ranks(), 3, 3)


def test_a_trace_is_a_chrome_trace_and_reads_back(tmp_path: Path) -> None:
    events = sorted([*two_ranks(2), Event(0, SEND, 0, 0, 0, 0.5, 0.75)], key=lambda e: (e.start_s, e.rank))
    path = tmp_path / "trace.json"
    write_trace(events, path, "two ranks")
    rows = json.loads(path.read_text())["traceEvents"]
    assert {row["args"]["name"] for row in rows if row["name"] == "process_name"} == {"rank 0", "rank 1"}
    forward = next(row for row in rows if row["ph"] == "X" and row["cat"] == "forward")
    assert (forward["ts"], forward["pid"], forward["tid"]) == (0.0, 0, 0) and forward["dur"] == pytest.approx(0.8e6)
    found = read_trace(path)
    assert [(e.rank, e.kind, e.step) for e in found] == [(e.rank, e.kind, e.step) for e in events]
    assert [e.end_s for e in found] == pytest.approx([e.end_s for e in events])


@pytest.mark.parametrize("text", ["", "{}", '{"otherData": {"format": "other"}, "traceEvents": []}'])
def test_a_foreign_trace_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"foreign\.json.*give a trace\.json"):
        read_trace(path)


def test_a_stage_records_every_action_once_and_nothing_overlaps() -> None:
    stage, _, _ = tiny_stage(tiny_config("infopro", "hpff", 2, schedule={"micro_batches": 2, "kind": "async"}))
    recorder = Recorder(0, torch.device("cpu"))
    stage.watch = Watch(recorder=recorder)
    before = time.perf_counter()
    stage.begin_epoch(0, 0)
    for step in range(4):
        train_on(stage, 1, step, tiny_batch(step))
    stage.end_epoch(1, 4)
    after = time.perf_counter()
    events = recorder.events()
    work = [event for event in events if event.kind not in (WAIT, SEND)]
    expected = {(a.kind.value, a.module, a.micro_batch, step) for a in stage.schedule for step in range(4)}
    assert len(work) == len(expected)
    assert {(event.kind, event.module, event.micro_batch, event.step) for event in work} == expected
    assert before <= events[0].start_s and events[-1].end_s <= after
    for one, following in zip(events, events[1:], strict=False):
        assert one.start_s <= one.end_s <= following.start_s


def test_waiting_for_a_message_and_for_room_become_wait_events(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _, _ = tiny_stage(tiny_config("dgl", "plain", 1))
    recorder = Recorder(3, torch.device("cpu"), offset_s=100.0)
    clock = iter([8.0])
    monkeypatch.setattr(recording.time, "perf_counter", lambda: next(clock))
    recorder.actions(stage.schedule[:1], step=7, arrived=1.0, started=3.0, blocked_s=2.0)
    monkeypatch.undo()
    recorder.sent(3, Header(MessageKind.TRAIN, 1, 7, 0), 6.0, 9.0)
    recorder.sent(3, Header(MessageKind.EVAL, 1, 7, 0), 6.0, 9.0)
    found = [(event.kind, event.start_s, event.end_s) for event in recorder.events()]
    assert found == [(WAIT, 101.0, 103.0), ("F", 103.0, 106.0), (WAIT, 106.0, 108.0), (SEND, 106.0, 109.0)]


def test_what_is_done_together_is_shown_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2, schedule={"kind": "async"}))
    *_, updates = together(stage.schedule)
    assert len(updates) == len(modules)
    recorder = Recorder(0, torch.device("cpu"))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: 6.0)
    recorder.actions(updates, step=7, arrived=1.0, started=1.0, blocked_s=0.0)
    found = recorder.events()
    assert [(event.kind, event.module, event.start_s, event.end_s) for event in found] == [
        ("U", index, 1.0 + index, 2.0 + index) for index in range(5)
    ]
    assert [event.step for event in found] == [7 - update.lag for update in updates] != [7] * 5


def offsets(rank: int) -> list[float]:
    """Offsets on one host, then with two host names and a clock of rank 1 that is 1,000 s ahead."""
    store = start_group(rank, 2)
    same = clock_offset_s(team_of("same", store, rank, 2, 30.0))
    if rank == 1:
        true_clock = time.perf_counter
        recording.time.perf_counter = lambda: true_clock() + 1000.0
    recording._host = lambda: f"host{rank}"
    other = clock_offset_s(team_of("other", store, rank, 2, 30.0))
    store.set(f"done/{rank}", "1")
    store.wait(["done/0", "done/1"])
    torch.distributed.destroy_process_group()
    return [same, other]


def test_clocks_of_two_hosts_are_aligned_to_rank_0() -> None:
    results = run_ranks(offsets, 2)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value == [0.0, 0.0]
    assert results[1].value[0] == 0.0
    assert results[1].value[1] == pytest.approx(-1000.0, abs=1.0)
