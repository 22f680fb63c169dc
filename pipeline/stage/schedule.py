"""A schedule is data: the list of actions of one stage for one training step. It can be printed, checked and drawn.

Schedule `exact`, one module per stage, two micro-batches (k = 2; R sends the cascade gradient upstream):

    F0 C0 R0 I0   F1 C1 R1 I1   B0   B1 U
    |__________|                |
    heads first what others     needs the gradient that the next stage's R0 sent: one hop, at any depth
    wait for: cascade, relay

A stage with several modules interleaves them, so that at most k modules hold a graph. Updates come last, those that
wait for the next stage after the others: updates side by side are done together, in one call (see local.updates):

    F(m) C(m) R(m)  I(m-1) B(m-1)   F(m+1) ...   I(last)   U(m) U(m+1) ...   |   B(last) U(last)
    |____________________________________________________________________|   waits for the gradient of the next stage

Schedule `async`, delay d = 1: a module that receives a gradient does its backward and its update one step late, on the
weights that its forward used. What it waits for was sent a whole step ago, so nobody waits. "@-1" is the batch of the
step before. Modules that receive no gradient are never late; with d = 0 it is `exact`:

    F C R I  B@-1 U@-1          d steps per hop of a gradient that travels further (k > 2)

Where a method wants weights upstream (see local.upstream), a module shares those of its first block after the update of
every n-th batch ("/n"), and the module before adopts them for its heads, a declared number of steps later:

    module m + 1   F C R I  B U S/4            module m   F A@-2/4 C R I  B U

Schedule `free` (no cascade, so no gradient between modules) does the actions of `exact`; there a stage's input comes
from a replay ring and not from the next message in line (see transport).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from pipeline.local.roles import ModulePlan
from pipeline.local.upstream import Upstream, adopts


class Kind(Enum):
    """What a stage does in one action."""

    FORWARD = "F"
    CASCADE = "C"
    INDEPENDENT = "I"
    FINAL = "L"
    RELAY = "R"
    BACKWARD = "B"
    UPDATE = "U"
    SHARE = "S"
    ADOPT = "A"


@dataclass(frozen=True)
class Action:
    """One action. ``micro_batch`` is -1 for UPDATE, SHARE and ADOPT, which come once a step; ``key`` is set for RELAY
    and for a BACKWARD that also sends.

    In step t it works on the batch of step t - ``lag``, and is left out where that step does not exist or its number is
    no multiple of ``every``.
    """

    kind: Kind
    module: int
    micro_batch: int = -1
    key: int | None = None
    lag: int = 0
    every: int = 1

    def __str__(self) -> str:
        where = f"{self.kind.value}{self.module}"
        if self.micro_batch >= 0:
            where += f".{self.micro_batch}"
        where += (f"->{self.key}" if self.key is not None else "") + (f"@-{self.lag}" if self.lag else "")
        return where + (f"/{self.every}" if self.every > 1 else "")

    def in_step(self, step: int, first: int, end: int | None = None) -> bool:
        """Whether it is done in ``step``, where the batches are those from ``first`` on, before ``end``."""
        batch = step - self.lag
        return batch >= first and (end is None or batch < end) and batch % self.every == 0


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


@dataclass(frozen=True)
class Lags:
    """How many steps late a module acts.

    Attributes:
        backward: by module, of its backward and update.
        relay: by (module, key), of a gradient message upstream.
    """

    backward: tuple[int, ...]
    relay: dict[tuple[int, int], int]


def lags(plans: Sequence[ModulePlan], delay: int) -> Lags:
    """A gradient is used ``delay`` steps after the step in which the next module sent it: once per hop.

    It depends on the modules only, not on their placement, and so the result of a run does not either.
    """
    backward = [0] * len(plans)
    relay: dict[tuple[int, int], int] = {}
    for plan in reversed(plans):
        m = plan.index
        used = {key: relay[m + 1, key] + delay for key in plan.incoming}
        backward[m] = max(used.values(), default=0)
        for key in plan.outgoing:
            relay[m, key] = backward[m] if plan.merged else used.get(key, 0)
    return Lags(tuple(backward), relay)


def stage_schedules(
    plans: Sequence[ModulePlan],
    stages: Sequence[range],
    micro_batches: int,
    delay: int = 0,
    upstream: Upstream | None = None,
) -> tuple[tuple[Action, ...], ...]:
    """:func:`stage_schedule` of every stage."""
    late = lags(plans, delay)
    return tuple(_schedule(plans, modules, micro_batches, late, upstream) for modules in stages)


def stage_schedule(
    plans: Sequence[ModulePlan],
    modules: range,
    micro_batches: int,
    delay: int = 0,
    upstream: Upstream | None = None,
) -> tuple[Action, ...]:
    """One training step of the stage that owns ``modules``: `exact` for ``delay`` 0, else `async`. ``upstream``: what
    the method declares.

    Work that needs only this stage is done as early as possible. What needs a gradient of the next stage is left until
    the next micro-batch's forward and heads are done. Updates that need only this stage are done before it waits for
    the last gradient of the next one, the others at the end. Work that is late by declaration follows the forward and
    heads of its micro-batch.
    """
    return _schedule(plans, modules, micro_batches, lags(plans, delay), upstream)


def _schedule(
    plans: Sequence[ModulePlan], modules: range, micro_batches: int, late: Lags, upstream: Upstream | None
) -> tuple[Action, ...]:
    builder = _StageBuilder(plans, modules, micro_batches, late, upstream)
    for micro_batch in range(micro_batches):
        for module in modules:
            builder.heads_of(module, micro_batch)
        if micro_batch > 0:
            builder.finish(micro_batch - 1)
        builder.late_work(micro_batch)
    builder.updates()
    builder.finish(micro_batches - 1)
    builder.updates()
    return tuple(builder.actions)


class _StageBuilder:
    """Emits actions in order and keeps track of which gradients are there."""

    def __init__(
        self, plans: Sequence[ModulePlan], modules: range, micro_batches: int, lag: Lags, upstream: Upstream | None
    ) -> None:
        self._plans = plans
        self._modules = modules
        self._last_micro_batch = micro_batches - 1
        self._lag = lag
        self._upstream = upstream
        self._there: set[Message] = set()
        self._pending: list[Action] = []
        self._updates: list[Action] = []  # whose gradients are there
        self.actions: list[Action] = []

    def heads_of(self, module: int, micro_batch: int) -> None:
        """Forward and heads of one module; then whatever has become possible inside this stage."""
        plan = self._plans[module]
        emit = self.actions.append
        emit(Action(Kind.FORWARD, module, micro_batch))
        if self._upstream is not None and micro_batch == 0 and adopts(plan):
            lag = self._lag.backward[module + 1] + self._upstream.lag
            emit(Action(Kind.ADOPT, module, lag=lag, every=self._upstream.every))
        if plan.final:
            emit(Action(Kind.FINAL, module, micro_batch))
        if plan.cascade:
            emit(Action(Kind.CASCADE, module, micro_batch))
        if not plan.merged:
            self._pending += [
                Action(Kind.RELAY, module, micro_batch, key, self._lag.relay[module, key]) for key in plan.outgoing
            ]
        # Relays come first: somebody waits for them. A module's own backward waits for its independent level too.
        self._sweep(micro_batch)
        if plan.independent and not plan.together:
            independent = Action(Kind.INDEPENDENT, module, micro_batch)
            # What it gives waits for the backward as well: where the next module here comes first, it comes after that;
            # but not where that module is told its gradient.
            waits = bool(plan.incoming) and module != self._modules[-1] and not self._lag.backward[module]
            if waits and not plan.reconciles:
                self._pending.append(independent)
            else:
                emit(independent)
        key = plan.outgoing[0] if plan.merged else None
        self._pending.append(Action(Kind.BACKWARD, module, micro_batch, key, self._lag.backward[module]))
        self._sweep(micro_batch)

    def finish(self, micro_batch: int) -> None:
        """Everything of ``micro_batch`` that was left, with the gradients of the next stage."""
        last = self._modules[-1]
        self._there |= {(last, micro_batch, key) for key in self._plans[last].incoming}
        self._sweep(micro_batch)
        assert all(action.micro_batch != micro_batch for action in self._pending), self._pending

    def late_work(self, micro_batch: int) -> None:
        """Relays and backwards on earlier batches: all they need was sent in an earlier step."""
        late = [action for action in self._pending if action.micro_batch == micro_batch and action.lag]
        for action in sorted(late, key=_urgency):
            self._pending.remove(action)
            self._emit(action)

    def updates(self) -> None:
        """Every update that has become possible, side by side; then weights upstream."""
        done, self._updates = sorted(self._updates, key=lambda action: action.module), []
        self.actions += done
        for action in done:
            if self._upstream is not None and action.module > 0 and adopts(self._plans[action.module - 1]):
                self.actions.append(Action(Kind.SHARE, action.module, lag=action.lag, every=self._upstream.every))

    def _sweep(self, micro_batch: int) -> None:
        """Emit pending actions whose gradients are there, until nothing more becomes possible."""
        progress = True
        while progress:
            progress = False
            for action in sorted(self._pending, key=_urgency):
                if action.micro_batch != micro_batch or not self._possible(action):
                    continue
                self._pending.remove(action)
                self._emit(action)
                progress = True
                break

    def _emit(self, action: Action) -> None:
        self.actions.append(action)
        self._there |= set(messages_sent(action))
        if action.kind is Kind.BACKWARD and action.micro_batch == self._last_micro_batch:
            self._updates.append(Action(Kind.UPDATE, action.module, lag=action.lag))

    def _possible(self, action: Action) -> bool:
        if action.lag:
            return False
        plan = self._plans[action.module]
        if action.kind is Kind.INDEPENDENT:  # right before its backward
            return {(action.module, action.micro_batch, key) for key in plan.incoming} <= self._there
        if not set(messages_needed(action, plan)) <= self._there:
            return False
        if action.kind is Kind.BACKWARD:  # the relays need the graph that the full backward frees
            return not any(
                other.kind is Kind.RELAY and (other.module, other.micro_batch) == (action.module, action.micro_batch)
                for other in self._pending
            )
        return True


def _urgency(action: Action) -> tuple[bool, int, bool, int]:
    """Relays first, the last module's first; then module by module the independent level and the backward."""
    return (action.kind is not Kind.RELAY, -action.module, action.kind is Kind.BACKWARD, action.key or 0)


def together(actions: Iterable[Action]) -> Iterator[tuple[Action, ...]]:
    """What a stage does in one go: updates that stand side by side; each other action alone."""
    for are_updates, side_by_side in itertools.groupby(actions, lambda action: action.kind is Kind.UPDATE):
        group = tuple(side_by_side)
        yield from [group] if are_updates else zip(group, strict=True)


def last_backwards(schedule: Sequence[Action]) -> dict[Action, tuple[Action, ...]]:
    """The last backward before updates that are done together, with those updates: all their losses are there."""
    found: dict[Action, tuple[Action, ...]] = {}
    last: dict[int, tuple[int, Action]] = {}  # by module, with its place
    for place, actions in enumerate(together(schedule)):
        if actions[0].kind is Kind.BACKWARD:
            last[actions[0].module] = place, actions[0]
        elif actions[0].kind is Kind.UPDATE:
            _, backward = max((last[action.module] for action in actions), key=lambda entry: entry[0])
            found[backward] = actions
    return found


def steps_of(schedule: Sequence[Action], first: int, end: int) -> Iterator[tuple[int, list[Action]]]:
    """(step, actions) of the steps ``first`` .. ``end`` - 1 and of as many more as late work needs to come to its end.

    In each, only actions whose batch, step - lag, lies in ``first`` .. ``end`` - 1: a pipe that fills and is drained.
    """
    for step in range(first, end):
        yield step, [action for action in schedule if action.in_step(step, first)]
    yield from late_steps(schedule, first, end)


def late_steps(schedule: Sequence[Action], first: int, end: int) -> Iterator[tuple[int, list[Action]]]:
    """The steps of :func:`steps_of` after the last batch."""
    for step in range(end, end + max(action.lag for action in schedule)):
        yield step, [action for action in schedule if action.in_step(step, first, end)]
