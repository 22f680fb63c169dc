"""Modules updated together end up, to the bit, where each would alone; it takes no more operations than for one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_calls import Calls
from tiny import tiny_batch, tiny_config, tiny_stage, train_on
from torch import Tensor, nn

from pipeline.base.config import OptimConfig
from pipeline.base.errors import NonFiniteError
from pipeline.local.local_module import LocalModule
from pipeline.local.losses import Losses, close_together
from pipeline.local.module_state import module_state
from pipeline.local.optimiser import Optimiser, step_together
from pipeline.local.updates import Due, update_together

STEPS = 4
OPTIMS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "plain sgd": {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    "heavy ball": {"nesterov": False},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.05},
    "clipped": {"clip_norm": 0.05},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "exact": {},
    "two micro-batches": {"micro_batches": 2},
    "async, two late": {"kind": "async", "delay": 2, "micro_batches": 2},
    "free": {"kind": "free"},
}


def each_alone(due: Due) -> None:
    for module, step in due:
        update_together([(module, step)])


def spoil(module: LocalModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives for the batch of step 1 from the next module is infinite."""
    receive = module.receive

    def spoiled(key: tuple[int, int], message_key: int, gradients: dict[str, Tensor]) -> None:
        receive(key, message_key, {n: g * math.inf if key[0] == 1 else g for n, g in gradients.items()})

    monkeypatch.setattr(module, "receive", spoiled)


@pytest.mark.parametrize(
    ("optim", "schedule", "skips"),
    [
        *((optim, "exact", False) for optim in OPTIMS),
        *(("sgd", schedule, False) for schedule in SCHEDULES if schedule != "exact"),
        ("adamw", "async, two late", True),
        ("clipped", "exact", True),
    ],
)
def test_together_is_each_alone_to_the_bit(
    optim: str, schedule: str, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = 1 if schedule == "free" else 2
    train = {"nonfinite": "skip"} if skips else {}
    config = tiny_config("predsim", "hpff", span, optim=OPTIMS[optim], schedule=SCHEDULES[schedule], train=train)
    states = []
    for update in (update_together, each_alone):
        monkeypatch.setattr("pipeline.stage.stage.update_together", update)
        stage, modules, _ = tiny_stage(config)
        if skips:
            spoil(modules[1], monkeypatch)
        stage.begin_epoch(0, 0)
        for step in range(STEPS):
            train_on(stage, 1, step, tiny_batch(step))
        states.append([module_state(module) for module in modules])  # with what is late
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    assert [int(state["losses.skipped"]) for state in states[0]] == [0, int(skips), 0, 0, 0]


def calls_of_updates(modules: int, optim: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """In one step of a rank, not the first, that owns so many modules."""
    calls = Calls()

    def counted(due: Due) -> None:
        assert len(due) == modules
        with calls:
            update_together(due)

    stage, _, _ = tiny_stage(tiny_config("dgl", "hpff", min(2, modules), modules, optim=optim))
    train_on(stage, 1, 0, tiny_batch(0))
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.stage.stage.update_together", counted)
        train_on(stage, 1, 1, tiny_batch(1))
    return calls.count


@pytest.mark.parametrize("name", OPTIMS)
def test_operations_do_not_grow_with_the_modules_of_a_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping is a matter of one module: its norm from those of its gradients, and a scale for them."""
    few, many = (calls_of_updates(modules, OPTIMS[name], monkeypatch) for modules in (2, 5))
    assert few > 0 and many - few == (2 * (5 - 2) if name == "clipped" else 0)


# --- the arithmetic is torch's ----------------------------------------------------------------------------------------


def parameters(generator: torch.Generator) -> list[nn.Parameter]:
    """As a convolution in NHWC, a bias, a matrix, a single number."""
    made = [torch.randn(size, generator=generator) for size in ((8, 3, 3, 3), (7,), (10, 33), ())]
    made[0] = made[0].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in made]


def torch_optimiser(weights: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(weights, config.lr, weight_decay=config.weight_decay, foreach=False)
    return torch.optim.SGD(
        weights,
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        foreach=False,
    )


@pytest.mark.parametrize("name", [name for name in OPTIMS if name != "clipped"])
def test_weights_and_states_are_those_of_torch_and_a_saved_state_goes_on(name: str) -> None:
    """Two modules; in the second step one weight has no gradient, so its momentum and its step count stand still. The
    names and types of the state are those of torch's own, as they were saved before modules were updated together."""
    config = OptimConfig(**OPTIMS[name])
    random = torch.Generator().manual_seed(3)
    mine = [parameters(random) for _ in range(2)]
    theirs = [[nn.Parameter(p.detach().clone()) for p in module] for module in mine]
    optimisers = [Optimiser(module, config) for module in mine]
    references = [torch_optimiser(module, config) for module in theirs]
    for step in range(5):
        for module, other in zip(mine, theirs, strict=True):
            for index, (p, q) in enumerate(zip(module, other, strict=True)):
                if (step, index) != (1, 2):
                    q.grad = torch.randn(q.shape, generator=random).as_strided(q.shape, q.stride())
                    p.grad = q.grad.clone()
        step_together(optimisers)
        for optimiser, reference, module, other in zip(optimisers, references, mine, theirs, strict=True):
            reference.step()
            reference.zero_grad()
            optimiser.clear()
            saved = {
                f"{index}.{key}": value
                for index, values in reference.state_dict()["state"].items()
                for key, value in values.items()
                if value is not None
            }
            found = dict(optimiser.state())
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[key], saved[key]) and found[key].dtype == saved[key].dtype for key in saved)
            assert all(map(torch.equal, module, other))
        if step == 2:  # through a checkpoint, which does not keep the layout
            optimisers = [Optimiser(module, config) for module in mine]
            for optimiser, reference in zip(optimisers, references, strict=True):
                document = reference.state_dict()["state"]
                optimiser.restore(
                    {
                        f"{index}.{key}": torch.as_tensor(value).detach().clone().contiguous()
                        for index, values in document.items()
                        for key, value in values.items()
                        if value is not None
                    }
                )


def test_a_clipped_update_is_that_of_torchs_clip_grad_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("dgl", "hpff", 2, optim={"clip_norm": 0.05})
    stage, modules, _ = tiny_stage(config)
    expected: list[list[Tensor]] = []

    def noted(due: Due) -> None:
        for module, _ in due:
            copies = [nn.Parameter(g.clone()) for g in module.optimiser.gradients()]
            for copy, gradient in zip(copies, module.optimiser.gradients(), strict=True):
                copy.grad = gradient.clone()
            assert torch.nn.utils.clip_grad_norm_(copies, 0.05) > 0.05
            expected.append([copy.grad for copy in copies if copy.grad is not None])
        update_together(due)

    def checked(optimisers: list[Optimiser]) -> None:
        for optimiser, clipped in zip(optimisers, expected, strict=True):
            assert all(map(torch.equal, optimiser.gradients(), clipped))
        step_together(optimisers)

    monkeypatch.setattr("pipeline.stage.stage.update_together", noted)
    monkeypatch.setattr("pipeline.local.updates.step_together", checked)
    train_on(stage, 1, 0, tiny_batch())
    assert len(expected) == len(modules)


# --- losses, and what is not finite -----------------------------------------------------------------------------------


def test_losses_of_micro_batches_and_steps_add_up_by_module_and_name() -> None:
    one, two = Losses(), Losses()
    for step, share in ((0, 1.0), (1, 0.5), (1, 0.5)):
        one.add(step, {"a": torch.tensor(2.0 + step), "b": torch.tensor(1.0)}, share)
        two.add(step, {"a": torch.tensor(8.0, dtype=torch.float64)}, share)
    close_together([(one, 0), (two, 0)])
    assert one.values(1) == {"a": 3.0, "b": 1.0} and one.values(0) == {}
    two.skip(1)
    close_together([(one, 1)])
    assert one.take() == {"a": 2.5, "b": 1.0} and two.take() == {"a": 8.0}
    assert (one.take_skipped(), two.take_skipped()) == (0, 1)


def test_of_several_modules_that_are_not_finite_the_first_is_named_and_none_is_updated() -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 1))
    train_on(stage, 1, 0, tiny_batch(0))
    with torch.no_grad():
        for module in modules[2:4]:
            next(module.levels["cascade" if module.plan.cascade else "independent"].parameters()).fill_(math.inf)
    before = [[weight.parameter.clone() for weight in module.optimiser.weights] for module in modules]
    with pytest.raises(NonFiniteError, match="module 2 .*, batch of step 1"):
        train_on(stage, 1, 1, tiny_batch(1))
    for module, old in zip(modules, before, strict=True):
        now = [weight.parameter for weight in module.optimiser.weights]
        assert all(map(torch.equal, now, old))
