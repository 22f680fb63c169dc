"""Which attempt is this: ranks that start, die, start again and meet what their predecessors have left."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from helpers_spawn import run_ranks

from pipeline.base.errors import ConfigError, DeadlineExceeded
from pipeline.ranks.attempt import Job, agree_on_attempt, open_store
from pipeline.ranks.team import Team

HANG_S = 60.0


@pytest.fixture
def server() -> Iterator[dist.TCPStore]:
    """The launcher's store."""
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Rank(threading.Thread):
    """A process of one attempt, with a connection of its own."""

    def __init__(self, server: dist.TCPStore, rank: int, world_size: int, deadline_s: float = HANG_S) -> None:
        super().__init__(daemon=True)
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        self._team = Team(rank, world_size, dist.PrefixStore("/job", client), deadline_s=deadline_s)
        self.name_of_attempt = ""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.name_of_attempt = agree_on_attempt(self._team)
        except Exception as error:
            self.error = error


def agreed(ranks: list[Rank]) -> str:
    """The name that all of them have."""
    for rank in ranks:
        rank.join(HANG_S)
    names = {rank.name_of_attempt for rank in ranks}
    assert len(names) == 1 and names != {""}, [rank.error for rank in ranks]
    return names.pop()


@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_attempt_gets_a_name_of_its_own(server: dist.TCPStore, world_size: int) -> None:
    names = [agreed([Rank(server, rank, world_size) for rank in range(world_size)]) for _ in range(3)]
    assert len(set(names)) == 3


def test_an_attempt_may_have_fewer_or_more_ranks_than_the_one_before(server: dist.TCPStore) -> None:
    names = {agreed([Rank(server, rank, size) for rank in range(size)]) for size in (4, 2, 5)}
    assert len(names) == 3


def test_nobody_meets_the_dead(server: dist.TCPStore) -> None:
    """Three of four ranks of an attempt that never came about have left their hellos, its rank 0 a roll of them and of
    the attempt before. The next ranks come one by one, rank 0 first, in the middle or last."""
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (3, 2, 1, 0)):
        before = agreed([Rank(server, rank, 4) for rank in range(4)])
        dead = [Rank(server, rank, 4, deadline_s=0.3) for rank in (0, 1, 3)]
        for rank in dead:
            rank.join(HANG_S)
            assert isinstance(rank.error, DeadlineExceeded)
        living = []
        for rank in order:
            living.append(Rank(server, rank, 4))
            living[-1].join(0.1)
            assert living[-1].is_alive() or len(living) == 4
        assert agreed(living) != before


def test_a_late_rank_takes_the_place_of_a_dead_one(server: dist.TCPStore) -> None:
    """Rank 2 has said hello and died. Those who have answered to the roll with its id answer again."""
    Rank(server, 2, 3, deadline_s=0.1).join(HANG_S)
    others = [Rank(server, rank, 3) for rank in (0, 1)]
    others[0].join(0.3)
    assert all(rank.is_alive() for rank in others)
    agreed([*others, Rank(server, 2, 3)])


def test_absent_ranks_are_named(server: dist.TCPStore) -> None:
    agreed([Rank(server, rank, 4) for rank in range(4)])
    ranks = [Rank(server, rank, 4, deadline_s=0.5) for rank in (0, 2)]
    for rank, number in zip(ranks, (0, 2), strict=True):
        rank.join(HANG_S)
        assert str(rank.error) == (
            f"rank {number} has waited 0.5 s for rank 1, 3 to start; are all 4 processes running? raise "
            "runtime.deadline_s if they need longer"
        )
    alone = Rank(server, 3, 4, deadline_s=0.5)
    alone.join(HANG_S)
    assert "for rank 0 to start" in str(alone.error)


@pytest.mark.skipif(not hasattr(dist.Store, "list_keys"), reason="this torch cannot list keys")
def test_what_the_dead_have_left_is_removed(server: dist.TCPStore) -> None:
    store = dist.PrefixStore("/job", server)
    old = agreed([Rank(server, rank, 2) for rank in range(2)])
    store.set(f"attempt/{old}/0/beat/1", "...")
    store.set("job/0/run_directory", "runs/x")
    server.set("another job", "1")
    new = agreed([Rank(server, rank, 2) for rank in range(2)])
    store.set(f"attempt/{new}/0/beat/1", "...")
    newest = agreed([Rank(server, rank, 2) for rank in range(2)])
    kept = {"hello/0", "hello/1", "roll", f"here/{newest}/1", f"go/{newest}", "job/0/run_directory"}
    assert set(store.list_keys()) == kept
    assert server.check(["another job"])


def test_runs_have_keys_of_their_own_and_the_job_remembers(
    server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    seen = []
    for _ in range(2):  # two attempts of two runs each
        job = Job(0, 1)
        for _ in range(2):
            store, job_store = job.next_run(HANG_S)
            seen.append((store.add("count", 1), job_store.add("count", 1)))
    assert seen == [(1, 1), (1, 1), (1, 2), (1, 2)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert Job(0, 1).next_run(HANG_S)[1].add("count", 1) == 1


# -- where there is no launcher ------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(ConfigError, match=f"MASTER_PORT = {other.getsockname()[1]}: the port is taken"):
            open_store(0, 5.0)


@pytest.mark.parametrize(("serves", "who"), [("True", "the launcher"), ("False", "rank 0")])
def test_a_store_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, serves: str, who: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(closed.getsockname()[1]))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", serves)
        with pytest.raises(DeadlineExceeded, match=f"rank 1 has waited 0.5 s for a store at .*: has {who} started"):
            open_store(1, 0.5)


def test_an_address_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="not MASTER_ADDR and MASTER_PORT"):
        open_store(0, 5.0)


def join(rank: int) -> Any:
    job = Job(rank, 3)
    stores = [job.next_run(HANG_S)[0] for _ in range(2)]
    for number, store in enumerate(stores):
        store.set(f"{number}/{rank}", "here")
        store.wait([f"{number}/{r}" for r in range(3)])
    left = stores[0].add("left", 1)
    while rank == 0 and left < 3:  # it serves the store
        left = stores[0].add("left", 0)
    return job._attempt


def test_ranks_meet_at_a_store_that_rank_0_serves() -> None:
    ranks = run_ranks(join, 3, timeout_s=HANG_S)
    assert len({rank.value for rank in ranks}) == 1 and ranks[0].value, [rank.stderr for rank in ranks]
