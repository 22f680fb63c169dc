"""A module's state between two steps, put into a fresh module, goes on bit for bit: also with late work in flight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_config, tiny_stage, train_on

from pipeline.base.errors import ConfigError
from pipeline.local.local_module import LocalModule
from pipeline.local.module_state import module_state, restore_module
from pipeline.local.weights import module_weights, weights_sha256
from pipeline.store.checkpoint import Checkpoint, write_module
from pipeline.store.manifest import FORMAT

STEPS = 6
CUT = 3


def run(stage: Any, steps: range, first: int = 0) -> None:
    stage.begin_epoch(first, steps.start)
    for step in steps:
        train_on(stage, 1, step, tiny_batch(step))
    stage.end_epoch(1, steps.stop) if steps.stop == STEPS else None


def digest(modules: list[LocalModule]) -> str:
    return weights_sha256([module_weights(module) for module in modules])


CASES = {
    "exact": ("infopro", "hpff", 2, {}, {}),
    "exact, released": ("infopro", "released", 2, {}, {}),
    "adamw": ("dgl", "hpff", 2, {}, {"optim": {"name": "adamw", "lr": 0.01}}),
    "two micro-batches": ("predsim", "hpff", 2, {"micro_batches": 2}, {}),
    "async": ("infopro", "hpff", 2, {"kind": "async"}, {}),
    "async, released": ("infopro", "released", 2, {"kind": "async"}, {}),
    "async, two late": ("dgl", "hpff", 2, {"kind": "async", "delay": 2, "micro_batches": 2}, {}),
    "async, three hops": ("infopro", "hpff", 4, {"kind": "async"}, {"optim": {"clip_norm": 0.1}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_restored_module_goes_on_bit_for_bit(case: str, tmp_path: Path) -> None:
    method, variant, span, schedule, more = CASES[case]
    config = tiny_config(method, variant, span, 5, schedule=schedule, **more)
    stage, modules, _ = tiny_stage(config)
    run(stage, range(STEPS))

    half, halves, _ = tiny_stage(config)
    run(half, range(CUT))
    for module in halves:  # through the files, as a real resume does
        write_module(tmp_path, module.plan.index, module_state(module))
    late = sum(len(module.in_flight) for module in halves)
    assert (late > 0) == (schedule.get("kind") == "async")

    again, restored, _ = tiny_stage(config)
    assert digest(restored) != digest(modules)
    for module in restored:
        restore_module(module, Checkpoint(tmp_path, {"format": FORMAT}).module_state(module.plan.index))
    again.restored()
    assert digest(restored) == digest(halves)
    run(again, range(CUT, STEPS))
    assert digest(restored) == digest(modules)
    for one, two in zip(modules, restored, strict=True):
        assert one.take_losses() == two.take_losses()


def test_the_state_is_a_copy(tmp_path: Path) -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2, 5))
    run(stage, range(2))
    state = module_state(modules[0])
    before = {name: value.clone() for name, value in state.items()}
    for step in range(2, 4):
        train_on(stage, 1, step, tiny_batch(step))
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert any(not torch.equal(value, module_state(modules[0])[name]) for name, value in before.items())


def test_the_state_of_another_module_is_refused_by_name() -> None:
    _, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2, 5))
    with pytest.raises(ConfigError, match="does not fit local module 1"):
        restore_module(modules[1], module_state(modules[0]))
    state = module_state(modules[0])
    name = next(name for name in state if name.startswith("blocks.") and state[name].dim() == 4)
    state[name] = state[name][:1]
    with pytest.raises(ConfigError, match=name.replace(".", r"\.") + " has the shape"):
        restore_module(modules[0], state)
    state = module_state(modules[0])
    state[name] = state[name].double()
    with pytest.raises(ConfigError, match=name.replace(".", r"\.") + " is of torch.float64 there and of torch.float32"):
        restore_module(modules[0], state)
