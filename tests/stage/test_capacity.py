"""Receives of the two directions: enough that no stage ever starves, and not one more than a stage holds."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
import torch
from tiny import tiny_config, tiny_plan

from pipeline.base.config import HierarchyConfig
from pipeline.base.recipes import load_config
from pipeline.local.roles import ModulePlan, plan_hierarchy
from pipeline.local.task import Classification
from pipeline.models.backbones import build_blocks
from pipeline.plan.assembly import make_plan
from pipeline.plan.placement import place
from pipeline.stage.capacity import activations_held, gradients_held, gradients_sent
from pipeline.stage.schedule import Action, Kind, messages_needed, stage_schedules, steps_of

STEPS = 9
Schedules = tuple[tuple[Action, ...], ...]
Operation = tuple[str, object]


@dataclass
class Edge:
    """One direction of an edge: messages enter a receive in order, and leave it when they are released."""

    depth: int
    slots: int
    unsent: deque[object] = field(default_factory=deque)  # with the sender: no receive is free
    arrived: deque[object] = field(default_factory=deque)
    held: Counter[object] = field(default_factory=Counter)
    most: int = 0

    def send(self, message: object) -> bool:
        if len(self.unsent) == self.depth:
            return False
        self.unsent.append(message)
        self._deliver()
        return True

    def take(self, message: object) -> bool:
        if not self.arrived:
            return False
        assert self.arrived.popleft() == message
        self.held[message] += 1
        self.most = max(self.most, self.held.total())
        return True

    def release(self, message: object) -> bool:
        assert self.held.pop(message) == 1
        self._deliver()
        return True

    def _deliver(self) -> None:
        while self.unsent and len(self.arrived) + self.held.total() < self.slots:
            self.arrived.append(self.unsent.popleft())


def program(rank: int, schedules: Schedules, plans: tuple[ModulePlan, ...], saves: set[int]) -> list[Operation]:
    """What a stage does with its edges in a run of STEPS steps, in order; after the steps in ``saves`` it takes all
    that the next stage has sent."""
    schedule = schedules[rank]
    first, last, final = schedule[0].module, max(a.module for a in schedule), rank + 1 == len(schedules)
    coming = [] if final else [
        (step, (step - lag, message))
        for step in range(2 * STEPS + 20)
        for lag, message in gradients_sent(schedules[rank + 1])
        if 0 <= step - lag < STEPS
    ]
    backwards = Counter(a.micro_batch for a in schedule if a.kind is Kind.BACKWARD)
    done: Counter[object] = Counter()
    there: set[object] = set()
    todo: list[Operation] = []

    def take_gradient() -> None:
        todo.append(("take gradient", coming[0][1]))
        there.add(coming.pop(0)[1])

    for step, actions in steps_of(schedule, 0, STEPS):
        for action in actions:
            batch, part = step - action.lag, action.micro_batch
            if action.kind is Kind.FORWARD and action.module == first and rank > 0:
                todo.append(("take activation", (batch, part)))
            needed = [(batch, m) for m in messages_needed(action, plans[last])] if action.module == last else []
            while not set(needed) <= there:
                take_gradient()
            if action.kind is Kind.FORWARD and action.module == last and not final:
                todo.append(("send activation", (batch, part)))
            if action.key is not None and action.module == first and rank > 0:
                todo.append(("send gradient", (batch, (first - 1, part, action.key))))
            if action.kind is Kind.BACKWARD:
                todo += [("release gradient", message) for message in needed]
                done[batch, part] += 1
                if done[batch, part] == backwards[part] and rank > 0:
                    todo.append(("release activation", (batch, part)))
        while step in saves and coming and coming[0][0] <= step:
            take_gradient()
    return todo


def run(schedules: Schedules, plans: tuple[ModulePlan, ...], saves: set[int], ahead: int, dice: random.Random) -> None:
    """Let the stages take turns at random until all is done; each edge has ``ahead`` receives more than are held."""
    ranks = range(len(schedules))
    down = [Edge(1, ahead + activations_held(schedules[rank])) for rank in ranks]  # into rank
    up = [Edge(1, ahead + gradients_held(s, plans, t)) for s, t in itertools.pairwise(schedules)]  # into rank
    work = [deque(program(rank, schedules, plans, saves)) for rank in ranks]
    while any(work):
        moved = False
        for rank in dice.sample(ranks, len(ranks)):
            for _ in range(dice.choice((1, 100))):  # some race ahead
                if not work[rank]:
                    break
                what, message = work[rank][0]
                verb, _, kind = what.partition(" ")
                edge = down[rank + (verb == "send")] if kind == "activation" else up[rank - (verb == "send")]
                if not getattr(edge, verb)(message):
                    break
                work[rank].popleft()
                moved = True
        assert moved, [todo[0] for todo in work if todo]
    for rank in ranks:
        assert rank == 0 or down[rank].most == activations_held(schedules[rank])
    if saves:  # after every step: as many gradients are held as ever can be
        for edge, (schedule, following) in zip(up, itertools.pairwise(schedules), strict=True):
            assert edge.most == gradients_held(schedule, plans, following)


@pytest.mark.parametrize("modules", [2, 3, 5, 7])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_receives_are_enough_and_all_of_them_are_needed(modules: int, variant: str) -> None:
    dice = random.Random(modules)
    for span, ranks in itertools.product(range(1, modules + 1), range(2, modules + 1)):
        hierarchy = HierarchyConfig(span, variant, independent_weight=1.0, cascade_weight=1.0)
        plans = plan_hierarchy(modules, hierarchy)
        for micro_batches, delay in itertools.product((1, 2, 3), (0, 1, 2)):
            if delay * span > STEPS - 2:  # the pipe would not be full
                continue
            schedules = stage_schedules(plans, place(modules, ranks), micro_batches, delay)
            for saves in (set(), set(range(STEPS))):
                run(schedules, plans, saves, dice.choice((0, 2)), dice)


def test_one_receive_less_starves_the_stage() -> None:
    """Stage 1 relays one of two gradients and keeps both until its backward."""
    plans = plan_hierarchy(5, HierarchyConfig(3, independent_weight=1.0, cascade_weight=1.0))
    schedules = stage_schedules(plans, place(5, 5), 1)
    assert gradients_held(schedules[1], plans, schedules[2]) == 2
    run(schedules, plans, set(), 0, random.Random(0))
    with pytest.raises(AssertionError):
        run(schedules, plans, set(), -1, random.Random(0))


def test_where_no_gradient_crosses_there_is_no_room_for_any() -> None:
    plan = tiny_plan(tiny_config(span=1), ranks=3)
    assert [plan.gradient_slots(rank) for rank in range(3)] == [0, 0, 0]
    assert [plan.activation_slots(rank) for rank in range(3)] == [0, 3, 3]


def test_a_span_between_two_and_all_needs_less_than_activations_times_keys() -> None:
    """K = 8, k = 3: every open activation was once counted once per gradient key, on both edges."""
    settings = ["hierarchy.cascade_span=3", "model.modules=8", "model.cuts=even", "schedule.kind=async"]
    config = load_config(assignments=settings)
    plan = make_plan(config, build_blocks("resnet32", 3, 10), Classification(10, (3, 32, 32)), 8)
    depth = config.runtime.queue_depth
    product = depth + max(map(activations_held, plan.schedules)) * max(len(role.incoming) for role in plan.modules)
    before = now = 0
    for rank in range(8):
        if rank > 0:
            size = plan.activation_spec(rank - 1, torch.float32, False).nbytes
            before, now = before + product * size, now + plan.activation_slots(rank) * size
        if rank < 7 and plan.gradient_order(rank + 1):
            size = plan.gradient_spec(rank + 1, torch.float32, False).nbytes
            before, now = before + product * size, now + plan.gradient_slots(rank) * size
        assert plan.activation_slots(rank) == (depth + activations_held(plan.schedules[rank]) if rank else 0)
    assert now < 0.75 * before
