"""The end of a process because of a failure: one line at most, nothing undone, nobody left on this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.base.errors import MARK
from pipeline.ranks import exit as exits
from pipeline.ranks import launcher, process
from pipeline.ranks.exit import LINGER_S, LONGEST, Exit
from pipeline.ranks.keys import Key
from pipeline.ranks.peers import Peers
from pipeline.ranks.process import Process, _host, _state

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


class Ended(BaseException):
    """Instead of the end of the process."""

    def __init__(self, code: int) -> None:
        self.code = code


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """os._exit raises; seconds that somebody has slept."""

    def end(code: int) -> None:
        raise Ended(code)

    slept: list[float] = []
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(process, "REAP_S", 0.1)
    monkeypatch.setattr(exits, "time", type("Clock", (), {"sleep": slept.append}))
    return slept


def pair(host: int | None = None) -> tuple[Peers, Peers]:
    store = dist.HashStore()
    first, second = Peers(0, 2), Peers(1, 2)
    for peers in (first, second):
        peers.set = lambda key, value: None  # they are one process, which must not reap itself
        peers.join(store, host)
        del peers.set
    return first, second


def leave(peers: Peers, code: int, line: str | Callable[[], str], refused: bool = False) -> int:
    with pytest.raises(Ended) as ended:
        Exit(peers).leave(code, line, refused)
    return ended.value.code


def test_the_first_tells_on_one_line_and_the_next_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = pair()
    assert leave(second, 1, "boom\n  in  the\tmiddle") == 1
    assert capfd.readouterr().err == "localpipe: boom in the middle\n"

    def never() -> str:
        raise AssertionError("a loser need not know its story")

    assert leave(first, 143, never) == 143
    assert capfd.readouterr().err == ""


def test_a_line_has_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    leave(pair()[0], 1, "x" * 5000)
    assert len(capfd.readouterr().err) == len(f"{MARK}\n") + LONGEST


def test_the_launcher_is_told_the_line_and_whether_it_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "attempt_0" / "0"
    folder.mkdir(parents=True)
    monkeypatch.setenv(launcher.FILE, str(folder / "error.json"))
    leave(pair()[0], 1, "no such key", refused=True)
    told = json.loads((folder / "error.json").read_text())
    assert told["message"]["message"] == "no such key" and told["refused"]


def test_what_would_stay_undone_is_done_and_what_fails_there_hides_nothing() -> None:
    done: list[str] = []

    def restore() -> None:
        done.append("terminal")
        raise OSError("no terminal")

    leaving = Exit(pair()[0])
    leaving.before = restore
    with pytest.raises(Ended):
        leaving.leave(1, "boom")
    assert done == ["terminal"]


@pytest.mark.parametrize(("place", "killed"), [("here", True), ("elsewhere", False)])
@pytest.mark.parametrize("tells", [True, False])
def test_who_tells_ends_the_others_of_its_machine(place: str, killed: bool, tells: bool) -> None:
    first, second = pair()
    child = subprocess.Popen(SLEEP)
    try:
        host = _host() if place == "here" else place
        peer = Process(child.pid, _state(child.pid)[1], host, "modules 1-1")
        first.set(Key.PROCESS(rank=1), json.dumps(asdict(peer)))
        if not tells:
            first.set(Key.FAILURE(), json.dumps({"rank": 1, "host": "", "launcher": 0, "refused": False}))
        leave(first, 1, "boom")
        if killed and tells:
            assert child.wait(10) == -9
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.2)
    finally:
        child.kill()
        child.wait()


def test_a_process_that_has_not_come_to_the_store_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it starts: torchrun would wait for it for half a minute."""
    for rank in ("0", "1"):
        (tmp_path / "attempt_0" / rank).mkdir(parents=True)
    monkeypatch.setenv(launcher.FILE, str(tmp_path / "attempt_0" / "0" / "error.json"))
    child = subprocess.Popen(SLEEP)
    try:
        peer = Process(child.pid, _state(child.pid)[1], _host(), "starting")
        (tmp_path / "attempt_0" / "1" / "process.json").write_text(json.dumps(asdict(peer)))
        leave(Peers(0, 2), 1, "rank 1 has not started")
        assert child.wait(10) == -9
    finally:
        child.kill()
        child.wait()


def test_workers_of_a_loader_end_first() -> None:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    leave(pair()[0], 1, "boom")
    worker.join(10)
    assert worker.exitcode == -9


def test_the_host_of_the_store_stays_until_the_others_can_have_read_it(ends: list[float]) -> None:
    first, second = pair(host=0)
    leave(first, 1, "boom")
    assert ends == [LINGER_S]
    leave(second, 1, "")
    assert ends == [LINGER_S]
