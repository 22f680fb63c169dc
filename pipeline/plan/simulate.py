"""Schedules run against a clock, without processes or tensors: how fast is a pipeline of any number of ranks?

It does what a stage and its edges do (see stage and transport), with given times instead of arithmetic:

    sender: [slot][slot] ---- transfer, latency ---> [slot][slot][slot] receiver
            an action that sends goes on once a       a message enters a free slot, in the order of sending,
            slot is free: `depth` on their way        and keeps it until the backward that releases it: `slots`

Every stage runs ahead until it needs something that does not exist yet, then the next stage has its turn; no event is
looked at twice, so the work is proportional to the number of actions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.local.roles import ModulePlan
from pipeline.stage.capacity import activations_held, gradients_held
from pipeline.stage.events import SEND, WAIT, Event
from pipeline.stage.schedule import Action, Kind, Message, messages_needed, steps_of


@dataclass(frozen=True)
class ModuleCost:
    """What one local module with its auxiliary heads costs, on one kind of device.

    Attributes:
        forward_s, cascade_s, independent_s, final_s, backward_s: seconds for a whole batch.
        relay_s: seconds of a whole batch for one gradient message that is sent on before the backward.
        update_s: seconds of one optimiser step alone; of several modules together it takes no longer than their sum.
        state_bytes: parameters, gradients, buffers and optimiser state.
        graph_bytes: what one micro-batch keeps from its forward to its backward.
        work_bytes: the most that a single action of the module needs on top of that, and gives back.
        head_bytes: likewise of the heads of a level.
        activation_bytes: what a whole batch sends downstream, with labels and (where a later head needs it) the image.
        gradient_bytes: what a whole batch sends upstream for each of its gradient messages.
        together_s: seconds of both levels in one action, for a whole batch; 0: not known, or no such module.
    """

    forward_s: float = 0.0
    cascade_s: float = 0.0
    independent_s: float = 0.0
    final_s: float = 0.0
    relay_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0
    state_bytes: int = 0
    graph_bytes: int = 0
    work_bytes: int = 0
    head_bytes: int = 0
    activation_bytes: int = 0
    gradient_bytes: int = 0
    together_s: float = 0.0

    @property
    def memory_bytes(self) -> int:
        """Memory of a stage that owns this module alone, with one micro-batch at a time and without queues."""
        return self.state_bytes + self.graph_bytes + max(self.work_bytes, self.head_bytes)

    @property
    def separate_s(self) -> float:
        """Seconds of both levels one after the other."""
        return self.cascade_s + self.independent_s

    def in_role(self, plan: ModulePlan) -> ModuleCost:
        """The cost of a module with the role ``plan``: levels together are the work of the cascade's action. As long as
        one after the other where nothing else is known."""
        if not plan.together:
            return self
        return dataclasses.replace(self, cascade_s=self.together_s or self.separate_s, independent_s=0.0)

    def step_s(self, plan: ModulePlan) -> float:
        """Seconds of work of one whole step of a module with the role ``plan``."""
        relays = 0 if plan.merged else len(plan.outgoing)
        cost = self.in_role(plan)
        heads = plan.cascade * cost.cascade_s + plan.independent * cost.independent_s + plan.final * self.final_s
        return self.forward_s + heads + relays * self.relay_s + self.backward_s + self.update_s

    def seconds(self, action: Action, micro_batches: int) -> float:
        """Seconds of one action on one of ``micro_batches`` parts of a batch."""
        if action.kind is Kind.UPDATE:
            return self.update_s
        if action.kind in (Kind.SHARE, Kind.ADOPT):
            return 0.0  # a copy of a block every n steps; that somebody waits for it is simulated
        whole_s: float = getattr(self, f"{action.kind.name.lower()}_s")
        return whole_s / micro_batches


class _Edge:
    """One direction between two neighbours. Times of every message by its number, in the order of sending."""

    def __init__(self, depth: float, slots: float, transfer_s: float, latency_s: float) -> None:
        self.sent: list[float] = []
        self.arrived: list[float] = []
        self.what: list[tuple[int, Action]] = []
        self.number: dict[tuple[int, Message], int] = {}
        self.taken = 0
        self._depth = depth
        self._slots = slots
        self._transfer_s = transfer_s
        self._latency_s = latency_s
        self._released: list[float] = []
        self._wire_free = 0.0

    def room(self, now: float) -> float | None:
        """When, from ``now`` on, the next message has a slot to leave from; None: not known yet."""
        oldest = len(self.sent) - self._depth
        if oldest < 0:
            return now
        return max(now, self.arrived[int(oldest)]) if oldest < len(self.arrived) else None

    def send(self, now: float, batch: int, action: Action) -> None:
        if action.kind is not Kind.FORWARD:
            self.number[batch, (action.module - 1, action.micro_batch, action.key or 0)] = len(self.sent)
        self.sent.append(now)
        self.what.append((batch, action))
        self._deliver()

    def release(self, now: float, messages: int) -> None:
        """The receiver gives ``messages`` slots back."""
        self._released += [now] * messages
        self._deliver()

    def _deliver(self) -> None:
        """Messages whose sending and whose slot are both known arrive, one after another."""
        while (number := len(self.arrived)) < len(self.sent):
            start = max(self.sent[number], self._wire_free)
            reused = number - self._slots
            if reused >= 0:
                if reused >= len(self._released):
                    return
                start = max(start, self._released[int(reused)])
            self._wire_free = start + self._transfer_s
            self.arrived.append(self._wire_free + self._latency_s)


@dataclass(frozen=True)
class _Step:
    """An action with everything about it that is the same in every step."""

    action: Action
    seconds: float
    takes_input: bool
    needs: tuple[Message, ...]
    sends: int  # 1 downstream, -1 upstream, 0 to nobody else
    frees_input: bool
    frees_gradients: int


@dataclass
class _Rank:
    """One stage: what it has to do, and when it did it."""

    work: list[tuple[int, _Step]]
    start: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)  # when the message of the action had left and the next could begin


class Simulation:
    """The times of all actions and messages of a simulated run."""

    def __init__(self, ranks: Sequence[_Rank], down: Sequence[_Edge], up: Sequence[_Edge]) -> None:
        self._ranks = ranks
        self._down = down
        self._up = up

    def events(self, first: int = 0, end: int | None = None) -> tuple[Event, ...]:
        """The events of steps ``first`` .. ``end`` - 1 (default: all) in order of time, with waits and sends."""
        found = [event for event in self._all() if event.step >= first and (end is None or event.step < end)]
        return tuple(sorted(found, key=lambda event: (event.start_s, event.rank)))

    def _all(self) -> Iterator[Event]:
        for index, rank in enumerate(self._ranks):
            before = 0.0
            for (batch, step), start, end, left in zip(rank.work, rank.start, rank.end, rank.left, strict=True):
                what = (step.action.module, step.action.micro_batch, batch)
                if start > before:
                    yield Event(index, WAIT, *what, before, start)
                yield Event(index, step.action.kind.value, *what, start, end)
                if left > end:
                    yield Event(index, WAIT, *what, end, left)
                before = left
        for sender, edge in [*enumerate(self._down), *enumerate(self._up, start=1)]:
            for (batch, action), sent, arrived in zip(edge.what, edge.sent, edge.arrived, strict=True):
                yield Event(sender, SEND, action.module, action.micro_batch, batch, sent, arrived)


def simulate(
    plans: Sequence[ModulePlan],
    schedules: Sequence[Sequence[Action]],
    costs: Sequence[ModuleCost],
    steps: int,
    *,
    depth: int = 2,
    slots: int | None = None,
    latency_s: float = 0.0,
    bytes_per_s: float = math.inf,
    replay: bool = False,
) -> Simulation:
    """Run ``steps`` steps from an empty pipeline to an empty pipeline.

    Args:
        plans: role of every local module.
        schedules: actions of every rank for one step.
        costs: of every local module.
        steps: number of batches.
        depth: messages that may be on their way on an edge (``runtime.queue_depth``).
        slots: receives posted at a time on every edge; default: ``depth`` and all messages that its stage holds.
        latency_s: seconds from the end of a transfer until the receiver has it.
        bytes_per_s: bandwidth of an edge, which carries one message of a direction at a time.
        replay: schedule `free`: a stage waits for its first input only, and nobody waits for room.

    Raises:
        ValueError: the stages wait for each other for ever.
    """
    costs = [cost.in_role(role) for cost, role in zip(costs, plans, strict=True)]
    micro_batches = 1 + max(action.micro_batch for action in schedules[0])
    bounds = [(min(a.module for a in schedule), max(a.module for a in schedule)) for schedule in schedules]
    down, up = [], []
    for upper, ((_, last), (first, _)) in enumerate(itertools.pairwise(bounds)):
        sizes = (costs[last].activation_bytes, costs[first].gradient_bytes)
        transfers = [size / micro_batches / bytes_per_s for size in sizes]
        if slots is None:
            held = gradients_held(schedules[upper], plans, schedules[upper + 1])
            room = [depth + activations_held(schedules[upper + 1]), depth + held]
        else:
            room = [slots, slots]
        limits: list[tuple[float, float]]
        limits = [(math.inf, math.inf)] * 2 if replay else [(depth, number) for number in room]
        down.append(_Edge(*limits[0], transfers[0], latency_s))
        up.append(_Edge(*limits[1], transfers[1], latency_s))
    ranks = [
        _Rank(_work_of(schedule, plans, costs, steps, micro_batches, rank, len(schedules)))
        for rank, schedule in enumerate(schedules)
    ]
    shared: dict[tuple[int, int], float] = {}
    runners = [
        _Runner(
            rank,
            inputs=down[index - 1] if index > 0 else None,
            outputs=down[index] if index + 1 < len(ranks) else None,
            gradients=up[index] if index + 1 < len(ranks) else None,
            upstream=up[index - 1] if index > 0 else None,
            replay=replay,
            shared=shared,
            latency_s=latency_s,
        )
        for index, rank in enumerate(ranks)
    ]
    turn = deque(range(len(ranks)))
    waiting = [False] * len(ranks)
    while turn:
        index = turn.popleft()
        waiting[index] = True
        if runners[index].advance():
            for neighbour in (index - 1, index + 1):
                if 0 <= neighbour < len(ranks) and waiting[neighbour]:
                    waiting[neighbour] = False
                    turn.append(neighbour)
    stuck = [f"stage {i} at {r.work[len(r.left)][1].action}" for i, r in enumerate(ranks) if len(r.left) < len(r.work)]
    if stuck:
        raise ValueError(f"the stages wait for each other: {', '.join(stuck)}")
    return Simulation(ranks, down, up)


def _work_of(
    schedule: Sequence[Action],
    plans: Sequence[ModulePlan],
    costs: Sequence[ModuleCost],
    steps: int,
    micro_batches: int,
    rank: int,
    ranks: int,
) -> list[tuple[int, _Step]]:
    """(batch, action) of the whole run of one rank."""
    first, last = min(a.module for a in schedule), max(a.module for a in schedule)
    # A stage holds its input until the last of its backwards on that micro-batch.
    backwards = {(a.lag, i): a for i, a in enumerate(schedule) if a.kind is Kind.BACKWARD}
    final_backward = {backwards[key].micro_batch: backwards[key] for key in sorted(backwards)}
    passing_on = Kind.INDEPENDENT if plans[last].reconciles else Kind.FORWARD
    prepared = {}
    for action in schedule:
        sends = 0
        if action.kind is passing_on and action.module == last and rank + 1 < ranks:
            sends = 1
        elif action.key is not None and action.module == first and rank > 0:
            sends = -1
        at_the_end = action.module == last and rank + 1 < ranks
        prepared[action] = _Step(
            action,
            costs[action.module].seconds(action, micro_batches),
            action.kind is Kind.FORWARD and action.module == first and rank > 0,
            tuple(messages_needed(action, plans[action.module])) if at_the_end else (),
            sends,
            rank > 0 and final_backward[max(action.micro_batch, 0)] is action,
            len(plans[last].incoming) if at_the_end and action.kind is Kind.BACKWARD else 0,
        )
    return [(step - a.lag, prepared[a]) for step, actions in steps_of(schedule, 0, steps) for a in actions]


class _Runner:
    """Carries the actions of one rank out as far as what they need is known.

    ``shared``: by batch and module that gets them, when weights upstream arrive; of all ranks.
    """

    def __init__(
        self,
        rank: _Rank,
        inputs: _Edge | None,
        outputs: _Edge | None,
        gradients: _Edge | None,
        upstream: _Edge | None,
        replay: bool,
        shared: dict[tuple[int, int], float],
        latency_s: float,
    ) -> None:
        self._rank = rank
        self._first = min(step.action.module for _, step in rank.work)
        self._shared = shared
        self._latency_s = latency_s
        self._inputs = inputs
        self._gradients = gradients
        self._targets = {1: outputs, -1: upstream}
        self._replay = replay
        self._now = 0.0

    def advance(self) -> bool:
        """Do all that is possible; whether that was anything."""
        rank = self._rank
        before = len(rank.end) + len(rank.left)
        while len(rank.left) < len(rank.work):
            batch, step = rank.work[len(rank.left)]
            if len(rank.end) == len(rank.left) and not self._begin(batch, step):
                break
            if not self._leave(batch, step):
                break
        return len(rank.end) + len(rank.left) > before

    def _begin(self, batch: int, step: _Step) -> bool:
        start = self._now
        if step.takes_input:
            assert self._inputs is not None
            number = 0 if self._replay else self._inputs.taken
            if number >= len(self._inputs.arrived):
                return False
            start = max(start, self._inputs.arrived[number])
            self._inputs.taken += 1
        for message in step.needs:
            assert self._gradients is not None
            place = self._gradients.number.get((batch, message))
            if place is None or place >= len(self._gradients.arrived):
                return False
            start = max(start, self._gradients.arrived[place])
        if step.action.kind is Kind.ADOPT:
            arrived = self._shared.get((batch, step.action.module))
            if arrived is None:
                return False
            start = max(start, arrived)
        self._rank.start.append(start)
        self._now = start + step.seconds
        self._rank.end.append(self._now)
        return True

    def _leave(self, batch: int, step: _Step) -> bool:
        """Send what the action has made and give back what it has used."""
        if step.sends:
            edge = self._targets[step.sends]
            assert edge is not None
            room = edge.room(self._now)
            if room is None:
                return False
            self._now = room
            edge.send(room, batch, step.action)
        if step.frees_gradients:
            assert self._gradients is not None
            self._gradients.release(self._now, step.frees_gradients)
        if step.frees_input:
            assert self._inputs is not None
            self._inputs.release(self._now, 1)
        if step.action.kind is Kind.SHARE:
            module = step.action.module
            self._shared[batch, module - 1] = self._now + (self._latency_s if module == self._first else 0.0)
        self._rank.left.append(self._now)
        return True
