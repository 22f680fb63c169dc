"""A wait for all ranks: it ends when they are here, or when the one that is missing is known to be hung or gone."""

from __future__ import annotations

import re

import pytest
import torch.distributed as dist

from pipeline.base.errors import DeadlineExceeded
from pipeline.ranks.team import Team

KEYS = {0: "here/0", 1: "here/1", 2: "here/2"}
DEADLINE_S = 0.1


class Judge:
    """A patience that sets one more key whenever it is asked, and lasts for ``answers`` questions."""

    def __init__(self, store: dist.Store, answers: int) -> None:
        self.store = store
        self.answers = answers
        self.asked: list[int] = []
        self.told: list[str] = []

    def begin(self, peer: int, what: str) -> None:
        self.told.append(f"{peer}: {what}")

    def end(self) -> None:
        self.told.append("end")

    def verdict(self, peer: int) -> str | None:
        if len(self.asked) == self.answers:
            return f"rank {peer} sleeps"
        self.asked.append(peer)
        self.store.set(KEYS[peer], "1")
        return None


def wait(patience: Judge) -> None:
    Team(7, 8, patience.store, deadline_s=DEADLINE_S, patience=patience).wait_for(KEYS, "report")


def test_nobody_is_told_of_a_wait_that_is_none() -> None:
    judge = Judge(dist.HashStore(), 0)
    for key in KEYS.values():
        judge.store.set(key, "1")
    wait(judge)
    assert judge.told == []


def test_slow_ranks_are_waited_for_one_after_another() -> None:
    judge = Judge(dist.HashStore(), 3)
    judge.store.set(KEYS[1], "1")
    wait(judge)
    assert judge.asked == [0, 2]
    assert judge.told == ["0: for rank 0 to report", "2: for rank 2 to report", "end"]


def test_the_wait_ends_with_the_ranks_that_are_missing_and_why() -> None:
    judge = Judge(dist.HashStore(), 1)
    with pytest.raises(DeadlineExceeded, match=re.escape("rank 7 has waited 0.125 s for ranks 1, 2 to report; rank 1")):
        wait(judge)
    assert judge.told[-1] == "end"


def test_without_patience_the_deadline_is_the_end() -> None:
    with pytest.raises(DeadlineExceeded, match="has waited 0.1 s for ranks 0, 1, 2 to report; rank 0 is slow, hung or"):
        Team(7, 8, deadline_s=DEADLINE_S).wait_for(KEYS, "report")
