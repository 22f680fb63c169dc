"""The payload of a message is launched only when both ranks stand ready: nothing waits on the device for a message."""

from __future__ import annotations

from typing import Any

import helpers_spinning as spinning
import pytest
import torch
import torch.distributed as dist
from helpers_edges import CPU, start_group, team_of, train
from helpers_spawn import RankResult, run_ranks

from pipeline.edges.connect import EdgeSpecs, connect
from pipeline.edges.wire import FieldSpec, Header, MessageKind, MessageSpec

DOWN = MessageSpec((FieldSpec("activation", torch.float32, (3,)),), max_rows=4)
UP = MessageSpec((FieldSpec("gradient", torch.float32, (3,)),), max_rows=4)
STEPS = 3
LIMIT_S = 5.0
"""For a wait that ends in a millisecond, or never."""


def epochs(rank: int) -> dict[str, Any]:
    """Two epochs of a pair with a gradient upstream; both wait for the whole device at the end of each."""
    store = start_group(rank, 2)
    spinning.register()
    first = rank == 0
    edges = connect(
        team_of("credit", store, rank, 2, 20.0),
        EdgeSpecs(activation_out=DOWN, gradient_in=UP) if first else EdgeSpecs(activation_in=DOWN, gradient_out=UP),
        activation_slots=3,
        gradient_slots=3,
        depth=2,
        device=CPU,
        backend=spinning.SPINNING,
    )
    results: dict[str, Any] = {"gradients": []}
    try:
        for epoch in range(2):
            for step in range(epoch * STEPS, (epoch + 1) * STEPS):
                if first:
                    edges.activation_out.send(train(step), activation=torch.full((4, 3), float(step)))
                    got = edges.gradient_in.take(MessageKind.GRADIENT, 0, step, 0)
                    results["gradients"].append(float(got.fields["gradient"][3, 2]))
                else:
                    got = edges.activation_in.take(MessageKind.TRAIN, 0, step, 0)
                    header = Header(MessageKind.GRADIENT, 0, step, 0, rows=4)
                    edges.gradient_out.send(header, gradient=got.fields["activation"] + 100)
                got.release()
            # The next gradient needs the next batch, which comes only after this.
            spinning.device_wide_wait(LIMIT_S)
        if first:
            edges.activation_out.send(Header(MessageKind.EPOCH, 0, 2 * STEPS, 0))
        else:
            edges.activation_in.take(MessageKind.EPOCH, 0, 2 * STEPS, 0).release()
        edges.close()
        spinning.device_wide_wait(0.0)
    except TimeoutError as error:
        results["hang"] = str(error)
        dist.barrier()
        return results
    results["launched"] = spinning.launched
    results["threads"] = spinning.threads()
    dist.barrier()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def pair() -> list[RankResult]:
    results = run_ranks(epochs, 2)
    assert [(result.exit_code, result.stderr) for result in results] == [(0, ""), (0, "")]
    return results


def test_a_device_wide_wait_between_two_epochs_ends(pair: list[RankResult]) -> None:
    assert [result.value.get("hang") for result in pair] == [None, None]


def test_every_message_has_one_payload_and_those_without_fields_have_none(pair: list[RankResult]) -> None:
    warm_up = 2  # an edge down and an edge up
    assert [result.value["launched"] for result in pair] == [warm_up + 2 * 2 * STEPS] * 2


def test_payloads_arrive_in_order_and_no_thread_is_left(pair: list[RankResult]) -> None:
    assert pair[0].value["gradients"] == [100.0 + step for step in range(2 * STEPS)]
    assert [result.value["threads"] for result in pair] == [[], []]
