"""Tasks other than classification: a class for every pixel, the next token; and what a head sees when it asks."""

from __future__ import annotations

import math
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import own_tasks
import pytest
import torch
from helpers_spawn import run_ranks
from own_tasks import NEXT_TOKEN, SEGMENTATION, Segmentation
from tiny import gradients, tiny_config, train_on, without_updates
from torch import Tensor

from pipeline import ConfigError, LoaderData, Metric, Task, TensorSpec, evaluate, keys_markdown, read_metrics, train
from pipeline.base.config import MethodConfig
from pipeline.base.errors import CheckpointError
from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.methods import method_terms
from pipeline.models.backbones import blocks_of
from pipeline.models.heads import IMAGE, AuxiliaryHead, Given
from pipeline.models.patches import PatchedHead
from pipeline.plan.alone import random_batch
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage
from pipeline.store.checkpoint import open_verified, step_folders
from pipeline.store.resume import records_of

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


def own(task: Task) -> dict[str, Any]:
    """Network, loaders and task of one's own, for a short call."""
    data = LoaderData(own_tasks.Batches(task), own_tasks.Batches(task))
    return {"network": own_tasks.network(task), "data": data, "task": task, "quiet": True}


class Relabelled(Segmentation):
    """Of the same shapes and classes as a segmentation."""


def test_a_run_of_one_task_is_not_resumed_as_another(tmp_path: Path) -> None:
    settings = config("greedy", 1, train={"epochs": 1}, checkpoint={"every_epochs": 1})
    train(settings, **own(SEGMENTATION), run_dir=tmp_path)
    for task in (None, Relabelled(3, (3, 8, 8)), NEXT_TOKEN):
        name = type(task).__name__ if task is not None else "Classification"
        words = f"of the task Segmentation, this run of the task {name}; pass the task that was trained"
        with pytest.raises(CheckpointError, match=words) as refusal:
            train(settings, **{**own(SEGMENTATION), "task": task}, run_dir=tmp_path)
        assert "\n" not in str(refusal.value) and "step-00000006" in str(refusal.value)
    more = config("greedy", 1, train={"epochs": 2}, checkpoint={"every_epochs": 1})
    summary = train(more, **own(SEGMENTATION), run_dir=tmp_path)
    assert summary["epochs"] == 2 and summary["metric"]["name"] == "mean_iou"


@pytest.mark.parametrize(("better", "best"), [("higher", 2), ("lower", 5)])
def test_the_best_checkpoint_is_that_of_the_first_metric(
    tmp_path: Path, better: Literal["lower", "higher"], best: int
) -> None:
    """A metric that is no number, or infinite, is never the best, and spoils neither checkpoint nor run."""
    values = iter([0.5, 0.9, math.nan, None, 0.1, 0.3])

    def scripted(_statistics: Tensor, _rows: int) -> float:
        value = next(values)
        if value is None:
            raise OverflowError("math range error")
        return value

    class Scripted(Segmentation):
        metrics = (Metric("score", "score", own_tasks.confusion, scripted, better=better),)

    settings = tiny_config(
        "greedy", modules=1, train={"epochs": 6}, checkpoint={"every_epochs": 1, "keep": 1, "keep_best": True}
    )
    train(settings, **{**own(SEGMENTATION), "task": Scripted(3, (3, 8, 8))}, run_dir=tmp_path)
    kept = [open_verified(path) for path in step_folders(tmp_path / "checkpoints")]
    assert [checkpoint.epoch for checkpoint in kept] == [6, best]
    recorded = [record.measured for record in records_of(kept[0])]
    assert recorded[:2] + recorded[4:] == [0.5, 0.9, 0.1, 0.3] and math.isnan(recorded[2]) and recorded[3] == math.inf
    assert [line["test_metrics"]["score"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        *(0.5, 0.9, None, None, 0.1, 0.3)
    ]


def test_the_key_says_what_the_best_checkpoint_is_the_best_in() -> None:
    (row,) = (line for line in keys_markdown().splitlines() if "checkpoint.keep_best" in line)
    assert "error, or the first metric of your task" in row


@pytest.mark.parametrize(
    ("metrics", "classes", "words"),
    [
        ((), 3, "has no metrics; give at least one"),
        ((Segmentation.metrics[0], Segmentation.metrics[0]), 3, "has two metrics named 'mean_iou'"),
        ((replace(Segmentation.metrics[0], better="up"),), 3, "'mean_iou' is better = 'up'; say lower or higher"),
        (Segmentation.metrics, 0, r"classes = 0 and image_shape = \(3, 8, 8\); give one class or more"),
    ],
)
def test_a_task_that_cannot_work_is_refused_before_its_data_are_read(
    tmp_path: Path, metrics: tuple[Metric, ...], classes: int, words: str
) -> None:
    broken = type("Broken", (Segmentation,), {"metrics": metrics})(classes, (3, 8, 8))
    with pytest.raises(ConfigError, match=f"task Broken.*{words}") as refusal:
        train(config("greedy", 1), **{**own(SEGMENTATION), "task": broken}, run_dir=tmp_path / "run")
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TASKS)
def test_a_module_by_itself_is_measured_on_what_the_task_gives_it(name: str) -> None:
    """The raw input of a head that asks for it: pixels, or ids that the network's table has; targets of the task."""
    task = TASKS[name]
    plan = make_plan(config("greedy", 1), blocks_of(own_tasks.network(task)), task, 1, task.inputs)
    module = types.SimpleNamespace(plan=plan.modules[1], asks=frozenset({IMAGE}))
    batch = random_batch(plan, module, Numerics(torch.device("cpu"), torch.float32, False))
    assert batch.image is not None and batch.image.dtype == (torch.uint8 if name == "segmentation" else torch.int64)
    assert batch.image.shape == (8, *task.image_shape)
    assert (len(batch.image.unique()) > 50) == (name == "segmentation")
    assert batch.labels.dtype == task.target.dtype and batch.labels.shape == (8, *task.target.shape)
    if name == "next token":
        assert batch.image.max() < task.classes


def test_targets_of_floating_point_are_measured_as_such() -> None:
    class Depth(Segmentation):
        @property
        def target(self) -> TensorSpec:
            return TensorSpec(self.image_shape[1:], torch.float32)

    task = Depth(3, (3, 8, 8))
    plan = make_plan(config("greedy", 1), blocks_of(own_tasks.network(SEGMENTATION)), task, 1, task.inputs)
    module = types.SimpleNamespace(plan=plan.modules[0], asks=frozenset())
    batch = random_batch(plan, module, Numerics(torch.device("cpu"), torch.float32, False))
    assert batch.labels.dtype == torch.float32 and batch.labels.std() > 0.5 and batch.image is None


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
