"""A schedule is data: the list of actions of one stage for one training step. It can be printed, checked and drawn.

Schedule `exact`, one module per stage, two micro-batches (k = 2; R sends the cascade gradient upstream):

    F0 C0 R0 I0   F1 C1 R1 I1   B0   B1 U
    |__________|                |
    heads first what others     needs the gradient that the next stage's R0 sent: one hop, at any depth
    wait for: cascade, relay

A stage with several modules interleaves them, so that at most k modules hold a graph:

    F(m) C(m) R(m)  B(m-1) U(m-1)  I(m)   F(m+1) ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pipeline.hierarchy import ModulePlan


class Kind(Enum):
    """What a stage does in one action."""

    FORWARD = "F"
    CASCADE = "C"
    INDEPENDENT = "I"
    FINAL = "L"
    RELAY = "R"
    BACKWARD = "B"
    UPDATE = "U"


@dataclass(frozen=True)
class Action:
    """One action. ``micro_batch`` is -1 for UPDATE; ``key`` is set for RELAY and for a BACKWARD that also sends."""

    kind: Kind
    module: int
    micro_batch: int = -1
    key: int | None = None

    def __str__(self) -> str:
        where = f"{self.kind.value}{self.module}"
        if self.micro_batch >= 0:
            where += f".{self.micro_batch}"
        return where + (f"->{self.key}" if self.key is not None else "")


Message = tuple[int, int, int]  # (receiving module, micro-batch, key) of a gradient


def messages_sent(action: Action) -> list[Message]:
    """The gradient message that an action produces, if any."""
    if action.key is None:
        return []
    return [(action.module - 1, action.micro_batch, action.key)]


def messages_needed(action: Action, plan: ModulePlan) -> list[Message]:
    """The gradient messages that must have arrived before an action."""
    if action.kind is Kind.RELAY and action.key in plan.incoming:
        assert action.key is not None
        return [(action.module, action.micro_batch, action.key)]
    if action.kind is Kind.BACKWARD:
        return [(action.module, action.micro_batch, key) for key in plan.incoming]
    return []


def exact_schedule(plans: Sequence[ModulePlan], modules: range, micro_batches: int) -> tuple[Action, ...]:
    """One exact training step of the stage that owns ``modules``.

    Work that needs only this stage is done as early as possible. What needs a gradient of the next stage is left until
    the next micro-batch's forward and heads are done, and the update until the last backward.
    """
    builder = _StageBuilder(plans, modules, micro_batches)
    for micro_batch in range(micro_batches):
        for module in modules:
            builder.heads_of(module, micro_batch)
        if micro_batch > 0:
            builder.finish(micro_batch - 1)
    builder.finish(micro_batches - 1)
    return tuple(builder.actions)


class _StageBuilder:
    """Emits actions in order and keeps track of which gradients are there."""

    def __init__(self, plans: Sequence[ModulePlan], modules: range, micro_batches: int) -> None:
        self._plans = plans
        self._modules = modules
        self._last_micro_batch = micro_batches - 1
        self._there: set[Message] = set()
        self._pending: list[Action] = []
        self.actions: list[Action] = []

    def heads_of(self, module: int, micro_batch: int) -> None:
        """Forward and heads of one module; then whatever has become possible inside this stage."""
        plan = self._plans[module]
        emit = self.actions.append
        emit(Action(Kind.FORWARD, module, micro_batch))
        if plan.final:
            emit(Action(Kind.FINAL, module, micro_batch))
        if plan.cascade:
            emit(Action(Kind.CASCADE, module, micro_batch))
        if not plan.merged:
            self._pending += [Action(Kind.RELAY, module, micro_batch, key) for key in plan.outgoing]
        # Relays come first: somebody waits for them. A module's own backward waits for its independent level too.
        self._sweep(micro_batch)
        if plan.independent:
            emit(Action(Kind.INDEPENDENT, module, micro_batch))
        key = plan.outgoing[0] if plan.merged else None
        self._pending.append(Action(Kind.BACKWARD, module, micro_batch, key))
        self._sweep(micro_batch)

    def finish(self, micro_batch: int) -> None:
        """Everything of ``micro_batch`` that was left, with the gradients of the next stage."""
        last = self._modules[-1]
        self._there |= {(last, micro_batch, key) for key in self._plans[last].incoming}
        self._sweep(micro_batch)
        assert all(action.micro_batch != micro_batch for action in self._pending), self._pending

    def _sweep(self, micro_batch: int) -> None:
        """Emit pending actions whose gradients are there, until nothing more becomes possible."""
        progress = True
        while progress:
            progress = False
            for action in sorted(self._pending, key=_urgency):
                if action.micro_batch != micro_batch or not self._possible(action):
                    continue
                self._pending.remove(action)
                self.actions.append(action)
                self._there |= set(messages_sent(action))
                if action.kind is Kind.BACKWARD and micro_batch == self._last_micro_batch:
                    self.actions.append(Action(Kind.UPDATE, action.module))
                progress = True
                break

    def _possible(self, action: Action) -> bool:
        plan = self._plans[action.module]
        if not set(messages_needed(action, plan)) <= self._there:
            return False
        if action.kind is Kind.BACKWARD:  # the relays need the graph that the full backward frees
            return not any(
                other.kind is Kind.RELAY and (other.module, other.micro_batch) == (action.module, action.micro_batch)
                for other in self._pending
            )
        return True


def _urgency(action: Action) -> tuple[bool, int, int]:
    return (action.kind is Kind.BACKWARD, -action.module, action.key or 0)


def check_schedules(plans: Sequence[ModulePlan], schedules: Sequence[Sequence[Action]]) -> int:
    """Run the schedules of all stages against each other without a process group.

    Every stage takes its actions in order and waits for what an action needs. Returns the number of rounds (in each,
    every stage that can does one action).

    Raises:
        ValueError: the stages wait for each other for ever, or a gradient is sent and never used.
    """
    owner = {action.module: stage for stage, actions in enumerate(schedules) for action in actions}
    position = [0] * len(schedules)
    forwarded: set[tuple[int, int]] = set()
    there: set[Message] = set()
    rounds = 0
    while any(at < len(actions) for at, actions in zip(position, schedules, strict=True)):
        done: list[Action] = []
        for stage, actions in enumerate(schedules):
            if position[stage] == len(actions):
                continue
            action = actions[position[stage]]
            if action.kind is Kind.FORWARD:
                ready = action.module == 0 or (action.module - 1, action.micro_batch) in forwarded
            else:
                ready = set(messages_needed(action, plans[action.module])) <= there
            if ready:
                done.append(action)
        if not done:
            waits = ", ".join(f"stage {s} at {a[p]}" for s, (a, p) in enumerate(zip(schedules, position, strict=True))
                              if p < len(a))
            raise ValueError(f"the stages wait for each other: {waits}")
        for action in done:
            position[owner[action.module]] += 1
            if action.kind is Kind.FORWARD:
                forwarded.add((action.module, action.micro_batch))
            there |= set(messages_sent(action))
        rounds += 1
    used = {m for actions in schedules for a in actions for m in messages_needed(a, plans[a.module])}
    if used != there:
        raise ValueError(f"gradients sent and never used: {sorted(there - used)}")
    return rounds
