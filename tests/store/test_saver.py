"""The saver of rank 0: whom it waits for, for how long, and that its thread's waits are not those of the rank."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_config, tiny_plan

from pipeline.base.config import CheckpointConfig
from pipeline.ranks.keys import Key
from pipeline.ranks.team import Team
from pipeline.run.telemetry import StageReport, Telemetry
from pipeline.store import checkpoint
from pipeline.store.saver import Document, Saver

DEADLINE_S = 0.2
STEP = 7


class Peer:
    """Rank 1, of which only its keys exist; as the patience of rank 0 it lasts until rank 1 has done all it can."""

    def __init__(self, does: list[tuple[str, str]]) -> None:
        self.store = dist.HashStore()
        self._does = does
        self.told: list[threading.Thread] = []
        self.asked: list[threading.Thread] = []

    def begin(self, peer: int, what: str) -> None:
        self.told.append(threading.current_thread())

    def end(self) -> None:
        self.told.append(threading.current_thread())

    def verdict(self, peer: int) -> str | None:
        self.asked.append(threading.current_thread())
        if not self._does:
            return f"rank {peer} sleeps"
        self.store.set(*self._does.pop(0))
        return None


BEGUN = (Key.SAVING(step=STEP, rank=1), "1")
SAVED = (Key.SAVED(step=STEP, rank=1), json.dumps({"files": {}}))
REPORT = json.dumps(dict.fromkeys(field.name for field in dataclasses.fields(StageReport)))
REPORTED = (Key.EPOCH(epoch=1, rank=1), REPORT)


def saver_of(peer: Peer, folder: Path) -> tuple[Saver, Team]:
    team = Team(0, 2, peer.store, deadline_s=DEADLINE_S, patience=peer)
    return Saver(team, folder / "checkpoints", CheckpointConfig()), team


def save(saver: Saver, contents: Any = lambda: ({}, [])) -> str | None:
    saver.save(STEP, {}, Document("", contents))
    saver.join()
    return saver.error()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / f".step-{STEP:08d}.partial").mkdir(parents=True)


def test_a_rank_that_does_not_come_is_named_with_what_is_known_of_it(tmp_path: Path) -> None:
    saver, _ = saver_of(Peer([]), tmp_path)
    assert save(saver) == "rank 1 did not save its part within 0.2 s: rank 1 sleeps"
    assert saver.take_notes() == [
        f"the checkpoint of step {STEP} was not saved: rank 1 did not save its part within 0.2 s: rank 1 sleeps; older "
        "ones are untouched"
    ]


def test_a_rank_that_has_begun_must_get_on_whatever_else_it_does(tmp_path: Path) -> None:
    peer = Peer([BEGUN])
    assert save(saver_of(peer, tmp_path)[0]) == "rank 1 did not save its part within 0.2 s: no module of it is written"
    assert len(peer.asked) == 1


def test_what_the_savers_thread_waits_for_is_not_what_the_rank_waits_for(tmp_path: Path) -> None:
    """The thread waits for rank 1's part, and then for its report, which the manifest needs: others would follow a
    wait of the rank that is none, and its end would tell them that the rank gets on."""
    peer = Peer([SAVED, REPORTED])
    saver, team = saver_of(peer, tmp_path)
    telemetry = Telemetry(team, tiny_plan(tiny_config(), 2), torch.device("cpu"), live=False)
    team.set(Key.EPOCH(epoch=1, rank=0), REPORT)
    collected: list[Any] = []

    def contents() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        collected.append(telemetry.collect(1, wait=True))
        return {}, []

    assert save(saver, contents) is None
    assert [len(reports) for reports in collected] == [2]
    assert [thread.name for thread in peer.asked] == ["saver", "saver"]
    assert set(peer.told) == {threading.main_thread()}


def test_states_are_written_once_they_have_arrived_and_not_by_the_main_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, _ = saver_of(Peer([SAVED]), tmp_path)
    done: list[tuple[str, bool]] = []

    def note(what: str) -> None:
        done.append((what, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(checkpoint, "write_module", lambda *arguments: note("written") or {})
    saver.save(STEP, {0: {}}, Document("", lambda: ({}, [])), lambda: note("arrived"))
    saver.join()
    assert done == [("arrived", False), ("written", False)]
