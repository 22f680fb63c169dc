"""The payload of a message is launched only when both ranks stand ready: nothing waits on the device for a message."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import helpers_spinning as spinning
import pytest
import torch
import torch.distributed as dist
from helpers_edges import CPU, start_group, team_of, train
from helpers_spawn import run_ranks

from pipeline.base.errors import LocalpipeError
from pipeline.edges.connect import Edges, EdgeSpecs, connect
from pipeline.edges.credit import Payload
from pipeline.edges.wire import FieldSpec, Header, MessageKind, MessageSpec, Slot

DOWN = MessageSpec((FieldSpec("activation", torch.float32, (3,)),), max_rows=4)
UP = MessageSpec((FieldSpec("gradient", torch.float32, (3,)),), max_rows=4)
SLOTS, STEPS, EPOCHS = 3, 3, 2
LIMIT_S = 5.0
"""For a wait that ends in a millisecond, or never."""


def edges_of(rank: int, store: dist.Store, name: str, backend: str, deadline_s: float = 20.0) -> Edges:
    """Of a pair with a gradient upstream."""
    first = rank == 0
    return connect(
        team_of(name, store, rank, 2, deadline_s),
        EdgeSpecs(activation_out=DOWN, gradient_in=UP) if first else EdgeSpecs(activation_in=DOWN, gradient_out=UP),
        activation_slots=SLOTS,
        gradient_slots=SLOTS,
        depth=2,
        device=CPU,
        backend=backend,
    )


# -- two epochs ------------------------------------------------------------------------------------------------


def epochs(rank: int, store: dist.Store, backend: str) -> dict[str, Any]:
    """Two epochs of a pair; both wait for the whole device at the end of each."""
    edges = edges_of(rank, store, backend, backend)
    gradients, first = [], rank == 0
    for epoch in range(EPOCHS):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            if first:
                edges.activation_out.send(train(step), activation=torch.full((4, 3), float(step)))
                got = edges.gradient_in.take(MessageKind.GRADIENT, 0, step, 0)
                gradients.append(float(got.fields["gradient"][3, 2]))
            else:
                got = edges.activation_in.take(MessageKind.TRAIN, 0, step, 0)
                header = Header(MessageKind.GRADIENT, 0, step, 0, rows=4)
                edges.gradient_out.send(header, gradient=got.fields["activation"] + 100)
            got.release()
        # The next gradient needs the next batch, which comes only after this.
        spinning.device_wide_wait(LIMIT_S)
    if first:
        edges.activation_out.send(Header(MessageKind.EPOCH, 0, EPOCHS * STEPS, 0))
    else:
        edges.activation_in.take(MessageKind.EPOCH, 0, EPOCHS * STEPS, 0).release()
    edges.close()
    spinning.device_wide_wait(0.0)
    return {"gradients": gradients, "threads": spinning.threads()}


def posted_ahead(rank: int) -> dict[str, Any]:
    """What a receive that is posted before its message does to a wait for the device; then its message comes."""
    group, buffer, found = dist.new_group([0, 1], backend=spinning.SPINNING), torch.zeros(3), {}
    if rank == 1:
        receive = dist.irecv(buffer, 0, group=group)
        try:
            spinning.device_wide_wait(0.2)
        except TimeoutError as error:
            found["hang"] = str(error)
    dist.barrier()
    if rank == 0:
        dist.isend(torch.ones(3), 1, group=group)
    spinning.device_wide_wait(LIMIT_S)
    if rank == 1:
        receive.wait()
        found["received"] = buffer.tolist()
    return found


def counted(calls: Counter[str], name: str) -> Callable[..., Any]:
    real = getattr(dist, name)

    def call(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return real(*args, **options)

    return call


def both_ways(rank: int) -> dict[str, Any]:
    store = start_group(rank, 2)
    spinning.register()
    results: dict[str, Any] = {"ahead": posted_ahead(rank)}
    calls: Counter[str] = Counter()
    for name in ("isend", "irecv"):
        setattr(dist, name, counted(calls, name))
    for backend in ("gloo", spinning.SPINNING):
        calls.clear()
        before = spinning.launched
        results[backend] = epochs(rank, store, backend)
        results[backend] |= {"launched": spinning.launched - before, **calls}
    dist.barrier()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    results = run_ranks(both_ways, 2)
    assert [(result.exit_code, result.stderr) for result in results] == [(0, ""), (0, "")]
    return [result.value for result in results]


def test_a_receive_posted_ahead_makes_a_wait_for_the_device_endless(pair: list[dict[str, Any]]) -> None:
    """What the stand-in is for: a transport that posts receives ahead hangs at the end of an epoch."""
    assert "1 transfers spin on the device" in pair[1]["ahead"]["hang"]
    assert pair[1]["ahead"]["received"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", ["gloo", spinning.SPINNING])
def test_messages_arrive_in_order_over_waits_for_the_device_and_no_thread_is_left(
    pair: list[dict[str, Any]], backend: str
) -> None:
    assert pair[0][backend]["gradients"] == [100.0 + step for step in range(EPOCHS * STEPS)]
    assert [rank[backend]["threads"] for rank in pair] == [[], []]


def test_where_gloo_carries_all_a_message_is_one_transfer_and_no_credit_is_sent(pair: list[dict[str, Any]]) -> None:
    down, up = EPOCHS * STEPS + 1, EPOCHS * STEPS  # the end of the epoch goes down
    for rank, (sent, received) in zip(pair, ((down, up), (up, down)), strict=True):
        found = rank["gloo"]
        assert (found["isend"], found["irecv"], found["launched"]) == (sent + SLOTS, received + SLOTS, 0)


def test_where_a_device_carries_it_a_message_is_a_header_and_a_payload_if_it_has_fields(
    pair: list[dict[str, Any]],
) -> None:
    warm_up = 1  # of each edge
    for rank in pair:
        found, by_gloo = rank[spinning.SPINNING], rank["gloo"]
        assert found["launched"] == 2 * (warm_up + EPOCHS * STEPS)
        for name in ("isend", "irecv"):
            assert found[name] == by_gloo[name] + warm_up + EPOCHS * STEPS


# -- failures between the header and the end of the payload ----------------------------------------------------


def failures(rank: int) -> dict[str, str]:
    """What a rank says when the other one does not do its half of a payload, or when its own device fails."""
    store = start_group(rank, 2)
    spinning.register()
    said: dict[str, str] = {}

    def note(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except LocalpipeError as error:
            said[name] = f"{type(error).__name__}: {error}"

    def hung(payload: Payload, buffer: torch.Tensor) -> None:
        time.sleep(60)

    def killed(payload: Payload, buffer: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def broken(slot: Slot) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    edges = edges_of(rank, store, "receiver hangs", spinning.SPINNING, 0.5)
    if rank == 0:
        edges.activation_out.send(train(0), activation=torch.zeros(4, 3))
        note("receiver hangs", edges.activation_out.flush)
    else:
        edges.activation_in._payload.receive = hung.__get__(edges.activation_in._payload)
    dist.barrier()
    edges = edges_of(rank, store, "sender hangs", spinning.SPINNING, 0.5)
    if rank == 0:
        edges.activation_out._payload.send = hung.__get__(edges.activation_out._payload)
        edges.activation_out.send(train(0), activation=torch.zeros(4, 3))
    else:
        note("sender hangs", lambda: edges.activation_in.take(MessageKind.TRAIN, 0, 0, 0))
    dist.barrier()
    edges = edges_of(rank, store, "the device fails", spinning.SPINNING)
    if rank == 0:
        edges.activation_out.send(train(0), activation=torch.zeros(4, 3))
    else:
        message = edges.activation_in.take(MessageKind.TRAIN, 0, 0, 0)
        message._slot.settle = broken.__get__(message._slot)
        message.release()
        note("device fails", lambda: edges.activation_in.take(MessageKind.TRAIN, 0, 1, 0))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, said)
    edges = edges_of(rank, store, "receiver is killed", spinning.SPINNING, 10.0)
    if rank == 0:
        edges.activation_out.send(train(0), activation=torch.zeros(4, 3))
        note("receiver is killed", edges.activation_out.flush)
    else:
        edges.activation_in._payload.receive = killed.__get__(edges.activation_in._payload)
        time.sleep(60)
    return said | everyone[1]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    results = run_ranks(failures, 2)
    assert [result.exit_code for result in results] == [0, -signal.SIGKILL], results
    return results[0].value


def test_a_payload_whose_other_half_is_never_launched_costs_the_deadline(said: dict[str, str]) -> None:
    what = "the activation of epoch 0 step 0 micro-batch 0"
    for name, words in (
        ("receiver hangs", f"DeadlineExceeded: rank 0 has waited 0.5 s for rank 1 to take {what}"),
        ("sender hangs", f"DeadlineExceeded: rank 1 has waited 0.5 s for {what} from rank 0"),
    ):
        assert said[name].startswith(words), said[name]


def test_a_receiver_that_is_killed_in_the_middle_of_a_payload_is_noticed(said: dict[str, str]) -> None:
    words = "PeerLost: rank 0 was waiting for rank 1 to take the activation of epoch 0 step 0 micro-batch 0"
    assert said["receiver is killed"].startswith(words)


def test_a_failure_of_this_device_is_not_laid_at_the_door_of_the_peer(said: dict[str, str]) -> None:
    assert said["device fails"] == (
        "LocalpipeError: rank 1: the device failed behind the activation edge to rank 0 "
        "(CUDA error: an illegal memory access was encountered)"
    )
