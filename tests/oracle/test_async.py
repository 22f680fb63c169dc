"""Schedule `async` is gradient descent with declared delays: a literal simulation in one process gives its weights.

For every batch all gradients are computed by the literal definition with the weights of that moment. Each module's
gradient is kept as many steps as declared and then applied.
"""

from __future__ import annotations

import copy

import pytest
import torch
from oracle.literal import literal_backward
from tiny import VARIANTS, tiny_batch, tiny_config, tiny_stage, train_on

from pipeline.local.local_module import LocalModule
from pipeline.local.optimiser import Optimiser, step_together

pytestmark = pytest.mark.long

MODULES = 5
STEPS = 6
# Steps late, by module: one d per hop of the longest way that a gradient to the module takes.
DECLARED = {
    ("hpff", 1): (0, 0, 0, 0, 0),
    ("hpff", 2): (1, 1, 1, 0, 0),
    ("hpff", 3): (2, 2, 1, 0, 0),
    ("released", 2): (1, 1, 1, 1, 0),
    ("hpff", 5): (4, 3, 2, 1, 0),
}


def parameters(module: LocalModule) -> list[torch.nn.Parameter]:
    return [p for part in (*module.blocks.values(), *module.levels.values()) for p in part.parameters()]


def delayed_descent(modules: list[LocalModule], late: list[int], config: object) -> None:
    """STEPS batches, each module's gradients applied ``late`` steps after their batch."""
    kept: dict[tuple[int, int], list[torch.Tensor | None]] = {}
    for step in range(STEPS + max(late)):
        if step < STEPS:
            batch = tiny_batch(step, dtype=torch.float64)
            literal_backward(modules, config, batch.x, batch.labels, batch.image)
        for index, module in enumerate(modules):
            kept[step, index] = [p.grad for p in parameters(module)]
            module.optimiser.clear()
        for index, module in enumerate(modules):
            if 0 <= step - late[index] < STEPS:
                for parameter, gradient in zip(parameters(module), kept[step - late[index], index], strict=True):
                    parameter.grad = gradient
                step_together([module.optimiser])
                module.optimiser.clear()


def check_delayed(method: str, variant: str, span: int, delay: int, levels: str) -> None:
    exact = tiny_config(method, variant, span, MODULES)
    _, reference, _ = tiny_stage(exact, torch.float64)
    late = [delay * hops for hops in DECLARED[variant, span]]
    sections = {**VARIANTS[variant], "schedule": {"kind": "async", "delay": delay}}
    sections["hierarchy"] = {**sections.get("hierarchy", {}), "levels": levels}
    config = tiny_config(method, variant, span, MODULES, **sections)
    stage, modules, _ = tiny_stage(config, torch.float64)
    assert any(module.plan.together for module in modules) == (levels == "together")

    stage.begin_epoch(0, 0)
    for step in range(STEPS):
        train_on(stage, 1, step, tiny_batch(step, dtype=torch.float64))
    stage.end_epoch(1, STEPS)
    delayed_descent(reference, late, exact)

    for mine, theirs in zip(modules, reference, strict=True):
        for found, expected in zip(parameters(mine), parameters(theirs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize(("variant", "span"), DECLARED)
@pytest.mark.parametrize("method", ["dgl", "infopro"])
def test_weights_equal_literal_descent_with_the_declared_delays(
    method: str, variant: str, span: int, delay: int
) -> None:
    check_delayed(method, variant, span, delay, "separate")


@pytest.mark.parametrize(("variant", "span"), [("hpff", 2), ("released", 2), ("hpff", MODULES)])
def test_both_levels_at_once_leave_the_gradients_of_their_heads_in_the_same_stashes(variant: str, span: int) -> None:
    check_delayed("infopro", variant, span, 1, "together")


def test_the_simulation_notices_an_undeclared_delay() -> None:
    exact = tiny_config("dgl", "hpff", 2, MODULES)
    _, one, _ = tiny_stage(exact, torch.float64)
    two = copy.deepcopy(one)
    delayed_descent(one, [1, 1, 1, 0, 0], exact)
    delayed_descent(two, [1, 1, 1, 1, 0], exact)
    with pytest.raises(AssertionError):
        for mine, theirs in zip(parameters(one[3]), parameters(two[3]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_clipping_sees_the_gradients_of_one_batch(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads' gradients wait for those of the module: with a learning rate of 0 the norm of every update is that of
    the exact schedule, batch by batch."""
    norms: dict[str, list[float]] = {}
    for kind in ("exact", "async"):
        config = tiny_config(
            "infopro", "hpff", 2, MODULES, schedule={"kind": kind}, optim={"clip_norm": clip, "lr": 1e-30}
        )
        stage, modules, _ = tiny_stage(config, torch.float64)
        seen = norms.setdefault(kind, [])

        def step(optimisers: list[Optimiser], mine: Optimiser = modules[1].optimiser, seen: list[float] = seen) -> None:
            if mine in optimisers:
                seen.append(sum(float(gradient.pow(2).sum()) for gradient in mine.gradients()))
            step_together(optimisers)

        monkeypatch.setattr("pipeline.local.updates.step_together", step)
        stage.begin_epoch(0, 0)
        for index in range(4):
            train_on(stage, 1, index, tiny_batch(index, dtype=torch.float64))
        stage.end_epoch(1, 4)
    assert norms["async"] == pytest.approx(norms["exact"], rel=1e-9)
    assert len(norms["async"]) == 4
