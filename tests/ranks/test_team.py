"""The ranks of a run: what all tell all, what a restart finds again, and who is told of a wait."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.base.errors import ConfigError, DeadlineExceeded
from pipeline.ranks import keys
from pipeline.ranks.keys import Key
from pipeline.ranks.team import Team

HANG_S = 60.0


def together(work: Callable[[Team], Any], size: int = 3) -> list[Any]:
    """What ``work`` returns on every rank, or its error."""
    store = dist.HashStore()

    def rank(number: int) -> Any:
        try:
            return work(Team(number, size, store, deadline_s=HANG_S))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_everyone_gets_what_everyone_publishes_in_order_of_ranks() -> None:
    assert together(lambda team: team.collect("its name", f"r{team.rank}")) == [["r0", "r1", "r2"]] * 3


def test_ranks_that_differ_are_named_on_every_rank() -> None:
    errors = together(lambda team: team.agree("colour", "red" if team.rank == 1 else "blue"))
    assert [type(error) for error in errors] == [ConfigError] * 3
    assert {str(error) for error in errors} == {
        "ranks disagree about colour: ranks 0, 2 have 'blue'; rank 1 has 'red'"
    }


def test_nobody_goes_on_before_all_are_here() -> None:
    here = []

    def work(team: Team) -> int:
        if team.rank == 2:
            while len(here) < 2:  # the others are on their way
                pass
        here.append(team.rank)
        team.meet("a place", "come")
        return len(here)

    assert together(work) == [3, 3, 3]


def test_a_team_of_one_has_nobody_to_wait_for() -> None:
    team = Team(deadline_s=0.0)
    assert team.leads and team.size == 1
    team.meet("the end", "finish")
    team.agree("colour", "red")
    assert team.collect("its name", "r0") == ["r0"]
    assert team.gather({"a": 1}) == [{"a": 1}] and team.broadcast("x") == "x"
    assert team.recall(Key.RUN_DIRECTORY()) is None


def test_a_later_attempt_recalls_what_an_earlier_one_has_left_and_nothing_else() -> None:
    memory = dist.HashStore()
    before = Team(memory=memory)
    before.remember(Key.RUN_DIRECTORY(), "runs/x")
    before.set(Key.STOP())
    again = Team(memory=memory)
    assert again.recall(Key.RUN_DIRECTORY()) == "runs/x" and not again.has(Key.STOP())


def test_what_is_taken_is_gone() -> None:
    team = Team(size=2)
    reports = team.each(Key.EPOCH, epoch=3)
    assert reports == {0: "epoch/3/0", 1: "epoch/3/1"}
    for rank, key in reports.items():
        team.set(key, f"report {rank}")
    assert team.take(reports.values()) == ["report 0", "report 1"]
    assert not any(team.has(key) for key in reports.values())


def test_no_two_uses_of_a_store_share_a_key() -> None:
    first_parts = Counter(key.value.partition("/")[0] for key in Key)
    assert [part for part, uses in first_parts.items() if uses > 1] == []
    with pytest.raises(KeyError, match="rank"):
        Key.EPOCH(epoch=3)


def test_keys_are_written_out_in_one_file_only() -> None:
    """Whoever calls a store names the key by the table."""
    pattern = re.compile(r"""store\.(set|get|check|add|multi_get|delete_key|compare_set|wait)\(\[?f?["']""")
    found = [path.name for path in Path(keys.__file__).parents[1].rglob("*.py") if pattern.search(path.read_text())]
    assert found == []


class Judge:
    """A patience that notes which threads have told it of a wait, and lasts for a number of questions."""

    def __init__(self, answers: int) -> None:
        self.told: list[threading.Thread] = []
        self.asked: list[threading.Thread] = []
        self._answers = answers

    def begin(self, peer: int, what: str) -> None:
        self.told.append(threading.current_thread())

    def end(self) -> None:
        self.told.append(threading.current_thread())

    def verdict(self, peer: int) -> str | None:
        self.asked.append(threading.current_thread())
        return None if len(self.asked) <= self._answers else f"rank {peer} sleeps"


def test_only_the_thread_that_made_the_team_tells_of_waits_and_any_may_ask() -> None:
    judge = Judge(answers=1)
    team = Team(0, 2, patience=judge, deadline_s=0.1)
    errors: list[DeadlineExceeded] = []

    def wait() -> None:
        with pytest.raises(DeadlineExceeded) as late:
            team.wait_for({1: Key.LEFT(rank=1)}, "leave")
        errors.append(late.value)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(HANG_S)
    assert judge.told == [] and judge.asked == [thread, thread]
    wait()
    assert judge.told == [threading.main_thread()] * 2 and judge.asked[2:] == [threading.main_thread()]
    assert [str(error) for error in errors] == [
        "rank 0 has waited 0.125 s for rank 1 to leave; rank 1 sleeps",
        "rank 0 has waited 0.1 s for rank 1 to leave; rank 1 sleeps",
    ]
