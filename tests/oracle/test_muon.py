"""Muon is torch.optim.Muon on the hidden matrices and AdamW on all else; error feedback is its formula, batch by batch.

The reference holds torch's own optimisers, one pair per module, and applies gradients of the literal definition late.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle.literal import literal_backward
from tiny import tiny_batch, tiny_config, tiny_stage, train_on
from tiny_features import configured, transformer
from torch import Tensor, nn

from pipeline import ConfigError
from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.local.local_module import LocalModule
from pipeline.local.optimiser import step_together
from pipeline.local.task import Classification
from pipeline.plan.assembly import build_modules, make_plan

MODULES, STEPS = 5, 4
LATE = (1, 1, 1, 0, 0)  # k = 2, d = 1


def named(module: LocalModule) -> dict[str, nn.Parameter]:
    parts = {**module.blocks, **{f"head.{name}": level for name, level in module.levels.items()}}
    return {f"{part}.{name}": p for part, network in parts.items() for name, p in network.named_parameters()}


def hidden(module: LocalModule) -> list[str]:
    wanted = {id(weight.parameter) for weight in module.optimiser.weights if weight.hidden}
    return [name for name, parameter in named(module).items() if id(parameter) in wanted]


def test_hidden_matrices_are_neither_first_nor_last_nor_vectors() -> None:
    _, modules, _ = tiny_stage(tiny_config("dgl-mlp", "plain", 1, 3, optim={"name": "muon"}))
    matrices = [[name for name, p in named(module).items() if p.dim() > 1] for module in modules]
    heads = [[name for name in names if name.startswith("head.")] for names in matrices]
    left_out = [set(names) - set(hidden(module)) for names, module in zip(matrices, modules, strict=True)]
    assert left_out == [{"stem.0.weight", heads[0][-1]}, {heads[1][-1]}, {"classifier.2.weight"}]
    assert len(heads[0]) > 2 and all(p.dim() > 1 for m in modules for n, p in named(m).items() if n in hidden(m))


def test_projections_of_attention_are_hidden_too() -> None:
    config = configured(1, {"name": "lopt"}, optim={"name": "muon"})
    blocks = nn.Sequential(transformer())[0]._modules
    plan = make_plan(config, blocks, Classification(4, (6, 8)), 1)
    modules = build_modules(plan, 0, blocks, Numerics(torch.device("cpu"), torch.float32, False), fresh=False)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert hidden(modules[1])[:4] == [f"layer1.{name}" for name in names]
    assert hidden(modules[0])[0] == "layer0.self_attn.out_proj.weight" and hidden(modules[3]) == []


class Reference:
    """torch.optim's optimisers of one module, with error feedback from the formula."""

    def __init__(self, module: LocalModule, config: Config, late: int) -> None:
        self.optim, self.late = config.optim, late if config.optim.error_feedback else 0
        self.module, names = module, hidden(module)
        self.matrices = [p for name, p in named(module).items() if name in names]
        self.flat = [nn.Parameter(p.detach().reshape(len(p), -1).clone()) for p in self.matrices]
        rest = [p for name, p in named(module).items() if name not in names]
        optim, self.optimisers = config.optim, list[torch.optim.Optimizer]()
        if optim.name == "sgd":
            self.optimisers = [torch.optim.SGD(rest, optim.lr, optim.momentum, 0, optim.weight_decay, optim.nesterov)]
        else:
            self.optimisers = [torch.optim.AdamW(rest, optim.lr, weight_decay=optim.weight_decay)] if rest else []
        if self.flat:
            self.optimisers.append(
                torch.optim.Muon(
                    self.flat, optim.lr, optim.weight_decay, optim.momentum, optim.nesterov,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        self.last: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor | None]) -> None:
        parameters = named(self.module)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        for flat, parameter in zip(self.flat, self.matrices, strict=True):
            flat.copy_(parameter.reshape(flat.shape))
            flat.grad = None if parameter.grad is None else parameter.grad.reshape(flat.shape)
        for optimiser in self.optimisers:
            optimiser.step()
        for flat, parameter in zip(self.flat, self.matrices, strict=True):
            parameter.copy_(flat.reshape(parameter.shape))
        for name, parameter in parameters.items():
            update = before[name] - parameter
            if self.late and name in self.last:
                parameter -= self.late * (update - self.last[name])
            self.last[name] = update
            parameter.grad = None


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ({"name": "muon", "lr": 0.01}, "exact"),
        ({"name": "muon", "lr": 0.01, "error_feedback": True}, "async"),
        ({"name": "adamw", "lr": 0.01, "error_feedback": True}, "async"),
        ({"name": "sgd", "lr": 0.05, "error_feedback": True}, "async"),
    ],
)
def test_weights_equal_torchs_optimisers_on_literal_gradients(optim: dict[str, Any], kind: str) -> None:
    exact = tiny_config("dgl", "plain", 2, MODULES, optim={**optim, "error_feedback": False})
    config = tiny_config("dgl", "plain", 2, MODULES, optim=optim, schedule={"kind": kind})
    stage, modules, _ = tiny_stage(config, torch.float64)
    _, others, _ = tiny_stage(exact, torch.float64)
    late = LATE if kind == "async" else (0,) * MODULES
    references = [Reference(module, config, lag) for module, lag in zip(others, late, strict=True)]

    stage.begin_epoch(0, 0)
    for step in range(STEPS):
        train_on(stage, 1, step, tiny_batch(step, dtype=torch.float64))
    stage.end_epoch(1, STEPS)

    kept: dict[tuple[int, int], dict[str, Tensor | None]] = {}
    for step in range(STEPS + max(late)):
        if step < STEPS:
            batch = tiny_batch(step, dtype=torch.float64)
            literal_backward(others, exact, batch.x, batch.labels, batch.image)
            for index, module in enumerate(others):
                kept[step, index] = {name: p.grad for name, p in named(module).items()}
                module.optimiser.clear()
        for index, reference in enumerate(references):
            if 0 <= step - late[index] < STEPS:
                reference.step(kept[step - late[index], index])
    for mine, theirs in zip(modules, others, strict=True):
        for name, expected in named(theirs).items():
            # Muon orthogonalises in bfloat16; AdamW scales a gradient up that is 0 but for rounding
            tolerance = {"muon": 1e-3, "adamw": 1e-6, "sgd": 1e-9}[optim["name"]]
            torch.testing.assert_close(named(mine)[name], expected, rtol=tolerance, atol=tolerance / 10)


def test_matrices_in_nhwc_are_updated_where_they_lie() -> None:
    """The columns come in another order; what is orthogonal stays so."""
    found = []
    for channels_last in (False, True):
        config = tiny_config("dgl", "plain", 1, 2, optim={"name": "muon", "lr": 0.01})
        _, (module, _), _ = tiny_stage(config)
        if channels_last:
            for block in module.blocks.values():
                block.to(memory_format=torch.channels_last)
        random = torch.Generator().manual_seed(1)
        for weight in module.optimiser.weights:
            weight.parameter.grad = torch.randn(weight.parameter.shape, generator=random)
        step_together([module.optimiser])
        found.append(torch.cat([w.parameter.detach().reshape(-1) for w in module.optimiser.weights]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("schedule", [{}, {"kind": "async", "delay": 0}, {"kind": "free"}])
def test_error_feedback_without_late_updates_is_refused(schedule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="optim.error_feedback = true with .*: no update is late by declaration"):
        tiny_config("dgl", optim={"error_feedback": True}, schedule=schedule)
