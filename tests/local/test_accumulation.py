"""n batches, one update: the weights of gradients of the literal definition, summed by hand and divided by n."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle.literal import literal_backward
from tiny import VARIANTS, tiny_batch, tiny_config, tiny_stage, train_on
from torch import Tensor

from pipeline import ConfigError
from pipeline.base.config import Config
from pipeline.local.local_module import LocalModule

BATCHES = 5
LATE = (1, 1, 1, 0, 0)  # k = 2, d = 1
Case = tuple[str, str, int, int, int, dict[str, dict[str, Any]]]  # method, variant, span, modules, n, sections
CASES: dict[str, Case] = {
    "backpropagation": ("dgl", "plain", 1, 1, 2, {}),
    "isolated": ("dgl", "plain", 1, 5, 2, {}),
    "cascades, clipped": ("infopro", "hpff", 2, 5, 3, {"optim": {"clip_norm": 0.05, "lr": 0.05}}),
    "end to end, adamw": ("dgl", "plain", 5, 5, 4, {"optim": {"name": "adamw", "lr": 0.01}}),
    "free": ("dgl", "plain", 1, 5, 3, {"schedule": {"kind": "free"}}),
    "late": ("dgl", "plain", 2, 5, 3, {"schedule": {"kind": "async"}}),
}


def parameters(module: LocalModule) -> list[torch.nn.Parameter]:
    return [p for part in (*module.blocks.values(), *module.levels.values()) for p in part.parameters()]


def literal_descent(modules: list[LocalModule], config: Config, late: tuple[int, ...], n: int) -> None:
    """Each module's gradients, ``late`` steps after their batch, into a sum; a step of torch's optimiser every n."""
    optim = config.optim
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(parameters(m), optim.lr, weight_decay=optim.weight_decay)
        if optim.name == "adamw"
        else torch.optim.SGD(parameters(m), optim.lr, optim.momentum, 0, optim.weight_decay, optim.nesterov)
        for m in modules
    ]
    kept: dict[tuple[int, int], list[Tensor | None]] = {}
    for step in range(BATCHES + max(late)):
        if step < BATCHES:
            batch = tiny_batch(step, dtype=torch.float64)
            literal_backward(modules, config, batch.x, batch.labels, batch.image)
        for index, module in enumerate(modules):
            kept[step, index] = [p.grad for p in parameters(module)]
            module.optimiser.clear()
        for index, (module, optimiser) in enumerate(zip(modules, optimisers, strict=True)):
            done = step - late[index] + 1
            if 1 <= done <= BATCHES and (done % n == 0 or done == BATCHES):
                of_update = range(done - (done % n or n), done)
                for place, parameter in enumerate(parameters(module)):
                    found = [g for b in of_update if (g := kept[b, index][place]) is not None]
                    parameter.grad = sum(found[1:], found[0].clone()) / len(of_update) if found else None
                if optim.clip_norm:
                    torch.nn.utils.clip_grad_norm_(parameters(module), optim.clip_norm)
                optimiser.step()
                module.optimiser.clear()


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_sums_by_hand(case: str) -> None:
    method, variant, span, count, n, more = CASES[case]
    sections = {**VARIANTS[variant], **more}
    config = tiny_config(method, variant, span, count, **sections, train={"accumulate": n})
    stage, modules, _ = tiny_stage(config, torch.float64)
    _, others, _ = tiny_stage(tiny_config(method, variant, span, count, **sections), torch.float64)
    stage.begin_epoch(0, 0)
    for step in range(BATCHES):
        train_on(stage, 1, step, tiny_batch(step, dtype=torch.float64))
        losses = modules[-1].losses
        assert losses.steps == step + 1  # of every batch, whatever is updated
    stage.end_epoch(1, BATCHES)
    literal_descent(others, config, LATE if case == "late" else (0,) * count, n)
    tolerance = 1e-6 if "adamw" in case else 1e-9  # AdamW scales up what is 0 but for rounding
    for mine, theirs in zip(modules, others, strict=True):
        for found, expected in zip(parameters(mine), parameters(theirs), strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)


def test_parts_of_batches_are_summed_up_too() -> None:
    """Two micro-batches in each of two batches: the gradients of one batch of both, cut in four."""
    batches = [tiny_batch(step, dtype=torch.float64) for step in range(2)]
    joined = type(batches[0])(
        torch.cat([b.x for b in batches]), torch.cat([b.labels for b in batches]), None
    )
    found = []
    for sections, fed in (
        ({"schedule": {"micro_batches": 2}, "train": {"accumulate": 2}}, batches),
        ({"schedule": {"micro_batches": 4}, "data": {"batch_size": 16}}, [joined]),
    ):
        stage, modules, _ = tiny_stage(tiny_config("dgl", "plain", 2, 3, **sections), torch.float64)
        for step, batch in enumerate(fed):
            train_on(stage, 1, step, batch)
        found.append([p.detach() for module in modules for p in parameters(module)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_batch_that_is_not_finite_is_left_out_of_the_mean() -> None:
    """Of three batches the second is spoiled: the weights are those of an update with the mean of the other two."""
    found = []
    for n, steps in ((3, (0, 1, 2)), (2, (0, 2))):
        config = tiny_config("dgl", "plain", 1, 2, train={"accumulate": n, "nonfinite": "skip"})
        stage, modules, _ = tiny_stage(config)
        for step in steps:
            batch = tiny_batch(step)
            train_on(stage, 1, step, type(batch)(batch.x * (math.inf if step == 1 else 1), batch.labels, batch.image))
        found.append([p.detach() for module in modules for p in parameters(module)])
        assert [module.losses.skipped for module in modules] == [n - 2] * 2
    assert all(map(torch.equal, *found))


def test_error_feedback_counts_updates_not_batches() -> None:
    with pytest.raises(ConfigError, match="error_feedback = true with train.accumulate = 2: an update that comes"):
        tiny_config("dgl", optim={"error_feedback": True}, schedule={"kind": "async"}, train={"accumulate": 2})
