"""One forward per module gives the gradients of the literal definition (float64, relative 1e-10), for every method."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle.literal import literal_backward
from tiny import METHODS, VARIANTS, gradients, tiny_batch, tiny_config, tiny_stage, train_on, without_updates

from pipeline.local.weights import model_state, module_weights
from pipeline.models.backbones import UncutModel
from pipeline.models.heads import Given
from pipeline.models.spread import whole

pytestmark = pytest.mark.long

MODULES = 5
SPANS = (1, 2, 3, MODULES)


def assert_same(mine: dict[str, torch.Tensor | None], oracle: dict[str, torch.Tensor | None]) -> None:
    scale = max(float(g.abs().max()) for g in oracle.values() if g is not None)
    for name, expected in oracle.items():
        found = mine[name]
        if expected is None:
            assert found is None or not found.any(), f"{name} has a gradient, the oracle has none"
            continue
        assert found is not None, f"{name} has no gradient"
        # a bias before a BatchNorm has an exact gradient of 0: noise is judged on the scale of all gradients
        tolerance = 1e-10 * max(float(expected.norm()), 1e-3 * scale)
        assert float((found - expected).norm()) <= tolerance, name
    assert any(g is not None and bool(g.any()) for g in oracle.values())


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_the_literal_definition(method: str, variant: str, span: int) -> None:
    config = tiny_config(method, variant, span, MODULES)
    stage, modules, _ = tiny_stage(config, torch.float64)
    reference = copy.deepcopy(modules)
    batch = tiny_batch(dtype=torch.float64)

    train_on(without_updates(stage), 0, 0, batch)
    literal_backward(reference, config, batch.x, batch.labels, batch.image)

    assert_same(gradients(modules), gradients(reference))


def test_the_oracle_notices_a_leak_of_the_independent_gradient() -> None:
    """A merged backward (everything upstream) is wrong, and this suite would see it."""
    config = tiny_config("infopro", "hpff", 2, MODULES)
    stage, modules, _ = tiny_stage(config, torch.float64)
    reference = copy.deepcopy(modules)
    batch = tiny_batch(dtype=torch.float64)
    leaky = modules[2]
    cascade_only = leaky.cascade

    def cascade_and_independent(micro_batch: int) -> None:
        cascade_only(micro_batch)
        leaky.independent(micro_batch)
        item = leaky.in_flight[micro_batch]
        assert item.own is not None and item.independent is not None
        item.own = whole(item.own) + whole(item.independent)

    leaky.cascade = cascade_and_independent  # type: ignore[method-assign]
    train_on(without_updates(stage), 0, 0, batch)
    literal_backward(reference, config, batch.x, batch.labels, batch.image)
    with pytest.raises(AssertionError):
        assert_same(gradients(modules), gradients(reference))


def test_one_module_is_backpropagation_bit_for_bit() -> None:
    """K = 1 for five steps of Nesterov SGD in float32 equals a plain training loop."""
    config = tiny_config("infopro", "hpff", 1, modules=1)
    stage, modules, _ = tiny_stage(config)
    plain = UncutModel(copy.deepcopy(modules[0].blocks))
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    modules[0].set_learning_rate(0.05)
    for step in range(5):
        batch = tiny_batch(step)
        train_on(stage, 0, step, batch)
        plain.train()
        optimiser.zero_grad()
        F.cross_entropy(plain(batch.x), batch.labels).backward()
        optimiser.step()
    mine = model_state([module_weights(modules[0])])
    for name, value in plain.state_dict().items():
        assert torch.equal(mine[name], value), name


def test_span_k_is_backpropagation_plus_the_local_losses() -> None:
    """k = K: end-to-end gradients of the last loss plus those of every cascade and independent head, on one graph."""
    config = tiny_config("dgl", "plain", MODULES, MODULES)
    stage, modules, _ = tiny_stage(config, torch.float64)
    reference = copy.deepcopy(modules)
    batch = tiny_batch(dtype=torch.float64)
    train_on(without_updates(stage), 0, 0, batch)

    h = batch.x
    total = h.new_zeros(())
    for module in reference:
        inner = h.detach()
        for block in module.blocks.values():
            h, inner = block(h), block(inner)
        if "cascade" in module.levels:
            total = total + module.levels["cascade"].terms["task"].heads[0].loss(h, Given(batch.labels))
        if "independent" in module.levels:
            total = total + module.levels["independent"].terms["task"].heads[0].loss(inner, Given(batch.labels))
    (total + F.cross_entropy(h, batch.labels)).backward()
    assert_same(gradients(modules), gradients(reference))


def test_span_k_without_independent_level_costs_one_backward_per_module() -> None:
    """Pure end-to-end flow: all of a module's gradient goes upstream, so no separate activation-only backward runs."""
    config = tiny_config("dgl", "plain", MODULES, MODULES, hierarchy={"independent_weight": 0.0})
    stage, _, plan = tiny_stage(config)
    assert not [action for action in stage.schedule if action.kind.value == "R"]
    assert all(module.merged for module in plan.modules[1:])


def test_the_classifier_is_in_no_cascade_in_the_paper_variant() -> None:
    _, _, plan = tiny_stage(tiny_config("dgl", "hpff", 2))
    assert plan.modules[-1].outgoing == ()
    _, _, released = tiny_stage(tiny_config("dgl", "released", 2))
    assert released.modules[-1].outgoing == (3,)
