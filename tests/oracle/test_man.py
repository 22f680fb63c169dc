"""MAN and MAN++ against their formulas, written out by hand (float64, 1e-12)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle.test_methods import linear, residual
from tiny import gradients, tiny_batch, tiny_config, tiny_stage, train_on, without_updates
from torch import Tensor, nn

from pipeline import ConfigError
from pipeline.base.config import Config
from pipeline.base.validation import validate, with_values
from pipeline.local.local_module import LocalModule

MODULES, KEEP = 4, 0.8


def fronted(front: str, span: int = 1, every: int = 1, lag: int = 2, **sections: dict[str, Any]) -> Config:
    config = tiny_config("greedy", "plain", span, MODULES, **sections)
    settings = {"front": front, "average": KEEP, "average_every": every, "average_lag": lag}
    return validate(with_values(config, {f"method.{name}": value for name, value in settings.items()}))


def entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return sum(row.exp().sum().log() - row[label] for row, label in zip(scores, labels, strict=True)) / len(labels)


def literal(modules: list[LocalModule], span: int, x: Tensor, labels: Tensor) -> None:
    """Every path of every loss is evaluated anew."""
    entrances = [x]
    for module in modules:
        for part in (*module.blocks.values(), *module.levels.values()):
            part.train()
        h = entrances[-1]
        for block in module.blocks.values():
            h = block(h)
        entrances.append(h.detach())
    for m, module in enumerate(modules[:-1]):
        for name, level in module.levels.items():
            h = entrances[m if name == "independent" else max(0, m - span + 1)]
            for other in modules[m if name == "independent" else max(0, m - span + 1) : m + 1]:
                for block in other.blocks.values():
                    h = block(h)
            s = level.front.balance if level.front.balance is not None else 1.0
            y = s * residual(level.front.learned, h) + (2 - s) * residual(level.front.average, h)
            entropy(linear(level.terms["task"].heads[0].head[-1], y.mean((2, 3))), labels).backward()
    h = entrances[-2]
    for block in modules[-1].blocks.values():
        h = block(h)
    entropy(h, labels).backward()


@pytest.mark.parametrize(("front", "span"), [("man", 1), ("man++", 1), ("man++", 2)])
def test_gradients_are_those_of_the_formula(front: str, span: int) -> None:
    stage, modules, _ = tiny_stage(fronted(front, span, hierarchy={"final_loss": "local"}), torch.float64)
    if front == "man++":
        for number, level in enumerate(level for module in modules for level in module.levels.values()):
            level.front.balance.data.fill_(0.4 + 0.3 * number)
    reference, batch = copy.deepcopy(modules), tiny_batch(dtype=torch.float64)
    train_on(without_updates(stage), 0, 0, batch)
    literal(reference, span, batch.x, batch.labels)

    mine, theirs = gradients(modules), gradients(reference)
    scale = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, expected in theirs.items():
        found = mine[name]
        if ".average." in name:
            assert found is None and expected is None, name
            continue
        assert found is not None and expected is not None, name
        assert float((found - expected).norm()) <= 1e-12 * max(float(expected.norm()), 1e-2 * scale), name


def parameters(block: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in block.parameters()]


@pytest.mark.parametrize(("every", "lag"), [(1, 2), (2, 3)])
def test_the_average_is_that_of_the_next_block_after_the_declared_steps(every: int, lag: int) -> None:
    stage, modules, _ = tiny_stage(fronted("man++", every=every, lag=lag), torch.float64)
    averages = [parameters(module.levels["independent"].front.average) for module in modules[:-1]]
    began = copy.deepcopy(averages)
    after: list[list[list[Tensor]]] = []  # [step][module - 1]
    stage.begin_epoch(0, 0)
    for step in range(7):
        train_on(stage, 1, step, tiny_batch(step, dtype=torch.float64))
        due = step - lag
        if due >= 0 and due % every == 0:
            share = KEEP**every
            averages = [
                [share * a + (1 - share) * b for a, b in zip(average, weights, strict=True)]
                for average, weights in zip(averages, after[due], strict=True)
            ]
        after.append([parameters(next(iter(module.blocks.values()))) for module in modules[1:]])
        for module, expected in zip(modules, averages, strict=False):
            found = parameters(module.levels["independent"].front.average)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for old, new in zip(began, averages, strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert all(module.levels["independent"].front.balance.item() != 1.0 for module in modules[:-1])


def test_what_it_cannot_stand_before_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="puts a copy of block 'classifier', .* gives \\(4,\\), no features; cut"):
        tiny_stage(fronted("man", model={"cuts": ["b", "c", "classifier"]}))
    with pytest.raises(ConfigError, match="'man' with hierarchy.levels = 'together': .* hierarchy.levels=separate"):
        fronted("man", 2, hierarchy={"levels": "together"})
    with pytest.raises(ConfigError, match="schedule.kind = 'free': .* use exact or async"):
        tiny_stage(fronted("man", schedule={"kind": "free"}))
