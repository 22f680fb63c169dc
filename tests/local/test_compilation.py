"""torch.compile changes the time and the rounding, nothing else."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import gradients, tiny_batch, tiny_config, tiny_stage, without_updates

from pipeline.base.errors import ConfigError
from pipeline.local.compilation import refuse_without_compiler
from pipeline.local.local_module import LocalModule
from pipeline.local.weights import module_weights


def one_step(compile_it: bool) -> tuple[list[LocalModule], dict[str, torch.Tensor | None]]:
    config = tiny_config("greedy", "plain", 2, 3, precision={"compile": compile_it})
    stage, modules, _ = tiny_stage(config)
    without_updates(stage).train_step(1, 0, tiny_batch())
    return modules, gradients(modules)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
def test_compiled_modules_give_the_same_gradients_under_the_same_names() -> None:
    plain, expected = one_step(False)
    compiled, found = one_step(True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(plain, compiled, strict=True):
        assert module_weights(one).keys() == module_weights(other).keys()
    # The first and the last module send no gradient; module 1 walks its graph twice and stays as it is.
    assert [any(b._compiled_call_impl is not None for b in m.blocks.values()) for m in compiled] == [True, False, True]


def test_a_missing_compiler_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"'no-such-compiler' is not found; install g\+\+"):
        refuse_without_compiler(torch.device("cpu"))
