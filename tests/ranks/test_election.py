"""Who tells why a run ends, with a store, without one, and which exit code the others have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.ranks import launcher
from pipeline.ranks.election import code_of_loser, elected, is_over
from pipeline.ranks.keys import Key
from pipeline.ranks.peers import Peers


def team(size: int = 3, host: int | None = None) -> list[Peers]:
    store = dist.HashStore()
    found = [Peers(rank, size) for rank in range(size)]
    for peers in found:
        peers.join(store, host)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a rank which torchrun watches."""
    place = tmp_path / "attempt_0" / "1"
    place.mkdir(parents=True)
    monkeypatch.setenv(launcher.FILE, str(place / "error.json"))
    return place


def test_the_first_to_stand_is_elected_and_nobody_else() -> None:
    first, second, third = team()
    assert not is_over(first)
    assert elected(second, refused=True)
    assert is_over(first)
    assert not elected(first, refused=False) and not elected(third, refused=False) and not elected(second, False)
    ballot = json.loads(first.get(Key.FAILURE()))
    assert ballot == {"rank": 1, "host": first.me.host, "launcher": first.launcher, "refused": True}


@pytest.mark.parametrize(("host", "teller"), [(None, 0), (0, 1), (1, 0)])
def test_without_a_store_the_lowest_rank_but_its_host_tells(host: int | None, teller: int) -> None:
    ranks = team(host=host)
    for peers in ranks:
        peers.store_gone = True
    assert [elected(peers, False) for peers in ranks if peers.rank != host] == [
        peers.rank == teller for peers in ranks if peers.rank != host
    ]


def test_without_a_store_the_lowest_rank_of_every_machine_tells() -> None:
    ranks = team(4, host=0)
    for peers in ranks:
        peers.store_gone = True
        there = {2, 3} if peers.rank < 2 else {0, 1}
        peers.known = {rank: replace(peers.me, host="elsewhere") for rank in there}
    assert [elected(peers, False) for peers in ranks[1:]] == [True, True, False]


def test_a_store_that_goes_during_the_vote_is_gone() -> None:
    class Going:
        def check(self, keys: list[str]) -> bool:
            return False

        def compare_set(self, *arguments: str) -> bytes:
            raise RuntimeError("broken pipe")

    first, second, _ = team(host=0)
    second.store = Going()
    assert elected(second, False) and second.store_gone  # rank 0 has died with it


def test_before_there_is_a_store_the_launchers_files_decide(folder: Path) -> None:
    assert elected(Peers(0, 2), False) and not elected(Peers(1, 2), False)


def test_a_loser_is_not_listed_beside_the_one_that_its_own_launcher_sees(folder: Path) -> None:
    first, second, _ = team()
    assert code_of_loser(second, 1) == 1  # nobody has told yet
    assert elected(first, refused=True)
    assert code_of_loser(second, 1) == 0
    assert not (folder / "error.json").exists()


@pytest.mark.parametrize("refused", [True, False])
def test_another_launcher_learns_from_its_own_rank_that_a_refusal_is_final(folder: Path, refused: bool) -> None:
    first, second, _ = team()
    first.launcher = -1
    assert elected(first, refused)
    assert code_of_loser(second, 1) == 1
    told = folder / "error.json"
    assert told.exists() == refused
    if refused:
        assert json.loads(told.read_text())["refused"]


def test_without_a_launcher_that_watches_a_loser_fails_as_well() -> None:
    first, second, _ = team()
    assert elected(first, refused=True) and code_of_loser(second, 143) == 143
