"""Weights upstream come at the declared steps: a literal loop in one process, without a schedule, gives the weights.

For every batch all gradients are computed by the literal definition. The loop keeps every module's first block as it
was after each update, and before a batch it moves the heads' averages towards those that are due by the declaration.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mirror import KEEP, heads, mirror
from oracle.literal import literal_backward
from oracle.test_async import parameters
from tiny import tiny_batch, tiny_config, tiny_stage, train_on
from torch import Tensor

from pipeline.base.config import Config
from pipeline.local.local_module import LocalModule
from pipeline.local.optimiser import step_together

MODULES = 4
EPOCHS = ((0, 6), (6, 11))
NOT_LATE = (0, 0, 0, 0)


def first_block(module: LocalModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in next(iter(module.blocks.values())).named_parameters()}


def literal_descent(
    modules: list[LocalModule], config: Config, late: tuple[int, ...], every: int, lag: int
) -> None:
    """All batches; each module's gradients are applied ``late`` steps after their batch, and at the end of an epoch."""
    for first, end in EPOCHS:
        kept: dict[tuple[int, int], list[Tensor | None]] = {}
        seen: dict[tuple[int, int], dict[str, Tensor]] = {}
        for step in range(first, end + max(late) + lag):
            for index in range(MODULES - 1):
                due = step - late[index + 1] - lag
                if first <= due < end and due % every == 0:
                    for level in modules[index].levels.values():
                        for head in heads(level):
                            for name, mine in head.copy.named_parameters():
                                mine.data.copy_(KEEP * mine + (1 - KEEP) * seen[due, index + 1][name])
            if step < end:
                batch = tiny_batch(step, dtype=torch.float64)
                literal_backward(modules, config, batch.x, batch.labels, batch.image)
                for index, module in enumerate(modules):
                    kept[step, index] = [p.grad for p in parameters(module)]
                    module.optimiser.clear()
            for index, module in enumerate(modules):
                of = step - late[index]
                if first <= of < end:
                    for parameter, gradient in zip(parameters(module), kept[of, index], strict=True):
                        parameter.grad = gradient
                    step_together([module.optimiser])
                    module.optimiser.clear()
                    seen[of, index] = first_block(module)


def config_of(every: int, lag: int, span: int = 1, **schedule: Any) -> Config:
    return tiny_config(mirror(every, lag), "plain", span, MODULES, schedule=schedule)


def trained(config: Config) -> list[LocalModule]:
    stage, modules, _ = tiny_stage(config, torch.float64)
    for epoch, (first, end) in enumerate(EPOCHS, start=1):
        stage.begin_epoch(first, first)
        for step in range(first, end):
            train_on(stage, epoch, step, tiny_batch(step, dtype=torch.float64))
        stage.end_epoch(epoch, end)
    return modules


def differences(mine: list[LocalModule], theirs: list[LocalModule]) -> float:
    """The largest difference of a parameter."""
    pairs = [
        (a, b) for m, t in zip(mine, theirs, strict=True) for a, b in zip(parameters(m), parameters(t), strict=True)
    ]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("span", "delay", "late"),
    [(1, 0, NOT_LATE), (2, 0, NOT_LATE), (2, 1, (1, 1, 0, 0)), (2, 2, (2, 2, 0, 0)), (4, 1, (3, 2, 1, 0))],
)
@pytest.mark.parametrize(("every", "lag"), [(1, 1), (2, 1), (3, 2), (2, 5)])
def test_weights_equal_a_literal_loop_with_the_declared_steps(
    every: int, lag: int, span: int, delay: int, late: tuple[int, ...]
) -> None:
    exact = config_of(every, lag, span)
    _, reference, _ = tiny_stage(exact, torch.float64)
    before = [p.detach().clone() for m in reference for level in m.levels.values() for p in level.parameters()]
    literal_descent(reference, exact, late, every, lag)
    found = trained(config_of(every, lag, span, kind="async", delay=delay) if delay else exact)

    assert differences(found, reference) < 1e-10
    after = [p for m in reference for level in m.levels.values() for p in level.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_loop_notices_weights_of_another_step() -> None:
    config = config_of(2, 3)
    _, one, _ = tiny_stage(config, torch.float64)
    literal_descent(one, config, NOT_LATE, 2, 2)
    assert differences(trained(config), one) > 1e-6


def test_the_newest_multiple_that_is_old_enough_is_used() -> None:
    """n = 2, lag 3: with batch 5 that after batch 2; an epoch ends with everything adopted."""
    config = config_of(2, 3)
    stage, modules, _ = tiny_stage(config)
    (head,) = heads(modules[1].levels["independent"])
    seen = []
    stage.begin_epoch(0, 0)
    for step in range(6):
        train_on(stage, 1, step, tiny_batch(step))
        seen.append(head.steps[-1] if head.steps else None)
    assert seen == [None, None, None, 0, 0, 2]
    stage.end_epoch(1, 6)
    assert head.steps == [0, 2, 4]
