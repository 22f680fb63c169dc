"""DenseNet-BC: its size as published, what flows at a cut, and local learning on it."""

from __future__ import annotations

import torch
from helpers_shapes import boundary_shapes
from torch import nn

from pipeline import UncutModel, build_blocks
from pipeline.models.unbuilt import planned_blocks

NAME = "densenet-bc-100-12"


def test_it_has_the_parameters_of_the_paper() -> None:
    """0.8M on CIFAR-10, of which the layers are 100: convolutions, and the linear one."""
    blocks = planned_blocks(NAME, 3, 10)
    assert sum(parameter.numel() for block in blocks.values() for parameter in block.parameters()) == 769_162
    layers = [m for block in blocks.values() for m in block.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 100


def test_a_cut_carries_what_all_layers_behind_it_see() -> None:
    blocks = planned_blocks(NAME, 3, 10)
    shapes = boundary_shapes(blocks, (3, 32, 32), entrances=list(blocks))  # none changes its input in place
    assert len(blocks) == 1 + 3 * 16 + 2 + 1
    assert shapes["stem"] == (24, 32, 32) and shapes["dense1.15"] == (24 + 16 * 12, 32, 32)
    assert shapes["transition1"] == (108, 16, 16) and shapes["transition2"] == (150, 8, 8)
    assert shapes["dense3.15"] == (342, 8, 8) and shapes["classifier"] == (10,)


def test_every_layer_adds_to_what_it_takes() -> None:
    layer = build_blocks(NAME, 3, 10)["dense1.0"]
    x = torch.randn(2, 24, 8, 8)
    kept = x.clone()
    y = layer(x)
    assert torch.equal(y[:, :24], kept) and torch.equal(x, kept) and y.shape[1] == 36


def test_all_of_it_is_reached_by_a_gradient() -> None:
    model = UncutModel(build_blocks(NAME, 3, 10))
    model(torch.randn(2, 3, 8, 8)).logsumexp(1).sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())
