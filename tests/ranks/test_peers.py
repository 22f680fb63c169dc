"""What a rank knows of the others: who is dead, who has left, who is on another machine, whether the store is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch.distributed as dist

from pipeline.ranks.keys import Key
from pipeline.ranks.peers import Peers
from pipeline.ranks.process import Process, _host, _state

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that can be rank 1."""
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def of(child: subprocess.Popen[bytes], host: str = "") -> Process:
    return Process(child.pid, _state(child.pid)[1], host or _host(), "modules 2-3")


def joined(size: int = 3, host: int | None = None) -> Peers:
    peers = Peers(0, size)
    peers.join(dist.HashStore(), host)
    return peers


def publish(peers: Peers, rank: int, process: Process) -> None:
    peers.set(Key.PROCESS(rank=rank), json.dumps(asdict(process)))


def test_a_rank_is_dead_once_its_process_is_gone_unless_it_has_left(child: subprocess.Popen[bytes]) -> None:
    peers = joined()
    assert peers.dead() == []  # nobody has said who he is
    publish(peers, 1, of(child))
    assert peers.dead() == []
    child.kill()
    child.wait()
    assert peers.dead() == [1]
    peers.set(Key.LEFT(rank=1), "1")
    assert peers.left(1) and not peers.left(2) and peers.dead() == []


def test_nothing_is_known_of_processes_on_another_machine(child: subprocess.Popen[bytes]) -> None:
    peers = joined()
    publish(peers, 1, of(child, "another machine"))
    publish(peers, 2, of(child))
    child.kill()
    child.wait()
    assert peers.dead() == [2] and peers.elsewhere() == [1]


def test_modules_are_read_again_and_the_last_words_stay_when_the_store_goes(child: subprocess.Popen[bytes]) -> None:
    peers = joined()
    assert peers.modules(1) == "unknown modules"
    publish(peers, 1, replace(of(child), modules="starting"))
    assert peers.dead() == [] and peers.modules(1) == "starting"
    publish(peers, 1, of(child))
    assert peers.modules(1) == "modules 2-3"
    peers.store_gone = True
    assert peers.modules(1) == "modules 2-3"


def test_a_store_that_has_failed_once_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = joined()
    asked: list[list[str]] = []

    class Gone:
        def check(self, keys: list[str]) -> bool:
            asked.append(keys)
            raise RuntimeError("broken pipe")

    peers.store = Gone()
    assert not peers.has("x") and peers.store_gone
    assert not peers.has("x") and len(asked) == 1


def test_without_a_store_nobody_is_known() -> None:
    peers = Peers(0, 2)
    peers.leave()
    assert not peers.left(0) and peers.dead() == [] and peers.elsewhere() == []


def test_a_rank_whose_launcher_has_ended_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers(0, 2)
    assert not peers.orphaned()
    monkeypatch.setattr("os.getppid", lambda: 1 if peers.launcher != 1 else 2)
    assert peers.orphaned()
