"""The cost of a step in BP units, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.base.recipes import load_config
from pipeline.plan.cost import StepCost, step_cost

SHAPE = (3, 16, 16)


def cost(*assignments: str, plain: bool = False) -> StepCost:
    config = load_config("cifar10-resnet32-bp", assignments=["model.name=resnet20", *assignments])
    return step_cost(config, SHAPE, 10, plain)


def test_backpropagation_costs_one_unit() -> None:
    result = cost("model.modules=1")
    assert result.bp_units == 1.0 and result.heads == 0.0
    # Three products for each convolution, two for the first, whose input needs no gradient; 16 images have 256 pixels.
    stem, pixels = 2 * 3 * 16 * 9 * 256, 256
    stage = [2 * c * c * 9 * pixels / scale for c, scale in ((16, 1), (32, 4), (64, 16))]
    widening = sum(2 * (9 + 1) * c * 2 * c * pixels / scale for c, scale in ((16, 4), (32, 16)))
    blocks = 6 * stage[0] + 5 * (stage[1] + stage[2]) + widening
    assert result.bp_flops == pytest.approx(2 * stem + 3 * blocks + 3 * 2 * 64 * 10)


def test_a_head_costs_its_forward_and_two_gradients() -> None:
    """Greedy heads: global pooling and one linear layer; the trunk saves the input gradients at the boundaries."""
    result = cost("model.modules=4", "method.name=greedy")
    assert [round(m.independent * result.bp_flops) for m in result.modules] == [
        3 * 2 * channels * 10 for channels in (16, 32, 64, 0)
    ]
    assert all(m.relay == m.cascade == 0.0 for m in result.modules)
    assert 0.7 < result.trunk < 1.0
    assert result.bp_units == pytest.approx(result.trunk + result.heads)


def test_a_cascade_adds_relays_and_heads() -> None:
    plain = cost("model.modules=4", "method.name=dgl")
    cascade = cost("model.modules=4", "method.name=dgl", "hierarchy.cascade_span=2")
    assert [m.cascade > 0 for m in cascade.modules] == [False, True, True, False]
    assert [m.relay > 0 for m in cascade.modules] == [False, True, True, False]
    assert [m.forward for m in cascade.modules] == [m.forward for m in plain.modules]
    assert cascade.bp_units > plain.bp_units


def test_the_factorised_decoder_costs_less_than_the_plain_one() -> None:
    settings = ("model.modules=4", "method.name=infopro", "patches.grid=2")
    factorised, plain = cost(*settings), cost(*settings, plain=True)
    assert factorised.trunk == plain.trunk
    assert factorised.modules[0].independent == plain.modules[0].independent  # already at full size
    assert factorised.modules[2].independent < 0.7 * plain.modules[2].independent


def test_counting_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cost("model.modules=2", "method.name=dgl")
    assert torch.equal(torch.rand(3), expected)
