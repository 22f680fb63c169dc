"""The learning rate of the papers, and clipping per module."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_batch, tiny_config, tiny_stage, train_on

from pipeline.base.config import OptimConfig
from pipeline.local.optimiser import learning_rate


def test_cosine_with_warm_up_is_the_published_formula() -> None:
    config = OptimConfig(lr=0.8, warmup_epochs=10, warmup_lr=0.01)
    epochs = 160
    assert learning_rate(config, 1, epochs) == pytest.approx(0.01)
    assert learning_rate(config, epochs, epochs) == pytest.approx(0.0, abs=1e-12)
    for epoch in range(1, epochs + 1):
        cosine = 0.5 * 0.8 * (1 + math.cos(math.pi * epoch / epochs))
        warm = cosine * (epoch - 1) / 10 + 0.01 * (11 - epoch) / 10
        assert learning_rate(config, epoch, epochs) == pytest.approx(warm if epoch <= 10 else cosine)


def test_the_cosine_of_imagenet_begins_at_its_peak() -> None:
    config = OptimConfig(lr=0.4, schedule="cosine-peak", warmup_epochs=0)
    rates = [learning_rate(config, epoch, 90) for epoch in range(1, 91)]
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * e / 90)) for e in range(90)])
    assert rates[0] == 0.4 and rates[-1] > 0


def test_step_schedule_falls_at_half_and_three_quarters() -> None:
    config = OptimConfig(lr=1.0, schedule="step", warmup_epochs=0)
    rates = [learning_rate(config, epoch, 160) for epoch in (80, 81, 120, 121)]
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_both_optimisers_lower_every_local_loss(name: str) -> None:
    config = tiny_config("dgl", "hpff", 2, optim={"name": name, "lr": 0.01 if name == "adamw" else 0.05})
    stage, modules, _ = tiny_stage(config)
    batch = tiny_batch()
    train_on(stage, 1, 0, batch)
    before = {m.plan.index: m.take_losses() for m in modules}
    for step in range(1, 16):
        train_on(stage, 1, step, batch)
    for module in modules:
        module.take_losses()
    train_on(stage, 1, 16, batch)
    for module in modules:
        for loss, value in module.take_losses().items():
            assert value < before[module.plan.index][loss], (module.plan.index, loss)


def test_clipping_bounds_the_gradient_of_one_module() -> None:
    config = tiny_config("dgl", "plain", 1, modules=2, optim={"clip_norm": 1e-3, "lr": 1.0, "momentum": 0.0,
                                                               "nesterov": False, "weight_decay": 0.0})
    stage, modules, _ = tiny_stage(config)
    for module in modules:
        module.set_learning_rate(1.0)
    before = [[p.detach().clone() for p in module.parameters] for module in modules]
    train_on(stage, 1, 0, tiny_batch())
    for module, old in zip(modules, before, strict=True):
        moved = torch.stack([(p - q).norm() for p, q in zip(module.parameters, old, strict=True)]).norm()
        assert 0 < float(moved.detach()) <= 1e-3 * 1.001


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_heads_learn_at_a_rate_of_their_own(name: str) -> None:
    """The first updates: the blocks' are the same, the heads' a quarter of what they were."""
    moves = []
    for head_lr in (1.0, 0.25):
        config = tiny_config("dgl", "hpff", 2, optim={"name": name, "weight_decay": 0.0, "head_lr": head_lr})
        stage, modules, _ = tiny_stage(config)
        heads = [p for module in modules for level in module.levels.values() for p in level.parameters()]
        parts = [[p for module in modules for p in module.parameters], heads]
        before = [[p.detach().clone() for p in part] for part in parts]
        train_on(stage, 1, 0, tiny_batch())
        moves.append([[p.detach() - q for p, q in zip(*pair, strict=True)] for pair in zip(parts, before, strict=True)])
    (blocks, heads), (same, quarters) = moves
    assert len(heads) and any(float(move.abs().max()) > 1e-6 for move in heads)
    torch.testing.assert_close(same, blocks, rtol=0, atol=0)
    torch.testing.assert_close(quarters, [move / 4 for move in heads], rtol=1e-3, atol=1e-6)
