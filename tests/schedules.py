"""The schedules of all stages against each other, without a process group: nobody may wait for ever."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.local.roles import ModulePlan
from pipeline.stage.schedule import Action, Kind, Message, messages_needed, messages_sent, steps_of


def check_schedules(plans: Sequence[ModulePlan], schedules: Sequence[Sequence[Action]], steps: int = 1) -> int:
    """Run ``steps`` steps of the schedules of all stages against each other without a process group.

    Every stage takes its actions in order and waits for what an action needs. Returns the number of rounds (in each,
    every stage that can does one action).

    Raises:
        ValueError: the stages wait for each other for ever, or a gradient is sent and never used, or weights are shared
            and never adopted.
    """
    work = [
        [(step - action.lag, action) for step, actions in steps_of(schedule, 0, steps) for action in actions]
        for schedule in schedules
    ]
    position = [0] * len(work)
    forwarded: set[tuple[int, int, int]] = set()
    there: set[tuple[int, Message]] = set()
    used: set[tuple[int, Message]] = set()
    shared: set[tuple[int, int]] = set()  # (batch, module that gets the weights)
    adopted: set[tuple[int, int]] = set()
    rounds = 0
    while any(at < len(actions) for at, actions in zip(position, work, strict=True)):
        done: list[tuple[int, int, Action]] = []
        for stage, actions in enumerate(work):
            if position[stage] == len(actions):
                continue
            batch, action = actions[position[stage]]
            needed = {(batch, message) for message in messages_needed(action, plans[action.module])}
            if action.kind is Kind.FORWARD:
                ready = action.module == 0 or (batch, action.module - 1, action.micro_batch) in forwarded
            elif action.kind is Kind.ADOPT:
                ready = (batch, action.module) in shared
            else:
                ready = needed <= there
            if ready:
                done.append((stage, batch, action))
                used |= needed
        if not done:
            waits = ", ".join(
                f"stage {s} at {a[p][1]}" for s, (a, p) in enumerate(zip(work, position, strict=True)) if p < len(a)
            )
            raise ValueError(f"the stages wait for each other: {waits}")
        for stage, batch, action in done:
            position[stage] += 1
            if action.kind is Kind.FORWARD:
                forwarded.add((batch, action.module, action.micro_batch))
            elif action.kind is Kind.SHARE:
                shared.add((batch, action.module - 1))
            elif action.kind is Kind.ADOPT:
                adopted.add((batch, action.module))
            there |= {(batch, message) for message in messages_sent(action)}
        rounds += 1
    if used != there:
        raise ValueError(f"gradients sent and never used: {sorted(there - used)}")
    if adopted != shared:
        raise ValueError(f"weights shared and never adopted: {sorted(shared - adopted)}")
    return rounds
