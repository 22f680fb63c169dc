"""How many messages a stage holds at a time: what the receiving ends of its edges must have room for.

A stage holds an activation from the forward of its first module to its last backward on that micro-batch, and a
gradient message from the moment it is taken to the backward of its last module. It takes gradients in the order in
which the next stage sends them, so on the way to the one that it needs it may have to take others as well:

    next stage sends     0.a 0.b           1.a 1.b                     (micro-batch . key)
    this stage      R0.b takes 0.a 0.b, holds 2   B0 releases both   R1.b ...

All of it follows from the schedules alone. With so many receives, no message that somebody needs is ever kept out by
those that are held: the earlier ones have been taken, and the later ones come after it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from pipeline.local.roles import ModulePlan
from pipeline.stage.schedule import Action, Kind, Message, messages_needed, messages_sent, steps_of


def gradients_sent(schedule: Sequence[Action]) -> tuple[tuple[int, Message], ...]:
    """(lag, message) of every gradient that a stage sends to the previous one in one step, in the order of sending."""
    first = min(action.module for action in schedule)
    return tuple(
        (action.lag, message)
        for action in schedule
        for message in messages_sent(action)
        if message[0] == first - 1
    )


def activations_held(schedule: Sequence[Action]) -> int:
    """Most micro-batches of which a stage holds graphs and its input at a time. It does not depend on other stages."""
    left: dict[tuple[int, int], int] = {}
    backwards = Counter(action.micro_batch for action in schedule if action.kind is Kind.BACKWARD)
    most = 0
    for step, actions in steps_of(schedule, 0, _steps(schedule)):
        for action in actions:
            batch = (step - action.lag, action.micro_batch)
            if action.kind is Kind.FORWARD:
                left.setdefault(batch, backwards[action.micro_batch])
                most = max(most, len(left))
            elif action.kind is Kind.BACKWARD:
                left[batch] -= 1
                if left[batch] == 0:
                    del left[batch]
    return most


def gradients_held(schedule: Sequence[Action], plans: Sequence[ModulePlan], following: Sequence[Action]) -> int:
    """Most gradient messages that a stage holds at a time; 0 where it receives none.

    A checkpoint takes all that the next stage has sent until the end of the step, and it may come after any step.

    Args:
        schedule: of the stage.
        plans: role of every local module.
        following: schedule of the next stage.
    """
    sent = gradients_sent(following)
    if not sent:
        return 0
    last = max(action.module for action in schedule)
    arriving = _in_order(sent)
    upcoming = next(arriving)
    held: set[tuple[int, Message]] = set()
    most = 0
    for step in range(_steps(schedule)):
        for action in schedule:
            batch = step - action.lag
            if action.module != last or batch < 0:
                continue
            for message in messages_needed(action, plans[last]):
                while (batch, message) not in held:
                    held.add((upcoming[1], upcoming[2]))
                    upcoming = next(arriving)
            most = max(most, len(held))
            if action.kind is Kind.BACKWARD:
                held -= {(batch, message) for message in messages_needed(action, plans[last])}
        while upcoming[0] <= step:
            held.add((upcoming[1], upcoming[2]))
            upcoming = next(arriving)
        most = max(most, len(held))
    return most


def _in_order(sent: Sequence[tuple[int, Message]]) -> Iterator[tuple[int, int, Message]]:
    """(step of the sender, batch, message) of a run without an end."""
    for step in itertools.count():
        yield from ((step, step - lag, message) for lag, message in sent if step >= lag)


def _steps(schedule: Sequence[Action]) -> int:
    """After so many steps a stage holds as much as it ever will."""
    return 2 + 2 * max(action.lag for action in schedule)
