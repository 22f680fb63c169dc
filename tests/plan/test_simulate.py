"""The simulated pipeline: the same times as a slow reference, and the laws that the schedules promise."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest

from pipeline.base.config import HierarchyConfig
from pipeline.local.roles import ModulePlan, plan_hierarchy
from pipeline.local.upstream import Upstream
from pipeline.plan.placement import place
from pipeline.plan.simulate import ModuleCost, Simulation, simulate
from pipeline.stage.capacity import activations_held, gradients_held
from pipeline.stage.events import SEND, WAIT, steady_state
from pipeline.stage.schedule import (
    Action,
    Kind,
    messages_needed,
    messages_sent,
    stage_schedule,
    stage_schedules,
    steps_of,
)

EQUAL = ModuleCost(forward_s=1.0, cascade_s=0.5, relay_s=0.75, independent_s=0.25, backward_s=2.0, update_s=0.125)
# A middle stage waits for the next stage's F, C and R of the same batch, which begins when its own F ends.
EQUAL_PERIOD = 1.0 + (1.0 + 0.5 + 0.75) + 2.0 + 0.125
Setting = tuple[tuple[ModulePlan, ...], list[tuple[Action, ...]]]


def setting(modules: int, ranks: int, span: int, micro_batches: int = 1, delay: int = 0) -> Setting:
    hierarchy = HierarchyConfig(cascade_span=span, independent_weight=1.0, cascade_weight=1.0)
    plans = plan_hierarchy(modules, hierarchy)
    return plans, [stage_schedule(plans, owned, micro_batches, delay) for owned in place(modules, ranks)]


def step_s(run: Simulation, steps: int = 16) -> float:
    """Seconds of a step in the second half of the batches."""
    return steady_state(run.events(), steps // 2, steps - 1).step_s


def reference(
    plans: Sequence[ModulePlan],
    schedules: Sequence[Sequence[Action]],
    costs: Sequence[ModuleCost],
    steps: int,
    depth: int,
    slots: dict[tuple[str, int], int],
    latency_s: float,
    bytes_per_s: float,
) -> list[list[tuple[float, float]]]:
    """(start, end) of every action by rank: the equations of stage and transport, evaluated until nothing changes."""
    parts = 1 + max(action.micro_batch for action in schedules[0])
    work = [[(t - a.lag, a) for t, actions in steps_of(s, 0, steps) for a in actions] for s in schedules]
    first = [min(a.module for a in s) for s in schedules]
    last = [max(a.module for a in s) for s in schedules]
    ranks = range(len(schedules))
    # Position in `work` of what sends, and of what releases, the messages of every edge, in program order.
    sends: dict[tuple[str, int], list[int]] = {}
    releases: dict[tuple[str, int], list[int]] = {}
    names: dict[tuple[str, int], list[object]] = {}
    for r in ranks:
        backwards: dict[tuple[int, int], list[int]] = {}
        for at, (batch, a) in enumerate(work[r]):
            if a.kind is Kind.FORWARD and a.module == last[r] and r + 1 < len(ranks):
                sends.setdefault(("down", r), []).append(at)
                names.setdefault(("down", r), []).append((batch, a.micro_batch))
            if a.module == first[r] and r > 0:
                for message in messages_sent(a):
                    sends.setdefault(("up", r), []).append(at)
                    names.setdefault(("up", r), []).append((batch, message))
            if a.kind is Kind.BACKWARD:
                backwards.setdefault((batch, a.micro_batch), []).append(at)
                if a.module == last[r] and r + 1 < len(ranks):
                    releases.setdefault(("up", r + 1), []).extend([at] * len(plans[last[r]].incoming))
        if r > 0:
            releases[("down", r - 1)] = sorted(max(positions) for positions in backwards.values())
    number = {edge: {name: n for n, name in enumerate(listed)} for edge, listed in names.items()}
    position = {edge: {at: n for n, at in enumerate(listed)} for edge, listed in sends.items()}
    start = [[0.0] * len(w) for w in work]
    end = [[0.0] * len(w) for w in work]
    left = [[0.0] * len(w) for w in work]
    arrived = {edge: [0.0] * len(listed) for edge, listed in sends.items()}
    while True:
        before = (repr(left), repr(arrived))
        for r in ranks:
            for at, (batch, a) in enumerate(work[r]):
                begin = left[r][at - 1] if at else 0.0
                if a.kind is Kind.FORWARD and a.module == first[r] and r > 0:
                    edge = ("down", r - 1)
                    begin = max(begin, arrived[edge][number[edge][batch, a.micro_batch]])
                if a.module == last[r] and r + 1 < len(ranks):
                    edge = ("up", r + 1)
                    for message in messages_needed(a, plans[a.module]):
                        begin = max(begin, arrived[edge][number[edge][batch, message]])
                start[r][at], end[r][at] = begin, begin + costs[a.module].seconds(a, parts)
                left[r][at] = end[r][at]
                for edge in (("down", r), ("up", r)):
                    n = position.get(edge, {}).get(at)
                    if n is not None and n >= depth:
                        left[r][at] = max(left[r][at], arrived[edge][n - depth])
        for edge, listed in sends.items():
            way, r = edge
            size = costs[last[r]].activation_bytes if way == "down" else costs[first[r]].gradient_bytes
            receiver = r + 1 if way == "down" else r - 1
            free = 0.0
            for n, at in enumerate(listed):
                begin = max(left[r][at], free)
                if n >= slots[edge]:
                    begin = max(begin, left[receiver][releases[edge][n - slots[edge]]])
                free = begin + size / parts / bytes_per_s
                arrived[edge][n] = free + latency_s
        if (repr(left), repr(arrived)) == before:
            return [list(zip(s, e, strict=True)) for s, e in zip(start, end, strict=True)]


def assert_same(run: Simulation, expected: list[list[tuple[float, float]]]) -> None:
    for rank, times in enumerate(expected):
        events = [e for e in run.events() if e.rank == rank and e.kind not in (WAIT, SEND)]
        assert sorted((e.start_s, e.end_s) for e in events) == sorted(times)


def draw(seed: int) -> tuple[Setting, list[ModuleCost], dict[str, float]]:
    """A random pipeline with times that floating-point numbers add exactly."""
    dice = random.Random(seed)
    modules = dice.randint(1, 7)
    ranks = dice.randint(1, modules)
    span = dice.randint(1, modules)
    chosen = setting(modules, ranks, span, dice.choice([1, 2, 4]), dice.choice([0, 0, 1, 2]))

    def seconds() -> float:
        return dice.randint(0, 16) / 4

    costs = [
        ModuleCost(*[seconds() for _ in range(7)], activation_bytes=4 * dice.randint(0, 4), gradient_bytes=8)
        for _ in range(modules)
    ]
    link = {"latency_s": dice.choice([0.0, 0.5]), "bytes_per_s": dice.choice([4.0, 8.0])}
    return chosen, costs, link


@pytest.mark.parametrize("seed", range(60))
def test_every_action_happens_when_the_reference_says(seed: int) -> None:
    (plans, schedules), costs, link = draw(seed)
    depth = 1 + seed % 2
    slots = {}
    for rank, (above, below) in enumerate(itertools.pairwise(schedules)):
        slots["down", rank] = depth + activations_held(below)
        slots["up", rank + 1] = depth + gradients_held(above, plans, below)
    run = simulate(plans, schedules, costs, 6, depth=depth, **link)
    assert_same(run, reference(plans, schedules, costs, 6, depth, slots, **link))


@pytest.mark.parametrize("seed", range(12))
def test_small_queues_delay_as_the_reference_says(seed: int) -> None:
    plans, schedules = setting(4, 4, 1 + seed % 2)
    dice = random.Random(seed)
    costs = [ModuleCost(*[dice.randint(1, 16) / 4 for _ in range(7)], activation_bytes=4) for _ in plans]
    run = simulate(plans, schedules, costs, 9, depth=1, slots=1, bytes_per_s=8.0)
    one = dict.fromkeys(itertools.product(("down", "up"), range(4)), 1)
    assert_same(run, reference(plans, schedules, costs, 9, 1, one, 0.0, 8.0))


def test_the_step_of_equal_stages_is_one_hop_long_at_any_depth() -> None:
    for ranks in (4, 16, 256):
        plans, schedules = setting(ranks, ranks, 2)
        assert step_s(simulate(plans, schedules, [EQUAL] * ranks, 16)) == pytest.approx(EQUAL_PERIOD)


def test_a_long_independent_head_hides_the_hop() -> None:
    cost = dataclasses.replace(EQUAL, independent_s=3.0)
    plans, schedules = setting(8, 8, 2)
    run = steady_state(simulate(plans, schedules, [cost] * 8, 16).events(), 8, 15)
    assert run.step_s == pytest.approx(cost.step_s(plans[3]))
    assert run.efficiency == pytest.approx(1.0)


def test_latency_counts_twice_there_and_back() -> None:
    plans, schedules = setting(8, 8, 2)
    run = simulate(plans, schedules, [EQUAL] * 8, 16, latency_s=0.5)
    assert step_s(run) == pytest.approx(EQUAL_PERIOD + 2 * 0.5)


@pytest.mark.parametrize(("modules", "ranks"), [(8, 8), (8, 3)])
def test_an_asynchronous_step_is_the_work_of_the_busiest_stage(modules: int, ranks: int) -> None:
    plans, schedules = setting(modules, ranks, 2, delay=1)
    run = steady_state(simulate(plans, schedules, [EQUAL] * modules, 26).events(), 12, 23)
    busiest = max(sum(EQUAL.step_s(plans[m]) for m in stage) for stage in place(modules, ranks))
    assert run.step_s == pytest.approx(busiest)
    assert run.bound_s == pytest.approx(busiest)


def test_plain_local_learning_has_no_bubble() -> None:
    plans, schedules = setting(6, 6, 1)
    run = steady_state(simulate(plans, schedules, [EQUAL] * 6, 16).events(), 8, 15)
    assert run.efficiency == pytest.approx(1.0)
    assert all(busy == pytest.approx(1.0) for busy in run.busy[:-1])  # the last stage has no head and waits


def test_two_micro_batches_fill_part_of_the_wait() -> None:
    periods = []
    for parts in (1, 2):
        plans, schedules = setting(8, 8, 2, micro_batches=parts)
        periods.append(step_s(simulate(plans, schedules, [EQUAL] * 8, 16)))
    assert EQUAL.step_s(plans[3]) <= periods[1] < periods[0]


@pytest.mark.parametrize("slow", [0, 3, 7])
@pytest.mark.parametrize("span", [1, 2])
def test_the_slowest_stage_sets_the_pace_of_all(slow: int, span: int) -> None:
    plans, schedules = setting(8, 8, span)
    costs = [EQUAL] * 8
    costs[slow] = dataclasses.replace(EQUAL, forward_s=10.0, backward_s=20.0)
    run = steady_state(simulate(plans, schedules, costs, 120).events(), 110, 119)
    hop = 0.0 if span == 1 or slow > 5 else 1.0 + 0.5 + 0.75  # its own wait, where it has one
    assert costs[slow].step_s(plans[slow]) <= run.step_s + 1e-9 <= costs[slow].step_s(plans[slow]) + hop + 1e-6


def test_without_gradients_back_pressure_slows_the_first_stage_down() -> None:
    plans, schedules = setting(4, 4, 1)
    costs = [EQUAL, EQUAL, EQUAL, dataclasses.replace(EQUAL, forward_s=30.0)]
    run = simulate(plans, schedules, costs, 60, depth=1, slots=2)
    assert any(e.kind == WAIT and e.rank == 0 for e in run.events(40))


def test_bandwidth_can_be_the_bound() -> None:
    plans, schedules = setting(4, 4, 1)
    cost = dataclasses.replace(EQUAL, activation_bytes=100)
    assert step_s(simulate(plans, schedules, [cost] * 4, 16, bytes_per_s=5.0)) == pytest.approx(20.0)


def test_stages_on_a_replay_ring_wait_for_nobody() -> None:
    plans, schedules = setting(4, 4, 1)
    costs = [EQUAL, EQUAL, dataclasses.replace(EQUAL, forward_s=30.0), EQUAL]
    run = steady_state(simulate(plans, schedules, costs, 16, replay=True).events(), 8, 15)
    assert all(busy == pytest.approx(1.0) for busy in run.busy)


def test_a_rank_that_costs_nothing_is_never_busy() -> None:
    plans, schedules = setting(3, 3, 1)
    run = simulate(plans, schedules, [ModuleCost(), EQUAL, EQUAL], 16, replay=True)
    state = steady_state(run.events(), 8, 15)
    assert state.busy[0] == 0.0 and state.busy[1] == pytest.approx(1.0)


def test_events_of_a_rank_follow_each_other_without_a_gap() -> None:
    plans, schedules = setting(5, 3, 3, micro_batches=2)
    run = simulate(plans, schedules, [EQUAL] * 5, 4, depth=1)
    for rank in range(3):
        mine = [e for e in run.events() if e.rank == rank and e.kind != SEND]
        for one, other in itertools.pairwise(mine):
            assert one.end_s == pytest.approx(other.start_s)


def test_missing_steps_and_too_few_slots_are_refused() -> None:
    plans, schedules = setting(3, 3, 3)
    run = simulate(plans, schedules, [EQUAL] * 3, 4)
    with pytest.raises(ValueError, match="has no event of step 9"):
        steady_state(run.events(), 2, 9)
    plans, schedules = setting(6, 3, 4, micro_batches=3)
    with pytest.raises(ValueError, match="the stages wait for each other: stage 0 at "):
        simulate(plans, schedules, [EQUAL] * 6, 4, depth=1, slots=1)


def test_weights_upstream_cost_time_only_where_they_are_due_before_they_come() -> None:
    plans, without = setting(4, 4, 1)
    costs = [EQUAL] * 4
    free = step_s(simulate(plans, without, costs, 16, latency_s=0.5))
    period = {}
    for lag in (1, 4):
        schedules = stage_schedules(plans, place(4, 4), 1, upstream=Upstream(1, lag))
        period[lag] = step_s(simulate(plans, schedules, costs, 16, latency_s=0.5))
    assert period[4] == pytest.approx(free)
    assert free + 0.5 < period[1] <= free + 1.0  # there and back: a stage waits for the next one's step before
