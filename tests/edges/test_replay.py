"""The replay ring of schedule `free`: the sender never waits, the reader trains again on what is there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_edges import CPU, SMALL, start_group, team_of, train
from helpers_spawn import RankResult, run_ranks

from pipeline.base.errors import DeadlineExceeded
from pipeline.edges.connect import EdgeSpecs, connect
from pipeline.edges.wire import Header, MessageKind
from pipeline.ranks.team import Team

RING = 3


def pair_of_ends(team: Team, ring: int, max_uses: int) -> Any:
    """Sender on rank 0, ReplayReceiver on rank 1."""
    specs = EdgeSpecs(activation_out=SMALL) if team.leads else EdgeSpecs(activation_in=SMALL)
    sizes = {"activation_slots": ring + 3, "gradient_slots": 0, "depth": 2, "ring": ring, "max_uses": max_uses}
    edges = connect(team, specs, device=CPU, backend="gloo", **sizes)
    return edges, edges.activation_out or edges.activation_in


def send(end: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        end.send(train(step), activation=torch.full((4, 3), float(step)))


def read(end: Any, times: int) -> list[int]:
    """Steps read, each checked against its payload and released."""
    found = []
    for _ in range(times):
        assert end.ready(1, started=True)
        message = end.read()
        assert bool((message.fields["activation"] == message.header.step).all())
        found.append(message.header.step)
        message.release()
    return found


def settled(end: Any, newest: int) -> None:
    """Wait until ``newest`` has arrived: it is then the only batch that nobody has read, so it comes first."""
    while end._ring[-1].header.step != newest:
        pass


def ranks(rank: int) -> dict[str, Any]:
    store = start_group(rank, 2)
    results: dict[str, Any] = {}

    # Nobody reads while ten batches are sent, into an edge of two plus six slots.
    edges, end = pair_of_ends(team_of("order", store, rank, 2, 20.0), RING, max_uses=2)
    if rank == 0:
        send(end, 0, 9)
        end.flush()
        store.set("sent", "1")
        store.wait(["hungry"])
        send(end, 10, 10)
        store.wait(["eaten"])
        end.send(Header(MessageKind.EPOCH, 1, 11, 0))
        end.send(Header(MessageKind.EVAL, 1, 0, 0, rows=4), activation=torch.ones(4, 3))
        end.send(Header(MessageKind.EVAL, 1, 1, 0, rows=4), activation=torch.ones(4, 3))
    else:
        store.wait(["sent"])
        settled(end, 9)
        results["over before"] = not end.ready(1, started=True)
        results["order"] = read(end, 6)
        keys = iter(["hungry", "eaten"])  # the next batch, and then the mark, come when this end waits, not before
        wait = end._changed.wait

        def told(seconds: float) -> bool:
            if (key := next(keys, None)) is not None:
                store.set(key, "1")
            return wait(seconds)

        end._changed.wait = told
        results["after hunger"] = read(end, 2)
        results["over after"] = not end.ready(1, started=True)
        end.take(MessageKind.EPOCH, epoch=1, step=11, micro_batch=0).release()
        for step in (0, 1):
            end.take(MessageKind.EVAL, epoch=1, step=step, micro_batch=0).release()
        results["counts"] = vars(end.counts)
    results["unread"] = edges.close()

    # A batch at work stays as it is, however many come in the meantime.
    edges, end = pair_of_ends(team_of("one", store, rank, 2, 20.0), 1, max_uses=0)
    if rank == 0:
        send(end, 0, 0)
        store.wait(["reading"])
        send(end, 1, 5)
        end.flush()
        store.set("more", "1")
    else:
        assert end.ready(1, started=False)
        message = end.read()
        store.set("reading", "1")
        store.wait(["more"])
        settled(end, 5)
        results["at work"] = message.fields["activation"].tolist()
        message.release()
        results["single"] = read(end, 3)
    edges.close()

    # A sender that has stopped is noticed although there is always something to train on.
    edges, end = pair_of_ends(team_of("silent", store, rank, 2, 0.5), 2, max_uses=0)
    if rank == 0:
        send(end, 0, 0)
        store.wait(["noticed"])
    else:
        try:
            while True:
                read(end, 1)
        except DeadlineExceeded as error:
            results["silent"] = str(error)
        store.set("noticed", "1")
    edges.close()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def pair() -> list[RankResult]:
    results = run_ranks(ranks, 2)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    return results


def test_least_used_then_newest_is_read_and_the_oldest_makes_room(pair: list[RankResult]) -> None:
    assert pair[1].value["order"] == [9, 8, 7, 9, 8, 7]


def test_a_used_up_ring_waits_for_a_new_batch_and_everything_is_counted(pair: list[RankResult]) -> None:
    assert pair[1].value["after hunger"] == [10, 10]
    assert pair[1].value["counts"] == {"reused": 4, "skipped": 7, "held_back": 2}


def test_the_mark_of_an_epoch_and_tests_stay_in_order_and_are_never_dropped(pair: list[RankResult]) -> None:
    assert not pair[1].value["over before"] and pair[1].value["over after"]
    assert pair[1].value["unread"] == 0


def test_a_batch_at_work_is_not_overwritten(pair: list[RankResult]) -> None:
    assert pair[1].value["at work"] == [[0.0] * 3] * 4
    assert pair[1].value["single"] == [5, 5, 5]


def test_a_silent_sender_is_noticed(pair: list[RankResult]) -> None:
    assert re.match(r"rank 1 has waited [\d.]+ s .*for a new activation from rank 0", pair[1].value["silent"])
    assert re.search(r"; last message: [\d.]+ s ago; rank 0 is slow, hung or stopped", pair[1].value["silent"])
