"""Schedules as data: their order, and that no set of stages waits for itself."""

from __future__ import annotations

import dataclasses

import pytest
from schedules import check_schedules

from pipeline.base.config import HierarchyConfig
from pipeline.local.roles import ModulePlan, plan_hierarchy
from pipeline.local.upstream import Upstream
from pipeline.plan.placement import place
from pipeline.stage.capacity import activations_held
from pipeline.stage.schedule import Kind, lags, last_backwards, stage_schedule, stage_schedules, steps_of, together

PAPER = HierarchyConfig(cascade_span=2, independent_weight=1.0, cascade_weight=1.0)


def plans(modules: int, span: int, variant: str = "paper") -> tuple[ModulePlan, ...]:
    return plan_hierarchy(modules, dataclasses.replace(PAPER, cascade_span=span, variant=variant))


def text(modules: int, span: int, owned: range, micro_batches: int) -> str:
    return " ".join(str(action) for action in stage_schedule(plans(modules, span), owned, micro_batches))


def test_one_module_in_the_middle_does_first_what_others_wait_for() -> None:
    assert text(4, 2, range(1, 2), 1) == "F1.0 C1.0 R1.0->0 I1.0 B1.0 U1"


def test_two_micro_batches_fill_the_wait_for_the_gradient() -> None:
    assert text(4, 2, range(1, 2), 2) == (
        "F1.0 C1.0 R1.0->0 I1.0 F1.1 C1.1 R1.1->0 I1.1 B1.0 B1.1 U1"
    )


def test_an_independent_level_waits_for_its_backward_where_the_next_module_is_on_the_same_stage() -> None:
    """The activation leaves earlier, and one gradient less is there at the fullest moment."""
    assert text(4, 2, range(0, 2), 1) == "F0.0 F1.0 C1.0 R1.0->0 I0.0 B0.0 I1.0 U0 B1.0 U1"
    assert text(4, 1, range(0, 2), 1) == "F0.0 I0.0 B0.0 F1.0 I1.0 B1.0 U0 U1"


def test_a_stage_of_several_modules_keeps_two_graphs_at_most() -> None:
    actions = stage_schedule(plans(8, 2), range(0, 8), 1)
    open_graphs: set[int] = set()
    for action in actions:
        if action.kind is Kind.FORWARD:
            open_graphs.add(action.module)
        if action.kind is Kind.BACKWARD:
            open_graphs.remove(action.module)
        assert len(open_graphs) <= 2


def test_updates_come_last_and_only_what_needs_the_next_stage_waits_for_it() -> None:
    actions = stage_schedule(plans(6, 2), range(1, 4), 2)
    assert " ".join(map(str, actions)).split("B2.1 ")[1] == "I3.1 B3.0 U1 U2 B3.1 U3"
    groups = [group for group in together(actions) if group[0].kind is Kind.UPDATE]
    assert [len(group) for group in groups] == [2, 1]
    assert [len(group) for group in together(actions) if group[0].kind is not Kind.UPDATE] == [1] * (len(actions) - 3)
    last = {str(backward): group for backward, group in last_backwards(actions).items()}
    assert last == {"B2.1": groups[0], "B3.1": groups[1]}


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_rank_makes_two_calls_for_its_updates_at_most_and_one_where_it_waits_for_nobody(
    micro_batches: int, delay: int
) -> None:
    for span in (1, 2, 3, 6):
        for owned in (range(6), range(0, 4), range(2, 5), range(5, 6)):
            actions = stage_schedule(plans(6, span), owned, micro_batches, delay)
            groups = [group for group in together(actions) if group[0].kind is Kind.UPDATE]
            assert sorted(action.module for group in groups for action in group) == list(owned)
            assert len(groups) <= 2 and (len(groups) == 1 or (owned.stop < 6 and span > 1 and not delay))
            places = {action: place for place, action in enumerate(actions)}
            for backward, group in last_backwards(actions).items():
                its = [a for a in actions if a.module in {update.module for update in group} and a not in group]
                assert backward == max((a for a in its if a.kind is Kind.BACKWARD), key=places.__getitem__)
                heads = [a for a in its if a.kind in (Kind.CASCADE, Kind.INDEPENDENT, Kind.FINAL)]
                assert all(places[head] < places[backward] < places[group[0]] for head in heads)


def test_plain_local_learning_waits_for_nobody() -> None:
    for action in stage_schedule(plans(4, 1), range(1, 2), 2):
        assert action.key is None
    assert text(4, 1, range(1, 2), 1) == "F1.0 I1.0 B1.0 U1"


def test_only_one_hop_separates_an_update_from_the_next_stage() -> None:
    """Adding stages does not lengthen the step once the pipe is full: the update waits for one hop, at any depth."""
    rounds = []
    for depth in (4, 8, 16):
        modules = plans(depth, 2)
        rounds.append(check_schedules(modules, [stage_schedule(modules, range(m, m + 1), 1) for m in range(depth)]))
    fill = [count - depth for count, depth in zip(rounds, (4, 8, 16), strict=True)]
    assert fill[0] == fill[1] == fill[2]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5])
def test_no_set_of_stages_waits_for_itself(variant: str, micro_batches: int) -> None:
    for modules in (1, 2, 3, 5, 8):
        for span in range(1, modules + 1):
            roles = plans(modules, span, variant)
            for ranks in range(1, modules + 1):
                stages = [stage_schedule(roles, owned, micro_batches) for owned in place(modules, ranks)]
                check_schedules(roles, stages)


def test_the_check_notices_a_dead_lock() -> None:
    roles = plans(3, 2)
    stages = [list(stage_schedule(roles, range(m, m + 1), 1)) for m in range(3)]
    stages[0].sort(key=lambda action: action.kind is Kind.FORWARD)  # backward before forward
    with pytest.raises(ValueError, match="wait for each other"):
        check_schedules(roles, stages)


def test_every_module_is_forwarded_once_per_micro_batch_and_updated_once() -> None:
    for span in (1, 2, 3, 6):
        actions = stage_schedule(plans(6, span), range(6), 3)
        for module in range(6):
            kinds = [action.kind for action in actions if action.module == module]
            assert kinds.count(Kind.FORWARD) == kinds.count(Kind.BACKWARD) == 3
            assert kinds.count(Kind.UPDATE) == 1


def test_gradients_travel_under_the_lowest_module_they_reach() -> None:
    roles = plans(5, 3)
    assert [role.outgoing for role in roles] == [(), (0,), (0, 1), (1,), ()]
    assert [role.incoming for role in roles] == [(0,), (0, 1), (1,), (), ()]


def test_span_k_is_end_to_end_flow() -> None:
    roles = plans(5, 5)
    assert all(role.outgoing == (0,) for role in roles[1:])
    assert roles[-1].final_cascade == 1.0 and roles[-1].final_local == 0.0


def test_released_evaluations_match_the_counts_of_the_released_code() -> None:
    assert [role.evaluations for role in plans(6, 2, "released")] == [2, 3, 3, 3, 3, 2]
    of_imagenet = dataclasses.replace(PAPER, cascade_span=2, variant="released", independent_weight=0.0)
    roles = plan_hierarchy(4, of_imagenet)
    assert [role.evaluations for role in roles] == [2, 2, 2, 1]
    assert [role.independent for role in roles] == [False] * 4 and roles[-1].final_cascade == 1.0


# --- schedule `async` -------------------------------------------------------------------------------------------------


def late_text(modules: int, span: int, owned: range, micro_batches: int, delay: int) -> str:
    return " ".join(map(str, stage_schedule(plans(modules, span), owned, micro_batches, delay)))


def test_async_does_the_backward_of_an_earlier_batch_after_the_heads_of_this_one() -> None:
    assert late_text(4, 2, range(1, 2), 1, 1) == "F1.0 C1.0 R1.0->0 I1.0 B1.0@-1 U1@-1"
    assert late_text(4, 2, range(1, 2), 2, 2) == (
        "F1.0 C1.0 R1.0->0 I1.0 B1.0@-2 F1.1 C1.1 R1.1->0 I1.1 B1.1@-2 U1@-2"
    )


@pytest.mark.parametrize("span", [1, 2, 3, 4])
def test_async_without_delay_is_exact(span: int) -> None:
    for owned in (range(0, 4), range(1, 2), range(2, 4)):
        assert late_text(4, span, owned, 2, 0) == text(4, span, owned, 2)


def test_modules_that_receive_no_gradient_are_never_late() -> None:
    assert lags(plans(5, 1), 3).backward == (0, 0, 0, 0, 0)
    assert lags(plans(5, 2), 3).backward == (3, 3, 3, 0, 0)


def test_a_gradient_that_travels_further_is_late_once_per_hop() -> None:
    late = lags(plans(6, 4), 1)
    assert late.backward == (3, 3, 2, 1, 0, 0)
    assert late.relay == {(4, 1): 0, (3, 1): 1, (2, 1): 2, (3, 0): 0, (2, 0): 1, (1, 0): 2}


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("delay", [1, 2])
def test_no_set_of_late_stages_waits_for_itself(variant: str, delay: int) -> None:
    for modules in (2, 3, 5):
        for span in range(1, modules + 1):
            roles = plans(modules, span, variant)
            for ranks in range(1, modules + 1):
                for micro_batches in (1, 3):
                    stages = [stage_schedule(roles, owned, micro_batches, delay) for owned in place(modules, ranks)]
                    check_schedules(roles, stages, steps=4)


def test_no_late_stage_waits_once_the_pipe_is_full() -> None:
    """Every action takes one round, so one more step costs as many rounds as the longest stage has actions. `exact`
    needs more: without an independent head to fill it, a stage waits for the next one's forward and heads."""
    roles = plan_hierarchy(8, dataclasses.replace(PAPER, independent_weight=0.0))
    for delay, waits in ((1, False), (0, True)):
        stages = [stage_schedule(roles, range(m, m + 1), 1, delay) for m in range(8)]
        extra = check_schedules(roles, stages, steps=21) - check_schedules(roles, stages, steps=20)
        assert (extra > max(map(len, stages))) == waits


@pytest.mark.parametrize("depth", [4, 8, 64])
def test_a_stage_holds_d_more_batches_and_not_more_with_depth(depth: int) -> None:
    roles = plans(depth, 2)
    for delay in (0, 1, 2, 3):
        held = [activations_held(stage_schedule(roles, range(m, m + 1), 1, delay)) for m in range(depth)]
        assert max(held) == 1 + delay


def test_the_pipe_fills_and_is_drained() -> None:
    schedule = stage_schedule(plans(4, 2), range(1, 2), 1, delay=2)
    steps = [" ".join(map(str, actions)) for _, actions in steps_of(schedule, 5, 8)]
    assert steps[0] == steps[1] == "F1.0 C1.0 R1.0->0 I1.0"
    assert steps[2] == "F1.0 C1.0 R1.0->0 I1.0 B1.0@-2 U1@-2"
    assert steps[3:] == ["B1.0@-2 U1@-2"] * 2


def test_weights_upstream_are_shared_after_an_update_and_adopted_before_the_heads() -> None:
    middle = stage_schedule(plans(4, 2), range(1, 2), 2, delay=1, upstream=Upstream(every=4, lag=2))
    assert " ".join(map(str, middle)) == (
        "F1.0 A1@-2/4 C1.0 R1.0->0 I1.0 B1.0@-1 F1.1 C1.1 R1.1->0 I1.1 B1.1@-1 U1@-1 S1@-1/4"
    )
    last = stage_schedule(plans(4, 2), range(3, 4), 1, upstream=Upstream(every=4, lag=2))
    assert " ".join(map(str, last)) == "F3.0 L3.0 B3.0 U3 S3/4"


def test_who_has_no_head_before_it_shares_nothing() -> None:
    first = stage_schedule(plans(3, 2, "released"), range(0, 2), 1, upstream=Upstream())
    assert {str(action) for action in first if action.kind in (Kind.SHARE, Kind.ADOPT)} == {"A1@-1"}


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("upstream", [Upstream(1, 1), Upstream(2, 1), Upstream(3, 4)])
def test_no_set_of_stages_waits_for_itself_with_weights_upstream(upstream: Upstream, delay: int) -> None:
    for modules in (2, 3, 5):
        for span in (1, 2, modules):
            roles = plans(modules, span)
            for ranks in range(1, modules + 1):
                for micro_batches in (1, 2):
                    stages = stage_schedules(roles, place(modules, ranks), micro_batches, delay, upstream)
                    check_schedules(roles, stages, steps=7)


def test_the_check_notices_weights_that_are_needed_before_they_can_be_there() -> None:
    roles = plans(3, 1)
    first, *others = stage_schedules(roles, [range(m, m + 1) for m in range(3)], 1, upstream=Upstream())
    at_once = [dataclasses.replace(a, lag=0) if a.kind is Kind.ADOPT else a for a in first]
    at_once.sort(key=lambda a: a.kind is Kind.FORWARD)  # of the batch whose forward comes after it
    with pytest.raises(ValueError, match="wait for each other: stage 0 at A0"):
        check_schedules(roles, [at_once, *others])
    with pytest.raises(ValueError, match="weights shared and never adopted"):
        check_schedules(roles, [[a for a in first if a.kind is not Kind.ADOPT], *others])
