"""Who is silent, who is hung and who is only slow: beats of several ranks in one process, on a clock of the test."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from pipeline.ranks import heartbeat
from pipeline.ranks.heartbeat import Heartbeat

DEADLINE_S = 10.0  # a beat every 2 s, silent after 8 s
SETUP_S = 60.0
TICK_S = 0.5


class Ranks:
    """Ranks that share a store, each with its sentinel's ticks; ``stopped`` ones do not tick."""

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.store = dist.HashStore()
        self.stopped: set[int] = set()
        monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.hearts = [Heartbeat(rank, world_size, DEADLINE_S, SETUP_S) for rank in range(world_size)]
        for rank, heart in enumerate(self.hearts):
            heart.describe(f"module {rank}")
            heart.progress(0, 7, f"F{rank}.0")

    def run(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Let time pass."""
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            meanwhile()
            for rank, heart in enumerate(self.hearts):
                if rank not in self.stopped:
                    heart.tick(self.store)
                    heart.idle()

    def wait(self, rank: int, peer: int) -> None:
        self.hearts[rank].begin(peer, f"for the gradient of step 7 from rank {peer}")

    def silent(self) -> dict[int, int]:
        """Who reports whom."""
        found = {rank: heart.next_is_silent() for rank, heart in enumerate(self.hearts) if rank not in self.stopped}
        return {rank: silent for rank, silent in found.items() if silent is not None}


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks(4, monkeypatch)
    ranks.run(10)
    return ranks


def test_nobody_is_silent_while_all_tick_even_if_nothing_moves(four: Ranks) -> None:
    four.run(100)
    assert four.silent() == {}


def test_a_stopped_rank_is_found_within_the_deadline_by_the_one_before_it(four: Ranks) -> None:
    four.stopped = {1}
    four.wait(0, 1)
    four.wait(2, 1)
    four.run(5)
    assert four.silent() == {}
    four.run(DEADLINE_S - 5)
    assert four.silent() == {0: 1}
    assert re.fullmatch(
        r"rank 1 \(module 1\) has not been heard of for \d+\.\d s \(stopped\? machine gone\? "
        r"runtime.deadline_s = 10\); rank 0 waits for the gradient of step 7 from rank 1 since 10.0 s; "
        r"rank 2 waits for the gradient of step 7 from rank 1 since 9.5 s",  # as of its beat, which came a tick later
        four.hearts[0].line_for_the_silent(),
    )


def test_all_stopped_ranks_are_named(four: Ranks) -> None:
    four.stopped = {1, 2}
    four.run(DEADLINE_S)
    assert four.silent() == {0: 1}
    line = four.hearts[0].line_for_the_silent()
    assert re.match(r"rank 1 \(module 1\) has not .*, rank 2 \(module 2\) has not .*\(stopped", line)
    assert "rank 0 (module 0) has been at 'F0.0' of epoch 0 step 7 for" in line
    assert "rank 3" not in line


def test_a_rank_that_never_said_anything_is_found_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2, monkeypatch)
    ranks.stopped = {1}
    ranks.run(DEADLINE_S)
    assert ranks.silent() == {}  # it may still be starting
    ranks.run(DEADLINE_S)
    assert ranks.silent() == {0: 1}
    assert ranks.hearts[0].line_for_the_silent().startswith("rank 1 has not been heard of for ")


def test_a_job_that_was_suspended_as_a_whole_goes_on(four: Ranks) -> None:
    four.wait(0, 1)
    four.hearts[1].progress(0, 8, "B1.0")
    four.run(2)
    four.now += 3600
    assert four.hearts[0].verdict(1) is None and four.silent() == {}
    four.run(4)
    assert four.hearts[0].verdict(1) is None and four.silent() == {}


def test_a_slow_rank_at_the_end_of_the_chain_is_waited_for(four: Ranks) -> None:
    for rank in (0, 1, 2):
        four.wait(rank, rank + 1)
    step = iter(range(1000))
    four.run(100, lambda: four.hearts[3].progress(0, next(step), "B3.0"))
    assert four.hearts[0].verdict(1) is None


def test_a_hung_rank_is_named_with_the_chain_that_leads_to_it(four: Ranks) -> None:
    for rank in (0, 1):
        four.wait(rank, rank + 1)
    four.hearts[2].progress(0, 8, "B2.0")
    four.run(DEADLINE_S - 1)
    assert four.hearts[0].verdict(1) is None
    four.run(4)
    assert re.fullmatch(
        r"rank 1 waits for the gradient of step 7 from rank 2 since 12.5 s; "
        r"rank 2 \(module 2\) has been at 'B2.0' of epoch 0 step 8 for 12.5 s - raise runtime.deadline_s if this .*",
        four.hearts[0].verdict(1),
    )


def test_an_activity_begins_anew_after_a_wait(four: Ranks) -> None:
    four.wait(0, 1)
    four.wait(1, 2)
    four.run(2 * DEADLINE_S)
    four.hearts[1].end()
    four.run(4)
    assert four.hearts[0].verdict(1) is None


def test_ranks_that_wait_for_each_other_are_told_once_all_have_waited_long(four: Ranks) -> None:
    four.wait(0, 1)
    four.wait(1, 2)
    four.run(8)
    four.wait(2, 1)
    four.run(8)
    assert four.hearts[0].verdict(1) is None
    four.run(4)
    verdict = four.hearts[0].verdict(1)
    assert verdict.startswith("rank 1 waits for the gradient of step 7 from rank 2 since 19.5 s;")
    assert "rank 2 waits for the gradient of step 7 from rank 1 since 11.5 s" in verdict
    assert verdict.endswith(": they wait for each other")


def test_a_stopped_rank_ends_a_wait_through_others(four: Ranks) -> None:
    four.stopped = {2}
    four.wait(0, 1)
    four.wait(1, 2)
    four.run(DEADLINE_S)
    assert four.hearts[0].verdict(1).startswith("rank 2 (module 2) has not been heard of for")


def test_before_the_first_step_one_thing_may_take_longer(four: Ranks) -> None:
    four.wait(0, 1)
    four.wait(1, 2)
    four.hearts[2].progress(-1, -1, "opening the data")
    four.run(SETUP_S - 1)
    assert four.hearts[0].verdict(1) is None
    four.run(4)
    assert re.fullmatch(
        r"rank 1 waits for .* from rank 2 since 6\d\.\d s; rank 2 \(module 2\) has been at 'opening the data' for "
        r"6\d\.\d s - raise runtime.setup_deadline_s if this .*",
        four.hearts[0].verdict(1),
    )


def test_a_rank_reports_itself_after_those_that_wait_for_it(four: Ranks) -> None:
    four.run(DEADLINE_S - 2)  # after as many
    assert four.hearts[2].overdue() is None
    four.run(3)
    assert re.fullmatch(
        r"rank 2 \(module 2\) has been at 'F2.0' of epoch 0 step 7 for \d\d\.\d s - raise runtime.deadline_s if .*",
        four.hearts[2].overdue(),
    )
    four.wait(2, 3)
    four.run(2 * DEADLINE_S)
    assert four.hearts[2].overdue() is None  # a wait has a judge of its own


def test_a_store_that_does_not_answer_ends_the_wait(four: Ranks) -> None:
    called, answer = threading.Event(), threading.Event()

    class Stuck:
        def set(self, key: str, value: str) -> None:
            called.set()
            answer.wait()

    four.wait(0, 1)
    four.run(2 * DEADLINE_S)
    four.now += heartbeat.PERIOD_S
    sentinel = threading.Thread(target=four.hearts[0].tick, args=(Stuck(),), daemon=True)
    sentinel.start()
    called.wait(30)
    four.now += DEADLINE_S / 2
    assert four.hearts[0].unanswered_s() == 0
    four.now += DEADLINE_S / 2
    assert four.hearts[0].verdict(1).startswith("the store has not answered for 10.0 s")
