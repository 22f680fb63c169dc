"""Weights of levels that change over the epochs: linear, the same as other constants, in every form of a level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import gradients, tiny_batch, tiny_config, tiny_stage, train_on, without_updates

from pipeline import ConfigError
from pipeline.local.level_weights import level_weight


def test_a_pair_goes_from_its_first_to_its_second_value() -> None:
    assert [level_weight((1.0, 0.25), epoch, 4) for epoch in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    assert level_weight((1.0, 0.25), 1, 1) == 1.0 and level_weight(0.3, 3, 4) == 0.3


@pytest.mark.parametrize("hierarchy", [{}, {"levels": "together"}, {"variant": "deepsup", "cascade_span": 1}])
def test_an_epoch_of_a_schedule_is_an_epoch_with_its_numbers(hierarchy: dict[str, Any]) -> None:
    """Epoch 2 of 3 of [1.0, 0.0] is 0.5; a level whose weight ends, or begins, at 0 has heads all the time."""
    deep = "variant" in hierarchy
    plans: list[dict[str, Any]] = [
        {"cascade_weight": [1.0, 0.0]} | ({} if deep else {"independent_weight": [0.0, 4.0]}),
        {"cascade_weight": 0.5} | ({} if deep else {"independent_weight": 2.0}),
    ]
    found = []
    for weights in plans:
        config = tiny_config("infopro", "hpff", 2, 4, hierarchy={"cascade_span": 2} | hierarchy | weights)
        stage, modules, _ = tiny_stage(config)
        for module in modules:
            module.set_level_weights(2, 3)
        train_on(without_updates(stage), 1, 0, tiny_batch())
        found.append(gradients(modules))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        other = found[1][name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name


def test_two_zeros_are_no_heads() -> None:
    _, modules, _ = tiny_stage(tiny_config("dgl", "plain", 2, 4, hierarchy={"independent_weight": [0.0, 0.0]}))
    assert [list(module.levels) for module in modules] == [[], ["cascade"], ["cascade"], []]


@pytest.mark.parametrize(
    ("hierarchy", "words"),
    [
        ({"cascade_weight": [1.0]}, r"hierarchy.cascade_weight = \[1.0\] must be 2 numbers, 0 to 1,000,000"),
        ({"independent_weight": [1.0, -1.0]}, r"independent_weight = \[1.0, -1.0\]: each must not be negative"),
        ({"cascade_weight": [1.0, 0.5], "variant": "released"}, "'released', whose last loss .* give one number"),
    ],
)
def test_what_is_no_way_between_two_weights_is_refused(hierarchy: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config("dgl", "plain", 2, hierarchy={"cascade_span": 2} | hierarchy)
