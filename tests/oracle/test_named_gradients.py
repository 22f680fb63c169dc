"""Gradients of a cascade flow back through every named tensor: float64, against the literal definition."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from oracle.test_gradients import assert_same
from tiny import gradients, train_on, without_updates
from tiny_sequences import CLASSES, LONGEST, batches, blocks, configuration, registered

from pipeline.base.config import METHODS
from pipeline.base.flow import Flow, Tensors, bare, named
from pipeline.base.numerics import Numerics
from pipeline.data.loader_source import input_specs
from pipeline.edges.connect import Edges
from pipeline.local import methods
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

MODULES = 5


@pytest.fixture(autouse=True)
def method() -> Iterator[None]:
    registered()
    yield
    METHODS.remove("pooled")
    methods._REGISTERED.pop("pooled")


def literal(modules: list[LocalModule], span: int, inputs: Tensors, labels: torch.Tensor) -> None:
    """Every path of every loss is evaluated anew; what enters a path is detached, by name."""

    def through(module: LocalModule, flow: Flow) -> Flow:
        for block in module.blocks.values():
            flow = block(flow)
        return flow

    def cut(flow: Flow) -> Flow:
        return bare({name: x.detach() for name, x in named(flow).items()})

    entrances = [bare(inputs)]
    for module in modules:
        entrances.append(cut(through(module, entrances[-1])))

    def chain(low: int, high: int) -> torch.Tensor:
        flow = entrances[low]
        for module in modules[low : high + 1]:
            flow = through(module, flow)
        return named(flow)["x"]

    def loss(m: int, level: str, low: int) -> torch.Tensor:
        head = modules[m].levels[level].terms["task"].heads[0]
        return F.cross_entropy(head.logits(chain(low, m)), labels)

    for m in range(MODULES - 1):
        (0.5 * loss(m, "independent", m)).backward()
        if m > 0 and span > 1:
            (0.25 * loss(m, "cascade", max(0, m - span + 1))).backward()
    last = MODULES - 1
    F.cross_entropy(chain(max(0, last - span + 1), last), labels).backward()


@pytest.mark.parametrize("span", [1, 2, 3, MODULES])
def test_gradients_flow_back_through_the_skip_connection_too(span: int) -> None:
    weights = {"independent_weight": 0.5, "cascade_weight": 0.25}
    config = configuration(span, hierarchy=weights, precision={"compute": "fp64"})
    inputs, labels = batches()[0]
    network = blocks()
    task = Classification(CLASSES, (LONGEST,))
    plan = make_plan(config, dict(network.named_children()), task, 1, input_specs(inputs, LONGEST))
    assert [sorted(boundary) for boundary in plan.boundaries] == [["mask", "x"], *[["mask", "skip", "x"]] * 3, ["x"]]
    numerics = Numerics(torch.device("cpu"), torch.float64, False)
    modules = build_modules(plan, 0, dict(network.named_children()), numerics, fresh=False)
    reference = copy.deepcopy(modules)
    stage = Stage(modules, plan.schedules[0], BatchInlet(), Edges())

    train_on(without_updates(stage), 0, 0, Batch(inputs, labels, None))
    literal(reference, span, inputs, labels)

    assert_same(gradients(modules), gradients(reference))
