"""The wire: real processes, real sockets. One start of two ranks serves most checks."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import helpers_spinning as spinning
import pytest
import torch
import torch.distributed as dist
from helpers_edges import CPU, SMALL, start_group, team_of, train
from helpers_spawn import RankResult, run_ranks

from pipeline.base.errors import ConfigError, DeadlineExceeded, PeerLost, WireError
from pipeline.edges.connect import Edges, EdgeSpecs, connect
from pipeline.edges.credit import Payload
from pipeline.edges.end import Edge
from pipeline.edges.transport import Receiver, Sender
from pipeline.edges.wire import HEADER_BYTES, FieldSpec, Header, MessageKind, MessageSpec
from pipeline.ranks.team import Team

RICH = MessageSpec(
    (
        FieldSpec("activation", torch.bfloat16, (5, 3, 2), channels_last=True),
        FieldSpec("labels", torch.int64, ()),
        FieldSpec("image", torch.uint8, (3, 4, 4)),
    ),
    max_rows=6,
)
HANG_S = 15.0
"""Far more than any wait here takes, and less than the deadlines that nothing is to reach."""
BACKEND = ["gloo"]
"""What carries the fields, in the process of a rank."""
BIG = MessageSpec((FieldSpec("activation", torch.float32, (1024, 1024)),), max_rows=6)  # 25 MB


def message(spec: MessageSpec, seed: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for field in spec.fields:
        shape = (rows, *field.shape_per_row)
        values = torch.randint(0, 100, shape, generator=generator)
        tensors[field.name] = values.to(field.dtype)
    return tensors


# -- what the two ranks do -----------------------------------------------------------------------------------


def payload(peer: int) -> Payload | None:
    """Of a new edge: none where gloo carries all, which is what ``all_checks`` says."""
    group = dist.new_group([0, 1], backend=BACKEND[0])
    assert isinstance(group, dist.ProcessGroup)
    return None if BACKEND[0] == "gloo" else Payload(group, peer, CPU)


def edge(rank: int, spec: MessageSpec, deadline_s: float = 20, slots: int = 2, depth: int = 2) -> Any:
    """Sender on rank 0, Receiver on rank 1."""
    team, peer = Team(rank, 2, deadline_s=deadline_s), 1 - rank
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))  # far shorter than some waits below
    of_rank = Edge(team, group, peer, spec, CPU, "activation", payload(peer))
    return Sender(of_rank, depth, slots) if rank == 0 else Receiver(of_rank, slots)


def check_round_trip(rank: int) -> Any:
    end = edge(rank, RICH)
    results = []
    for step, rows in enumerate((6, 2, 6, 1, 5)):
        sent = message(RICH, step, rows)
        if rows == 1:
            del sent["image"]  # a field may be left out
        if rank == 0:
            end.send(train(step, rows), **sent)
            for tensor in sent.values():
                tensor.zero_()  # the copy is ours: the caller may overwrite at once
            continue
        got = end.take(MessageKind.TRAIN, 0, step, 0)
        reference = sent["activation"].contiguous(memory_format=torch.channels_last)
        results.append(
            got.header == train(step, rows)
            and all(torch.equal(got.fields[name], tensor) for name, tensor in sent.items())
            and got.fields["activation"].stride() == reference.stride()
            and got.fields.keys() == sent.keys()
        )
        got.release()
    end.close()
    return results


def check_order(rank: int) -> Any:
    end = edge(rank, SMALL, slots=3)
    rng = random.Random(rank)
    values, addresses = [], set()
    for step in range(200):
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.01)
        if rank == 0:
            end.send(train(step), activation=torch.full((4, 3), float(step)))
        else:
            got = end.take(MessageKind.TRAIN, 0, step, 0)
            values.append(float(got.fields["activation"][3, 2]))
            addresses.add(got.fields["activation"].data_ptr())
            got.release()
    end.close()
    sent = end.bytes_sent if rank == 0 else end.messages
    return values == [float(step) for step in range(200)], len(addresses), sent


def check_back_pressure(rank: int) -> Any:
    """The receiver holds its slots: the sender gets depth + slots messages out and is told who is late."""
    end = edge(rank, SMALL, deadline_s=1.5, slots=2, depth=3)
    if rank == 0:
        sent = 0
        start = time.monotonic()
        try:
            while True:
                end.send(train(sent), activation=torch.zeros(4, 3))
                sent += 1
        except DeadlineExceeded as exc:
            dist.barrier()
            time.sleep(0.3)
            end.send(train(sent), activation=torch.zeros(4, 3))  # a deadline costs no connection
            end.close()
            return sent, time.monotonic() - start, end.wait_s, str(exc)
    dist.barrier()
    depth = end.queue_depth()
    for step in range(6):
        end.take(MessageKind.TRAIN, 0, step, 0).release()
    end.close()
    return depth


def check_late_sender(rank: int) -> Any:
    end = edge(rank, SMALL, deadline_s=0.5)
    if rank == 0:
        end.send(train(50), activation=torch.zeros(4, 3))
        dist.barrier()
        end.close()
        return None
    end.take(MessageKind.TRAIN, 0, 50, 0).release()
    try:
        end.take(MessageKind.TRAIN, 0, 51, 0)
    except DeadlineExceeded as exc:
        dist.barrier()
        end.close()
        return str(exc), end.wait_s


def check_wrong_step(rank: int) -> Any:
    end = edge(rank, SMALL)
    text = ""
    if rank == 0:
        try:
            end.send(train(7), activation=torch.zeros(4, 2))
        except WireError as exc:
            text = str(exc)
        end.send(train(7), activation=torch.zeros(4, 3))
    else:
        try:
            end.take(MessageKind.TRAIN, 0, 8, 0)
        except WireError as exc:
            text = str(exc)
    end.close()
    return text


def check_foreign_bytes(rank: int) -> Any:
    group = dist.new_group([0, 1])
    nbytes = SMALL.nbytes if BACKEND[0] == "gloo" else SMALL.header_bytes
    by_device = payload(1 - rank)
    if rank == 0:
        dist.send(torch.ones(nbytes, dtype=torch.uint8), 1, group=group)
        dist.barrier()
        return None
    end = Receiver(Edge(Team(rank, 2, deadline_s=5.0), group, 0, SMALL, CPU, "activation", by_device), 1)
    try:
        end.take(MessageKind.TRAIN, 0, 0, 0)
    except WireError as exc:
        dist.barrier()
        return str(exc)


def check_both_directions(rank: int) -> Any:
    down, up = dist.new_group([0, 1]), dist.new_group([0, 1])
    peer, team = 1 - rank, Team(rank, 2, deadline_s=20.0)
    payloads = payload(peer), payload(peer)  # down, up
    sender = Sender(Edge(team, down if rank == 0 else up, peer, BIG, CPU, "activation", payloads[rank]), 1, 2)
    receiver = Receiver(Edge(team, up if rank == 0 else down, peer, BIG, CPU, "activation", payloads[peer]), 2)
    tensor = torch.full((6, 1024, 1024), float(rank))
    right = True
    for step in range(5):
        sender.send(train(step, 6), activation=tensor)
        got = receiver.take(MessageKind.TRAIN, 0, step, 0)
        right = right and bool((got.fields["activation"] == peer).all())
        got.release()
    Edges(activation_in=receiver, activation_out=sender).close()
    return right


def check_untaken(rank: int) -> Any:
    """Messages nobody took, slots nobody released: the stream still ends, and no thread is left."""
    end = edge(rank, SMALL)
    if rank == 0:
        for step in range(3):
            end.send(train(step), activation=torch.zeros(4, 3))
        end.close()
        return None
    end.take(MessageKind.TRAIN, 0, 0, 0)
    return end.close()


CHECKS = {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_round_trip,
        check_order,
        check_back_pressure,
        check_late_sender,
        check_wrong_step,
        check_foreign_bytes,
        check_both_directions,
        check_untaken,
    )
}


def all_checks(rank: int, backend: str) -> dict[str, Any]:
    start_group(rank, 2)
    spinning.register()
    BACKEND[0] = backend
    results = {}
    for name, check in CHECKS.items():
        results[name] = check(rank)
        dist.barrier()
    results["threads"] = spinning.threads()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module", params=["gloo", spinning.SPINNING])
def pair(request: pytest.FixtureRequest) -> list[RankResult]:
    """Where gloo carries all, and where a device carries the fields."""
    return run_ranks(all_checks, 2, request.param, timeout_s=60)


# -- one start, many checks ----------------------------------------------------------------------------------


def test_ranks_end_in_order(pair: list[RankResult]) -> None:
    assert [(r.exit_code, r.stderr) for r in pair] == [(0, ""), (0, "")]
    assert pair[1].value["threads"] == [] == pair[0].value["threads"]


def test_values_strides_and_short_rows(pair: list[RankResult]) -> None:
    assert pair[1].value["round_trip"] == [True] * 5


def test_order_and_no_growth(pair: list[RankResult]) -> None:
    in_order, buffers, taken = pair[1].value["order"]
    assert in_order and taken == 200
    assert buffers == 3  # the ring, nothing else
    assert pair[0].value["order"][2] == 200 * SMALL.nbytes  # what ends the stream does not count


def test_back_pressure_is_bounded_and_named(pair: list[RankResult]) -> None:
    sent, seconds, waited, text = pair[0].value["back_pressure"]
    assert sent == 3 + 2 and pair[1].value["back_pressure"] == 2
    assert 1.5 <= waited <= seconds < HANG_S
    assert text == (
        "rank 0 has waited 1.5 s for rank 1 to take the activation of epoch 0 step 2 micro-batch 0; rank 1 "
        "is slow, hung or stopped - raise runtime.deadline_s if the step really takes that long"
    )


def test_late_sender_is_named(pair: list[RankResult]) -> None:
    text, waited = pair[1].value["late_sender"]
    age = re.search(r"([\d.]+) s ago", text)[1]
    assert text == (
        "rank 1 has waited 0.5 s for the activation of epoch 0 step 51 micro-batch 0 from rank 0; last message: "
        f"step 50, {age} s ago; rank 0 is slow, hung or stopped - raise runtime.deadline_s if the step really takes "
        "that long"
    )
    assert 0.5 <= waited < HANG_S and float(age) >= 0.5


def test_wrong_step_and_wrong_shape_are_refused(pair: list[RankResult]) -> None:
    assert pair[1].value["wrong_step"] == (
        "rank 1 expected TRAIN epoch 0 step 8 micro-batch 0 key 0 from rank 0, "
        "got TRAIN epoch 0 step 7 micro-batch 0 key 0"
    )
    assert "(4, 2) does not fit 4 rows of activation float32 (3,)" in pair[0].value["wrong_step"]


def test_foreign_bytes_are_refused(pair: list[RankResult]) -> None:
    assert pair[1].value["foreign_bytes"].startswith("rank 1 expected magic ")


def test_both_directions_at_once(pair: list[RankResult]) -> None:
    assert pair[0].value["both_directions"] is True is pair[1].value["both_directions"]


def test_untaken_messages_are_counted(pair: list[RankResult]) -> None:
    assert pair[1].value["untaken"] == 2


# -- agreement, then a chain of three ------------------------------------------------------------------------


def chain_specs(rank: int, world_size: int, width: int, dtype: torch.dtype = torch.float32) -> EdgeSpecs:
    down = MessageSpec((FieldSpec("activation", dtype, (width,)),), 4)
    up = MessageSpec((FieldSpec("gradient", torch.float32, (width,)),), 4)
    first, last = rank == 0, rank == world_size - 1
    return EdgeSpecs(
        None if first else down, None if last else down, None if last else up, None if first else up
    )


def chain(rank: int) -> dict[str, Any]:
    store = start_group(rank, 3)
    results: dict[str, Any] = {"errors": []}
    team = team_of("b", store, rank, 3, 10.0)
    options = {"activation_slots": 2, "gradient_slots": 2, "depth": 2, "device": CPU, "backend": "gloo"}
    attempts = [
        lambda: team.agree("configuration", "abc" if rank < 2 else "abd"),
        lambda: connect(team_of("a", store, rank, 3, 10.0), chain_specs(rank, 3, 4 if rank < 2 else 5), **options),
        lambda: connect(
            team_of("c", store, rank, 3, 10.0),
            chain_specs(rank, 3, 4, torch.bfloat16 if rank < 1 else torch.float32),
            **options,
        ),
    ]
    for attempt in attempts:
        try:
            attempt()
        except (ConfigError, WireError) as exc:
            results["errors"].append((type(exc).__name__, str(exc)))
    if rank == 0:
        try:
            team_of("d", store, rank, 3, 0.2).agree("nobody else", "x")
        except DeadlineExceeded as exc:
            results["errors"].append((type(exc).__name__, str(exc)))
    team.agree("code version", "1")
    edges = connect(team, chain_specs(rank, 3, 4), **options)
    x = torch.zeros(4, 4)
    for step in range(3):
        if edges.activation_in:
            got = edges.activation_in.take(MessageKind.TRAIN, 0, step, 0)
            x = got.fields["activation"] + 1
            got.release()
            header = Header(MessageKind.GRADIENT, 0, step, 0, 0, 4)
            edges.gradient_out.send(header, gradient=x)
        if edges.activation_out:
            edges.activation_out.send(train(step), activation=x)
            edges.gradient_in.take(MessageKind.GRADIENT, 0, step, 0).release()
    results["x"] = float(x.sum())
    results["unread"] = edges.close()
    results["threads"] = threading.active_count()
    dist.barrier()
    dist.destroy_process_group()
    return results


def test_agreement_and_chain() -> None:
    ranks = run_ranks(chain, 3)
    assert [(r.exit_code, r.stderr) for r in ranks] == [(0, "")] * 3  # not even a warning
    for r in ranks:
        assert r.value["errors"][:3] == [
            ("ConfigError", "ranks disagree about configuration: ranks 0, 1 have 'abc'; rank 2 has 'abd'"),
            (
                "WireError",
                "rank 2 expects 4 rows of activation float32 (5,) from rank 1, "
                "rank 1 sends 4 rows of activation float32 (4,)",
            ),
            (
                "WireError",
                "rank 1 expects 4 rows of activation float32 (4,) from rank 0, "
                "rank 0 sends 4 rows of activation bfloat16 (4,)",
            ),
        ]
        assert (r.value["unread"], r.value["threads"]) == (0, 1)
    assert ranks[0].value["errors"][3] == (
        "DeadlineExceeded",
        "rank 0 has waited 0.2 s for ranks 1, 2 to publish nobody else; rank 1 is slow, hung or stopped - raise "
        "runtime.deadline_s if the step really takes that long",
    )  # fmt: skip
    assert [r.value["x"] for r in ranks] == [0.0, 16.0, 32.0]


# -- a dead peer ---------------------------------------------------------------------------------------------


def lose_a_peer(rank: int, backend: str) -> Any:
    """Rank 1 is killed while rank 0 waits to be rid of a message and rank 2 waits for one."""
    store = start_group(rank, 3)
    spinning.register()
    specs = chain_specs(rank, 3, 4)
    team = Team(rank, 3, store, deadline_s=10.0)
    options = {"activation_slots": 1, "gradient_slots": 1, "depth": 1}
    edges = connect(team, specs, device=CPU, backend=backend, **options)
    dist.barrier()
    if rank == 1:
        time.sleep(0.3)
        store.set("killed", str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if rank == 0:
            for step in range(4):
                edges.activation_out.send(train(step), activation=torch.zeros(4, 4))
        else:
            edges.activation_in.take(MessageKind.TRAIN, 0, 0, 0)
    except PeerLost as exc:
        return exc.peer, time.time() - float(store.get("killed")), str(exc)
    finally:
        store.add("out", 1)
        while rank == 0 and store.add("out", 0) < 2:  # rank 0 hosts the store
            time.sleep(0.02)


@pytest.mark.parametrize("backend", ["gloo", spinning.SPINNING])
def test_killed_peer_is_noticed_fast(backend: str) -> None:
    ranks = run_ranks(lose_a_peer, 3, backend)
    assert ranks[1].exit_code == -signal.SIGKILL
    for rank, words in (
        (0, "to take the activation of epoch 0 step 1"),
        (2, "for the activation of epoch 0 step 0"),
    ):
        peer, seconds, text = ranks[rank].value
        assert peer == 1 and seconds < 10.0  # the deadline: it was the connection that told
        assert text.startswith(f"rank {rank} was ") and words in text


# -- no process needed ---------------------------------------------------------------------------------------


def test_layout_and_fingerprint() -> None:
    assert (
        RICH.nbytes == HEADER_BYTES + 384 + 64 + 320
    )  # 6 * 30 * 2 = 360, 6 * 8 = 48, 6 * 48 = 288, each to 64
    assert RICH.describe() == (
        "6 rows of activation bfloat16 (5, 3, 2) channels_last + labels int64 () + image uint8 (3, 4, 4)"
    )
    others = [MessageSpec(RICH.fields[:2], 6), MessageSpec(RICH.fields, 5), MessageSpec(RICH.fields[::-1], 6)]
    prints = {spec.fingerprint() for spec in (RICH, *others)}
    assert len(prints) == 4 and all(0 <= p < 2**63 for p in prints)
    assert RICH.fingerprint() == MessageSpec(RICH.fields, 6).fingerprint()


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (2, 5, 1, 1), (1, 6, 2, 2)])
def test_channels_last_views_have_the_strides_of_a_channels_last_tensor(shape: tuple[int, ...]) -> None:
    spec = MessageSpec((FieldSpec("activation", torch.float32, shape[1:], channels_last=True),), shape[0])
    view = spec.views(torch.zeros(spec.nbytes, dtype=torch.uint8))["activation"]
    assert tuple(view.shape) == shape
    assert view.stride() == torch.empty(shape, memory_format=torch.channels_last).stride()
