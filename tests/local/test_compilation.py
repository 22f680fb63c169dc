"""torch.compile changes the time and the rounding, nothing else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
from collections import OrderedDict

import pytest
import tiny
import torch
from tiny import (
    CLASSES,
    IMAGE,
    gradients,
    tiny_batch,
    tiny_blocks,
    tiny_config,
    tiny_plan,
    tiny_stage,
    train_on,
    without_updates,
)
from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.local.both_levels import BothLevels
from pipeline.local.compilation import compile_parts, refuse_without_compiler
from pipeline.local.local_module import LocalModule
from pipeline.local.methods import levels_of
from pipeline.local.task import Classification
from pipeline.local.weights import module_weights
from pipeline.models.heads import Given
from pipeline.models.spread import whole


def few_blocks() -> OrderedDict[str, nn.Module]:
    """Those that make three modules: every one that is compiled takes seconds."""
    blocks = tiny_blocks()
    return OrderedDict((name, blocks[name]) for name in ("stem", "a", "b", "classifier"))


def one_step(compile_it: bool) -> tuple[list[LocalModule], dict[str, torch.Tensor | None]]:
    config = tiny_config("greedy", "plain", 2, 3, precision={"compile": compile_it})
    stage, modules, _ = tiny_stage(config)
    train_on(without_updates(stage), 1, 0, tiny_batch())
    return modules, gradients(modules)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
def test_compiled_modules_give_the_same_gradients_under_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "tiny_blocks", few_blocks)
    plain, expected = one_step(False)
    compiled, found = one_step(True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(plain, compiled, strict=True):
        assert module_weights(one).keys() == module_weights(other).keys()
    # The first and the last module send no gradient; module 1 walks its graph twice and stays as it is.
    assert [any(b._compiled_call_impl is not None for b in m.blocks.values()) for m in compiled] == [True, False, True]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
def test_compiled_heads_of_all_patches_and_both_levels_give_the_same_on_maps_of_several_sizes() -> None:
    config = tiny_config("infopro", "hpff", 2, 3, hierarchy={"levels": "together"})
    role = dataclasses.replace(tiny_plan(config).modules[1], together=True)
    for channels, side in ((4, 8), (6, 4)):  # a shape that varies would be compiled for all sizes at once
        torch.manual_seed(0)
        shape = (channels, side, side)
        builders = levels_of(role, 3, shape, Classification(CLASSES, IMAGE), config)
        plain = OrderedDict((name, build()) for name, build in builders.items())
        compiled = copy.deepcopy(plain)
        compile_parts(role, [], compiled.values(), late=True)
        feature, batch = torch.randn(8, *shape), tiny_batch()
        given = Given(batch.labels, batch.image)
        both = BothLevels(plain), BothLevels(compiled)
        found = [levels.backward(feature, given, 0.5, contextlib.nullcontext) for levels in both]
        results = [{name: (whole(gradient), losses) for name, (gradient, losses) in each.items()} for each in found]
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        for name, level in plain.items():
            pairs = list(zip(compiled[name].parameters(), level.parameters(), strict=True))
            assert pairs
            for mine, other in pairs:
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
            for mine, other in zip(compiled[name].buffers(), level.buffers(), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_missing_compiler_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"'no-such-compiler' is not found; install g\+\+"):
        refuse_without_compiler(torch.device("cpu"))
