"""Tasks other than classification: a class for every pixel, the next token; and what a head sees when it asks."""

from __future__ import annotations

import json
import math
import shutil
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import own_tasks
import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers_spawn import run_ranks
from own_tasks import NEXT_TOKEN, SEGMENTATION, NextToken, Segmentation
from tiny import gradients, tiny_config, train_on, without_updates
from torch import Tensor, nn

from pipeline import (
    Classification,
    ConfigError,
    LoaderData,
    Metric,
    Task,
    TensorSpec,
    evaluate,
    export,
    keys_markdown,
    plot_curve,
    read_metrics,
    show_evaluation,
    train,
)
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


def mine(task: Task) -> dict[str, Any]:
    """Network, loaders and task of one's own, as train and evaluate take them."""
    data = LoaderData(own_tasks.Batches(task), own_tasks.Batches(task))
    return {"network": own_tasks.network(task), "data": data, "task": task}


def trained(rank: int, name: str, folder: str) -> dict[str, Any]:
    settings = config("greedy", 2, train={"epochs": 4}, checkpoint={"every_epochs": 1})
    return train(settings, **mine(TASKS[name]), run_dir=Path(folder), quiet=True)


@pytest.fixture(scope="module", params=TASKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs of a task on two ranks."""
    folder = tmp_path_factory.mktemp("run") / "two"
    results = run_ranks(trained, 2, name, str(folder))
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    return folder


def test_a_task_of_ones_own_learns_alike_on_one_and_two_ranks(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = trained(0, name, str(tmp_path / "one"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights_sha256"] == alone["weights_sha256"] and summary["test_metrics"] == alone["test_metrics"]
    metric = TASKS[name].metrics[0]
    epochs = read_metrics(tmp_path / "one" / "metrics.jsonl")
    first, last = epochs[0], epochs[-1]
    assert metric.cost(last["test_metrics"][metric.name]) < metric.cost(first["test_metrics"][metric.name])
    assert last["train_loss"] < first["train_loss"] and last["test_error_pct"] is None
    heads = {name for module in last["modules"] for name in module["head_metrics"]}
    assert heads == {f"{level}.{metric.name}" for level in ("independent", "cascade", "final")}
    printed = capsys.readouterr().out
    value = metric.form.text(last["test_metrics"][metric.name])
    assert f"test           {metric.title} {value} ({metric.better} is better)" in printed
    assert last["metric"] == asdict(metric.form) == summary["metric"] and last["test_text"] == f"{metric.title} {value}"


def test_every_exit_of_a_task_is_evaluated_by_its_metrics(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = TASKS[name]
    (metric,) = task.metrics
    evaluation = evaluate(run, **mine(task))
    last = read_metrics(run / "metrics.jsonl")[-1]
    found = {f"{row.module}.{row.exit}.{metric.name}": row.metrics[metric.name] for row in evaluation.rows}
    reported = [(module["index"], module["head_metrics"]) for module in last["modules"]]
    assert found == {f"{index}.{key}": value for index, values in reported for key, value in values.items()}
    assert {row.exit for row in evaluation.rows} == {"independent", "cascade", "final"}
    assert evaluation.test_metrics == last["test_metrics"] and evaluation.test_error_pct is None
    assert (evaluation.images, evaluation.data, evaluation.epoch) == (48, "loader", 4)
    evaluation.write_json(tmp_path / "exits.json")
    document = json.loads((tmp_path / "exits.json").read_text())
    assert document["task"] == type(task).__name__ and document["metrics"] == [asdict(metric.form)]
    assert document["test_metrics"] == last["test_metrics"] and "test_error_pct" not in document
    assert [row["metrics"] for row in document["rows"]] == [row.metrics for row in evaluation.rows]
    capsys.readouterr()
    show_evaluation(evaluation)
    printed = capsys.readouterr().out
    assert f"test {metric.title} {'↑' if metric.better == 'higher' else '↓'}" in printed and "error" not in printed
    assert all(metric.form.number(value) in printed.split() for value in found.values())
    said = " ".join(printed.split())
    assert f"48 test rows (loader); {metric.title}: {metric.better} is better" in said
    assert f"no exits together: that needs class probabilities, which {type(task).__name__} has none of" in said


def test_an_evaluation_needs_the_task_that_was_trained(name: str, run: Path) -> None:
    task = TASKS[name]
    trained_as, other = type(task).__name__, NEXT_TOKEN if task is SEGMENTATION else SEGMENTATION
    for given, words in (
        (None, r"which no name can rebuild; call pipeline\.evaluate\(\.\.\., task=\.\.\.\)"),
        (other, f"the one given is {type(other).__name__}; pass the task that was trained"),
        (type(task)(task.classes + 1, task.image_shape), f"{task.classes} classes .* given has {task.classes + 1} and"),
    ):
        with pytest.raises(CheckpointError, match=f"is of (the task )?{trained_as}.*{words}") as refusal:
            evaluate(run, **{**mine(task), "task": given})
        assert "\n" not in str(refusal.value)


def resumed(rank: int, name: str, folder: str) -> dict[str, Any]:
    task = TASKS[name]
    more = config("greedy", 2, train={"epochs": 5}, checkpoint={"every_epochs": 1})
    return train(more, **mine(task), run_dir=Path(folder), quiet=True)


def test_a_run_of_a_task_is_exported_resumed_and_drawn(name: str, run: Path, tmp_path: Path) -> None:
    task, (metric,) = TASKS[name], TASKS[name].metrics
    network = own_tasks.network(task)
    export(run, tmp_path / "model.pt")
    network.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    counted = [metric.count(network(x).detach(), target) for x, target in own_tasks.Batches(task)]
    value = metric.of(torch.stack(counted).sum(dim=0), 48)
    first = read_metrics(run / "metrics.jsonl")
    assert value == pytest.approx(first[-1]["test_metrics"][metric.name], rel=1e-4)

    shutil.copytree(run, tmp_path / "run")
    results = run_ranks(resumed, 2, name, str(tmp_path / "run"))
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    epochs = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [epoch["test_metrics"] for epoch in epochs[:4]] == [epoch["test_metrics"] for epoch in first]
    assert len(epochs) == 5 and {epoch["metric"]["name"] for epoch in epochs} == {metric.name}

    pytest.importorskip("matplotlib")
    plot_curve(tmp_path / "run" / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


class TopTwo(Classification):
    """Images, of which one of two guesses may be right."""

    metrics = (
        Metric("top2_pct", "top-2", lambda scores, target: (scores.topk(2, dim=1).indices == target[:, None]).sum(),
               lambda right, rows: 100.0 * int(right) / rows, "%", better="higher"),
        Metric("nll", "NLL", lambda scores, target: F.cross_entropy(scores, target, reduction="sum").double(),
               lambda total, rows: float(total) / rows, digits=3),
    )


def test_a_classification_of_ones_own_has_its_metrics_for_exits_together_too(tmp_path: Path) -> None:
    """The ensemble is told to the metrics as class scores, so that those that take probabilities of them are right."""
    settings = tiny_config("dgl", "hpff", 2, 3, train={"epochs": 1}, checkpoint={"every_epochs": 1})
    task, data = TopTwo(tiny.CLASSES, tiny.IMAGE), LoaderData(tiny.Batches(), tiny.Batches())
    train(settings, network=tiny.network(), data=data, task=task, run_dir=tmp_path, quiet=True)
    evaluation = evaluate(tmp_path, network=tiny.network(), data=data, task=task)
    rows = {(row.module, row.exit): row.metrics for row in evaluation.rows}
    assert rows[2, "final"] == json.loads((tmp_path / "summary.json").read_text())["test_metrics"]
    exits = [key for key in rows if key[1] not in ("prefix", "all")]
    assert len(exits) > 2 and {(1, "prefix"), (2, "prefix"), (2, "all")} <= rows.keys()
    nll = [rows[key]["nll"] for key in exits]
    assert rows[2, "all"]["nll"] < sum(nll) / len(nll)  # of a mean of probabilities, by Jensen's inequality
    assert 0 <= rows[2, "all"]["top2_pct"] <= 100 and rows[2, "all"].keys() == {"top2_pct", "nll"}


def test_a_task_may_vary_in_length(tmp_path: Path) -> None:
    """If it says so; a max_length of the loaders alone is refused, since targets vary as well."""

    class Varying(NextToken):
        @property
        def target(self) -> TensorSpec:
            return TensorSpec(self.image_shape, torch.int64, varies=(0,))

    class Shorter(own_tasks.Batches):
        def __iter__(self) -> Any:
            for number, (ids, target) in enumerate(super().__iter__()):
                yield ids[:, : 6 - number % 3], target[:, : 6 - number % 3]

    data = LoaderData(Shorter(NEXT_TOKEN), Shorter(NEXT_TOKEN), max_length=6)
    settings = config("greedy", 2, train={"epochs": 1}, checkpoint={"every_epochs": 1})
    with pytest.raises(ConfigError, match="max_length = 6, but the inputs of your task have one length; say in its"):
        train(settings, **{**mine(NEXT_TOKEN), "data": data}, run_dir=tmp_path / "refused")
    given = {**mine(NEXT_TOKEN), "data": data, "task": Varying(11, (6,))}
    summary = train(settings, **given, run_dir=tmp_path / "run", quiet=True)
    assert evaluate(tmp_path / "run", **given).test_metrics == summary["test_metrics"]


class Relabelled(Segmentation):
    """Of the same shapes and classes as a segmentation."""


def test_a_run_of_one_task_is_not_resumed_as_another(tmp_path: Path) -> None:
    settings = config("greedy", 1, train={"epochs": 1}, checkpoint={"every_epochs": 1})
    train(settings, **mine(SEGMENTATION), run_dir=tmp_path, quiet=True)
    for task in (None, Relabelled(3, (3, 8, 8)), NEXT_TOKEN):
        name = type(task).__name__ if task is not None else "Classification"
        words = f"of the task Segmentation, this run of the task {name}; pass the task that was trained"
        with pytest.raises(CheckpointError, match=words) as refusal:
            train(settings, **{**mine(SEGMENTATION), "task": task}, run_dir=tmp_path)
        assert "\n" not in str(refusal.value) and "step-00000006" in str(refusal.value)
    more = config("greedy", 1, train={"epochs": 2}, checkpoint={"every_epochs": 1})
    summary = train(more, **mine(SEGMENTATION), run_dir=tmp_path, quiet=True)
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
    train(settings, **{**mine(SEGMENTATION), "task": Scripted(3, (3, 8, 8))}, run_dir=tmp_path, quiet=True)
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
        ((replace(Segmentation.metrics[0], count=lambda output, target: output - target),), 3,
         r"counting the metric 'mean_iou' fails on an output of shape \(2, 3, 8, 8\) and a target of"),
        (Segmentation.metrics, 0, r"classes = 0 and image_shape = \(3, 8, 8\); give one class or more"),
    ],
)
def test_a_task_that_cannot_work_is_refused_before_its_data_are_read(
    tmp_path: Path, metrics: tuple[Metric, ...], classes: int, words: str
) -> None:
    broken = type("Broken", (Segmentation,), {"metrics": metrics})(classes, (3, 8, 8))
    with pytest.raises(ConfigError, match=f"task Broken.*{words}") as refusal:
        train(config("greedy", 1), **{**mine(SEGMENTATION), "task": broken}, run_dir=tmp_path / "run")
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_a_loss_that_is_no_scalar_and_a_class_in_place_of_a_task_are_refused(tmp_path: Path) -> None:
    class Each(Segmentation):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target, reduction="none")

    for task, words in (
        (Each(3, (3, 8, 8)), r"task Each: the loss is a tensor of shape \(2, 8, 8\); give a scalar tensor"),
        (Segmentation, "the task is Segmentation; pass an instance of a subclass of pipeline.Task"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(config("greedy", 1), **{**mine(SEGMENTATION), "task": task}, run_dir=tmp_path)


def test_a_network_in_place_of_a_head_is_refused_by_name(tmp_path: Path) -> None:
    class Bare(Segmentation):
        def head(self, shape: tuple[int, ...], pooled: Any = None) -> Any:
            return nn.Conv2d(shape[0], self.classes, 1)

    with pytest.raises(ConfigError, match="local loss 'task' is a Conv2d; give an AuxiliaryHead, such as TaskHead"):
        train(config("greedy", 1), **{**mine(SEGMENTATION), "task": Bare(3, (3, 8, 8))}, run_dir=tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_a_module_by_itself_is_measured_on_what_the_task_gives_it(name: str) -> None:
    """The raw input of a head that asks for it: pixels, or ids that the network's table has; targets of the task."""
    task = TASKS[name]
    plan = make_plan(config("greedy", 1), blocks_of(own_tasks.network(task)), task, 1, task.inputs)
    module = types.SimpleNamespace(plan=plan.modules[1], asks=frozenset({IMAGE}))
    batch = random_batch(plan, [module], Numerics(torch.device("cpu"), torch.float32, False))
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
    batch = random_batch(plan, [module], Numerics(torch.device("cpu"), torch.float32, False))
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
