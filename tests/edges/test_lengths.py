"""Messages whose rows vary in length within a maximum: the bits, the strides and the refusal of what is too long."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from helpers_edges import CPU, SMALL, start_group, train
from helpers_spawn import run_ranks

from pipeline.base.errors import WireError
from pipeline.edges.end import Edge
from pipeline.edges.transport import Receiver, Sender
from pipeline.edges.wire import HEADER_BYTES, FieldSpec, MessageKind, MessageSpec
from pipeline.ranks.team import Team

SEQUENCE = MessageSpec(
    (
        FieldSpec("activation", torch.bfloat16, (5, 3), varies=(0,)),
        FieldSpec("activation.mask", torch.bool, (5,), varies=(0,)),
        FieldSpec("activation.pairs", torch.int64, (5, 5), varies=(0, 1)),
        FieldSpec("activation.map", torch.float32, (2, 3, 10), channels_last=True, varies=(2,)),
        FieldSpec("labels", torch.int64, ()),
    ),
    max_rows=4,
)
LENGTHS = ((5, 4), (2, 4), (1, 1), (5, 3))
"""Of a message, and its rows."""


def sequences(length: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * length + rows)
    image = torch.randn(rows, 2, 3, 2 * length, generator=generator)
    return {
        "activation": torch.randn(rows, length, 3, generator=generator).bfloat16(),
        "activation.mask": torch.rand(rows, length, generator=generator) > 0.5,
        "activation.pairs": torch.randint(2**40, (rows, length, length), generator=generator),
        "activation.map": image.contiguous(memory_format=torch.channels_last),
        "labels": torch.arange(rows),
    }


def exchange(rank: int) -> Any:
    start_group(rank, 2)
    team, group = Team(rank, 2, deadline_s=20.0), dist.new_group([0, 1])
    if rank == 0:
        sender = Sender(Edge(team, group, 1, SEQUENCE, CPU, "activation"), 2, 2)
        refusals = []
        for odd in (
            {"activation": torch.zeros(4, 6, 3)},
            {"activation": torch.zeros(4, 5, 2)},
            {"activation.pairs": torch.zeros(4, 5, 6, dtype=torch.int64)},
            {"activation.mask": torch.zeros(4, 5)},
        ):
            try:
                sender.send(train(0), **odd)
            except WireError as error:
                refusals.append(str(error))
        for step, (length, rows) in enumerate(LENGTHS):
            sender.send(train(step, rows), **sequences(length, rows))
        sender.send(train(len(LENGTHS)), labels=torch.arange(4))  # fields may be left out as ever
        sender.close()
        return refusals
    receiver = Receiver(Edge(team, group, 0, SEQUENCE, CPU, "activation"), 2)
    addresses, right = set(), []
    for step, (length, rows) in enumerate(LENGTHS):
        got = receiver.take(MessageKind.TRAIN, 0, step, 0)
        expected = sequences(length, rows)
        right.append(
            got.fields.keys() == expected.keys()
            and all(torch.equal(got.fields[name], x) for name, x in expected.items())
            and all(got.fields[name].stride() == x.stride() for name, x in expected.items())
        )
        addresses.add(got.fields["activation"].data_ptr())
        got.release()
    right.append(list(receiver.take(MessageKind.TRAIN, 0, len(LENGTHS), 0).fields) == ["labels"])
    receiver.close()
    return right, len(addresses)


def test_shorter_messages_arrive_bit_for_bit_and_without_gaps() -> None:
    sender, receiver = run_ranks(exchange, 2)
    assert (sender.exit_code, receiver.exit_code) == (0, 0), (sender.stderr, receiver.stderr)
    right, buffers = receiver.value
    assert right == [True] * (len(LENGTHS) + 1)
    assert buffers == 2  # made once, at the maximum
    assert len(sender.value) == 4
    assert sender.value[0] == (
        "rank 0: activation torch.float32 (4, 6, 3) does not fit 4 rows of activation bfloat16 (up to 5, 3) on the "
        "edge to rank 1"
    )


def test_lengths_take_room_only_where_something_varies() -> None:
    assert SEQUENCE.header_bytes == HEADER_BYTES + 64  # five axes, 40 B
    assert SMALL.header_bytes == HEADER_BYTES
    fixed = MessageSpec((FieldSpec("activation", torch.float32, (3,), varies=(0,)),), max_rows=4)
    assert SMALL.describe() == "4 rows of activation float32 (3,)" and fixed.fingerprint() != SMALL.fingerprint()
    assert fixed.describe() == "4 rows of activation float32 (up to 3,)"
