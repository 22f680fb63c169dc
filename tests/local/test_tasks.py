"""Tasks other than classification: a class for every pixel, the next token; and what a head sees when it asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import own_tasks
import pytest
import torch
from helpers_spawn import run_ranks
from own_tasks import NEXT_TOKEN, SEGMENTATION
from tiny import gradients, tiny_config, train_on, without_updates
from torch import Tensor

from pipeline import ConfigError, LoaderData, Task, evaluate, read_metrics, train
from pipeline.base.config import MethodConfig
from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.methods import method_terms
from pipeline.models.backbones import blocks_of
from pipeline.models.heads import AuxiliaryHead, Given
from pipeline.models.patches import PatchedHead
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

TASKS = {"segmentation": SEGMENTATION, "next token": NEXT_TOKEN}


def config(method: str, span: int, **sections: dict[str, Any]) -> Any:
    optim = {"lr": 0.3, "weight_decay": 0.0}
    return tiny_config(method, "plain", span, 3, model={"modules": 3}, optim=optim, **sections)


def trained(rank: int, name: str, folder: str) -> dict[str, Any]:
    task = TASKS[name]
    return train(
        config("greedy", 2, train={"epochs": 4}, checkpoint={"every_epochs": 1}),
        network=own_tasks.network(task),
        data=LoaderData(own_tasks.Batches(task), own_tasks.Batches(task)),
        task=task,
        run_dir=Path(folder),
        quiet=True,
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_ones_own_learns_alike_on_one_and_two_ranks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = trained(0, name, str(tmp_path / "one"))
    results = run_ranks(trained, 2, name, str(tmp_path / "two"))
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value["weights_sha256"] == alone["weights_sha256"]
    metric = TASKS[name].metrics[0]
    epochs = read_metrics(tmp_path / "one" / "metrics.jsonl")
    first, last = epochs[0], epochs[-1]
    assert metric.cost(last["test_metrics"][metric.name]) < metric.cost(first["test_metrics"][metric.name])
    assert last["train_loss"] < first["train_loss"] and last["test_error_pct"] is None
    heads = {name for module in last["modules"] for name in module["head_metrics"]}
    assert heads == {f"{level}.{metric.name}" for level in ("independent", "cascade", "final")}
    assert metric.title in capsys.readouterr().out
    with pytest.raises(Exception, match=f"of the task {type(TASKS[name]).__name__}"):
        evaluate(tmp_path / "one", network=own_tasks.network(TASKS[name]))


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_gradients_are_those_of_plain_autograd(name: str, span: int) -> None:
    """Module m: its own head; with a cascade of two also the heads of module m + 1 through it."""
    task, settings = TASKS[name], config("greedy", span)
    blocks = blocks_of(own_tasks.network(task))
    plan = make_plan(settings, blocks, task, 1, task.inputs)
    modules = build_modules(plan, 0, blocks, Numerics(torch.device("cpu"), torch.float64, False), fresh=False)
    x, target = own_tasks.batch(task, 0)
    x = x.double() if x.is_floating_point() else x
    stage = without_updates(Stage(modules, plan.schedules[0], BatchInlet(), Edges()))
    train_on(stage, 1, 0, Batch(x, target, None))
    found = gradients(modules)

    for module in modules:
        for part in (*module.blocks.values(), *module.levels.values()):
            part.zero_grad()

    def run(index: int, h: Tensor) -> Tensor:
        for block in modules[index].blocks.values():
            h = block(h)
        return h

    inputs = [x]
    for index in range(2):
        inputs.append(run(index, inputs[-1]).detach())
    weights = settings.hierarchy
    for index in range(2):
        head = modules[index].levels["independent"].terms["task"].heads[0]
        (weights.independent_weight * head.loss(run(index, inputs[index]), Given(target))).backward()
    if span == 2:
        head = modules[1].levels["cascade"].terms["task"].heads[0]
        (weights.cascade_weight * head.loss(run(1, run(0, inputs[0])), Given(target))).backward()
    task.loss(run(2, inputs[2]), target).backward()
    for key, gradient in gradients(modules).items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize(("method", "task"), [("predsim", SEGMENTATION), ("infopro-contrast", SEGMENTATION),
                                              ("infopro", NEXT_TOKEN)])
def test_a_method_whose_heads_a_task_lacks_is_refused_in_one_line(method: str, task: Task) -> None:
    with pytest.raises(ConfigError, match=f"method.name = '{method}'.*{type(task).__name__}") as refusal:
        method_terms(MethodConfig(name=method), task, 0.0)
    assert "\n" not in str(refusal.value)


class Curious(AuxiliaryHead):
    """Keeps what it is given."""

    asks = frozenset({"image", "inputs"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Given] = []

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        self.seen.append(given)
        return feature.square().mean()


@pytest.mark.parametrize("shape", [(4, 4), (4,)])
def test_all_that_a_head_is_given_is_cut_like_its_patch(shape: tuple[int, ...]) -> None:
    """Maps in quarters; sequences in halves."""
    whole = torch.arange(2 * 16 if len(shape) == 2 else 2 * 4).view(2, *shape)
    feature = whole[:, None].double() if len(shape) == 2 else whole[..., None].double()
    patched = PatchedHead(Curious, 2)
    patched.backward(feature, Given(whole, feature, {"x": feature, "row": torch.arange(2)}, 5), 1.0)
    seen = patched.heads[0].seen
    assert len(seen) == (4 if len(shape) == 2 else 2) and {given.step for given in seen} == {5}
    for given in seen:
        expected = given.target[:, None] if len(shape) == 2 else given.target[..., None]
        assert torch.equal(given.image, expected.double()) and torch.equal(given.inputs["x"], expected.double())
        assert torch.equal(given.inputs["row"], torch.arange(2))
    assert sorted(int(i) for given in seen for i in given.target.flatten()) == whole.flatten().tolist()
