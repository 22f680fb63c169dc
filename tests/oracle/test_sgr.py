"""SGR against its formula, each module's whole loss in one graph that is differentiated twice (float64, 1e-10)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import gradients, tiny_batch, tiny_config, tiny_plan, tiny_stage, train_on, without_updates
from tiny_strided import SCENES, dense_blocks, dense_config, images
from torch import Tensor, nn

from pipeline import ConfigError
from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.base.validation import validate, with_values
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.models.heads import Given
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

MODULES, WEIGHT = 5, 20.0


def reconciling(
    method: str = "dgl", variant: str = "plain", weight: float = WEIGHT, **sections: dict[str, Any]
) -> Config:
    config = tiny_config(method, variant, 1, MODULES, **sections)
    return validate(with_values(config, {"method.reconciliation": weight}))


def literal(modules: list[LocalModule], config: Config, x: Tensor, labels: Tensor, share: float) -> dict[str, float]:
    """Add the gradients of a micro-batch; R by module."""
    found, asked = {}, None
    weights = {"task": 1.0, "similarity": 0.99, "prediction": 0.01}
    for module in modules:
        x = x.detach().requires_grad_()
        h = x
        for block in module.blocks.values():
            h = block.train()(h)
        loss = nn.functional.cross_entropy(h, labels) if module is modules[-1] else torch.zeros((), dtype=x.dtype)
        for name, patched in module.levels["independent"].train().terms.items() if module is not modules[-1] else ():
            side = h.shape[-1] // config.patches.grid
            patches = [part for rows in h.split(side, dim=2) for part in rows.split(side, dim=3)]
            loss = loss + weights[name] * sum(patched.heads[0].loss(p, Given(labels)) for p in patches) / len(patches)
        slopes = torch.autograd.grad(loss, [h, x], create_graph=True)
        total = loss
        if asked is not None:
            rows = [len(x) * (v - u) for v, u in zip(slopes[1], asked, strict=True)]  # of a row's own loss
            distance = sum((row**2).sum() for row in rows) / len(x)
            found[f"{module.plan.index}"] = share * float(distance.detach())
            total = total + WEIGHT * distance
        (share * total).backward()
        x, asked = h, slopes[0].detach()
    return found


@pytest.mark.parametrize(
    ("method", "variant", "parts"), [("dgl", "plain", 1), ("dgl", "hpff", 2), ("predsim", "plain", 1)]
)
def test_gradients_are_those_of_the_formula(method: str, variant: str, parts: int) -> None:
    config = reconciling(method, variant, schedule={"micro_batches": parts})
    stage, modules, _ = tiny_stage(config, torch.float64)
    reference, batch = copy.deepcopy(modules), tiny_batch(dtype=torch.float64)
    train_on(without_updates(stage), 0, 0, batch)
    sums: dict[str, float] = {}
    for x, labels in zip(batch.x.chunk(parts), batch.labels.chunk(parts), strict=True):
        for name, value in literal(reference, config, x, labels, 1 / parts).items():
            sums[name] = sums.get(name, 0.0) + value

    mine, theirs = gradients(modules), gradients(reference)
    scale = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, expected in theirs.items():
        found = mine[name]
        assert found is not None and expected is not None, name
        # a bias before a BatchNorm has an exact gradient of 0: noise is judged on the scale of all gradients
        assert float((found - expected).norm()) <= 1e-10 * max(float(expected.norm()), 1e-2 * scale), name
    assert set(sums) == {"1", "2", "3", "4"}
    for index, value in sums.items():
        level = "final" if index == "4" else "independent"
        assert float(modules[int(index)].losses.open[0][f"{level}.reconciliation"]) == pytest.approx(value, rel=1e-10)


def test_the_loss_of_a_second_head_of_the_network_is_part_of_the_last_one() -> None:
    """As DeepLabV3's on stage 3, which stands in the last module here; 0.4 of its loss."""
    config = with_values(dense_config(), {"method.name": "dgl", "method.reconciliation": WEIGHT})
    plan = make_plan(with_values(config, {"model.modules": 2, "model.cuts": ("d",)}), dense_blocks(), SCENES, 1)
    numerics = Numerics(torch.device("cpu"), torch.float64, False)
    modules = build_modules(plan, 0, dense_blocks(), numerics, fresh=True)
    stage = without_updates(Stage(modules, plan.schedules[0], BatchInlet(), Edges()))
    for part in (modules[0].levels["independent"], modules[1].blocks["classifier"]):
        for layer in part.modules():
            if isinstance(layer, nn.Dropout | nn.Dropout2d):
                layer.p = 0.0
    first, last = copy.deepcopy(modules)
    image, labels = images(0, dense=True)
    x = image.double() / 127.5 - 1.0
    train_on(stage, 0, 0, Batch(x, labels, image))

    for block in first.blocks.values():
        x = block.train()(x)
    h = x.detach().requires_grad_()
    head = first.levels["independent"].train().terms["task"].heads[0]
    (asked,) = torch.autograd.grad(head.loss(h, Given(labels)), h)
    flow = h
    for block in last.blocks.values():
        flow = block.train()(flow)
    loss = SCENES.loss(flow["x"], labels) + 0.4 * SCENES.loss(flow["aux"], labels)
    (found,) = torch.autograd.grad(loss, h, create_graph=True)
    distance = len(h) * (found - asked).square().sum()
    (loss + WEIGHT * distance).backward()
    mine, theirs = gradients(modules[1:]), gradients([last])
    scale = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, expected in theirs.items():
        assert float((mine[name] - expected).norm()) <= 1e-10 * max(float(expected.norm()), 1e-2 * scale), name
    losses = modules[1].losses.open[0]
    assert set(losses) == {"final", "final.aux", "final.reconciliation"}
    assert float(losses["final.reconciliation"]) == pytest.approx(float(distance.detach()), rel=1e-10)


def test_the_gradient_travels_downstream_with_the_activation_and_nothing_upstream() -> None:
    plan = tiny_plan(reconciling(), ranks=2)
    fields = {field.name: field for field in plan.activation_spec(0, torch.float32, False).fields}
    assert fields["local_gradient"].shape_per_row == fields["activation"].shape_per_row
    assert not plan.gradient_order(1)


def test_it_changes_every_module_but_the_first() -> None:
    found = []
    for weight in (0.0, WEIGHT):
        stage, modules, _ = tiny_stage(reconciling(weight=weight, precision={"layers": "plain"}), torch.float64)
        train_on(without_updates(stage), 0, 0, tiny_batch(dtype=torch.float64))
        found.append([torch.cat([p.grad.flatten() for p in module.parameters]) for module in modules])
    changes = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    assert changes[0] < 1e-12 and all(change > 1e-3 for change in changes[1:]), changes


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"hierarchy": {"cascade_span": 2}}, "with hierarchy.cascade_span = 2: it is for modules that no gradient"),
        ({"hierarchy": {"independent_weight": 0.0}}, "with hierarchy.independent_weight = 0.0: "),
        ({"hierarchy": {"variant": "deepsup"}}, "with hierarchy.variant = 'deepsup': "),
        ({"method": "infopro"}, "with method.name = 'infopro', whose reconstruction cannot be"),
        ({"precision": {"compile": True}}, "with precision.compile = true: "),
        ({"precision": {"cuda_graphs": True}}, "with precision.cuda_graphs = true: "),
    ],
)
def test_what_it_cannot_go_with_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"method.reconciliation = 20 {words}"):
        reconciling(**sections)
