"""CUDA graphs of the actions of local modules, on a device that is none (``helpers_device``): a graph there does the
recorded operations again on the memory that they had, with the numbers that they had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers_device
import pytest
import torch
from helpers_device import CUDA, Device
from tiny import CLASSES, IMAGE, tiny_batch, tiny_blocks, tiny_config, tiny_plan, train_on

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.base.validation import validate, with_values
from pipeline.edges.connect import Edges
from pipeline.local import graphs
from pipeline.local.module_state import module_state
from pipeline.local.task import Classification
from pipeline.local.to_host import arrival
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

STEPS, LATE_STEPS = 4, 6
"""Of a late module every second batch has the same stash."""
State = dict[str, torch.Tensor]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    with helpers_device.pretended() as device:
        yield device


def stage_on(method: str, variant: str, graphed: bool, dtype: torch.dtype = torch.float32, **sections: Any) -> Stage:
    """Three modules of the tiny network, with a cascade of two unless ``span`` says otherwise."""
    sections = dict(sections)
    values = {"precision.cuda_graphs": graphed, **sections.pop("values", {})}
    config = tiny_config(method, variant, sections.pop("span", 2), 3, **sections)
    plan = tiny_plan(validate(with_values(config, values)))
    modules = build_modules(plan, 0, tiny_blocks(), Numerics(CUDA, dtype, True), fresh=True)
    return Stage(modules, plan.schedules[0], BatchInlet(micro_batches=plan.config.schedule.micro_batches), Edges())


def train_step(stage: Stage, step: int, rows: int = 8) -> None:
    batch, dtype = tiny_batch(step, rows), stage.modules[0].numerics.dtype
    assert isinstance(batch.x, torch.Tensor) and batch.image is not None
    train_on(stage, 1, step, Batch(batch.x.to(CUDA, dtype), batch.labels.to(CUDA), batch.image.to(CUDA)))


def train(stage: Stage, rows: dict[int, int] | None = None) -> State:
    """Weights, statistics, losses and optimiser after some steps, of which those in ``rows`` have other batches."""
    steps = LATE_STEPS if any(action.lag for action in stage.schedule) else STEPS
    stage.begin_epoch(0, 0)
    for step in range(steps):
        train_step(stage, step, (rows or {}).get(step, 8))
    stage.end_epoch(1, steps)
    state = {f"{i}.{n}": value for i, module in stage.modules.items() for n, value in module_state(module).items()}
    arrival(CUDA)()
    return state


def differing(one: State, other: State) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name].cpu(), other[name].cpu())]


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("dgl", "plain", {"train": {"nonfinite": "skip"}, "optim": {"clip_norm": 1.0}}),
    ("predsim", "plain", {"optim": {"name": "adamw"}}),
    ("infopro", "hpff", {"schedule": {"micro_batches": 2}}),
    ("infopro", "hpff", {"hierarchy": {"levels": "together"}}),
    ("dgl", "hpff", {"dtype": torch.bfloat16}),
    ("dgl", "hpff", {"schedule": {"kind": "async", "micro_batches": 2}, "values": {"method.front": "man++"}}),
    ("dgl", "plain", {"span": 1, "schedule": {"kind": "free"}}),
    ("dgl", "plain", {"span": 3, "hierarchy": {"variant": "deepsup"}, "train": {"accumulate": 2, "ema": 0.9}}),
]


@pytest.mark.parametrize(("method", "variant", "sections"), CASES)
def test_replays_give_the_bits_of_the_eager_run(
    device: Device, capsys: pytest.CaptureFixture[str], method: str, variant: str, sections: dict[str, Any]
) -> None:
    """Weights, statistics, losses and the optimiser; nothing falls back; every use of a buffer is ordered."""
    eager = train(stage_on(method, variant, False, **sections))
    assert device.replays == 0
    graphed = train(stage_on(method, variant, True, **sections))
    assert differing(eager, graphed) == []
    assert device.replays > 2 * STEPS and capsys.readouterr().err == ""
    assert device.races == []


def test_every_action_is_one_launch_and_its_buffers_stay_where_they_are(device: Device) -> None:
    stage = stage_on("dgl", "plain", True)
    counted = []
    forward = stage.modules[1].forward
    outputs = []

    def watched(key: Any, batch: Any) -> Any:
        found = forward(key, batch)
        outputs.append((found["x"].data_ptr(), stage.modules[1].in_flight[key].batch.inputs["x"].data_ptr()))
        return found

    stage.modules[1].forward = watched  # type: ignore[method-assign]
    for step in range(4):
        train_step(stage, step)
        counted.append(device.replays)
    actions = len([action for action in stage.schedule if action.kind.value != "U"])
    assert counted == [0, actions, 2 * actions, 3 * actions]  # warm-up; captured and launched; launched
    assert len(set(outputs[1:])) == 1


def test_dropout_draws_what_it_draws_without_a_graph(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are seeded before each launch."""
    relu = torch.nn.ReLU.forward
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda module, x: torch.dropout(relu(module, x), 0.5, True))
    eager, graphed = (train(stage_on("dgl", "plain", which)) for which in (False, True))
    assert differing(eager, graphed) == [] and device.replays > 0


def test_a_short_batch_goes_without_graphs_and_says_so_once(
    device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = train(stage_on("infopro", "hpff", False, schedule={"micro_batches": 2}), {2: 7})
    graphed = train(stage_on("infopro", "hpff", True, schedule={"micro_batches": 2}), {2: 7})
    assert differing(eager, graphed) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "local module 0 (stem-a) works without CUDA graphs on batches of other shapes" in line
    assert "(7 rows in a batch, not 8)" in line


def test_gradients_that_are_there_already_are_added_to(device: Device) -> None:
    """As of several batches before one update."""
    found = []
    for graphed in (False, True):
        stage = stage_on("dgl", "plain", graphed)
        updating, gathering = stage.schedule, tuple(a for a in stage.schedule if a.kind.value != "U")
        for step in range(5):
            stage.schedule = gathering if step == 2 else updating
            train_step(stage, step)
        weights = [p for module in stage.modules.values() for p in module.optimiser.weights]
        found.append({str(number): weight.parameter.detach() for number, weight in enumerate(weights)})
    assert differing(*found) == [] and device.replays > 0



@pytest.mark.parametrize(("where", "kind"), [("forward", "exact"), ("heads", "async"), ("backward", "async")])
def test_a_module_that_cannot_be_captured_goes_on_without(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str, kind: str
) -> None:
    """It reads a number from the device, which no graph can; so do not those that can."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            if where != "backward":
                x.detach().sum().item()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            if where == "backward":
                gradient.sum().item()
            return gradient.clone()

    def run(graphed: bool) -> State:
        stage = stage_on("dgl", "plain", graphed, schedule={"kind": kind})
        reading = stage.modules[1].levels["cascade"] if where == "heads" else stage.modules[1].blocks["c"]
        for layer in reading.modules():
            if isinstance(layer, torch.nn.ReLU):
                layer.register_forward_hook(lambda module, inputs, output: Reads.apply(output))
                break
        else:
            reading.register_forward_hook(lambda module, inputs, output: Reads.apply(output))
        return train(stage)

    assert differing(run(False), run(True)) == [] and device.replays > 0
    name = {"forward": "forward", "heads": "cascade", "backward": "relay of 0"}[where]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"local module 1 (b-c) works without CUDA graphs: its {name} cannot be captured (" in line


def test_a_backward_that_cannot_be_captured_is_done_from_a_new_forward(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has freed meanwhile is made again; running statistics move once."""
    eager = train(stage_on("dgl", "plain", False, span=1))
    graph = graphs.Capture.graph
    failed = []

    def fails(self: graphs.Capture, pool: Any, work: Any) -> Any:
        def all_of_it() -> Any:
            found = work()
            if not failed and found is None:
                failed.append(True)
                raise RuntimeError("in the end")
            return found

        return graph(self, pool, all_of_it)

    monkeypatch.setattr(graphs.Capture, "graph", fails)
    assert differing(eager, train(stage_on("dgl", "plain", True, span=1))) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("works without CUDA graphs: its backward cannot be captured (in the end)")


def test_a_head_that_looks_at_the_step_has_no_graph(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.models.heads import TaskHead

    loss = TaskHead.loss_of_means

    def stepping(head: Any, means: Any, given: Any) -> Any:
        return loss(head, means, given) * (1 + given.step % 2)

    monkeypatch.setattr(TaskHead, "loss_of_means", stepping)
    eager, graphed = (train(stage_on("dgl", "plain", which)) for which in (False, True))
    assert differing(eager, graphed) == []
    assert "(a head looks at the step of its batch)" in capsys.readouterr().err


def test_levels_that_get_other_weights_are_captured_anew(device: Device) -> None:
    """A graph would keep those of the epoch before."""
    found = []
    for graphed in (False, True):
        stage = stage_on("dgl", "plain", graphed, hierarchy={"cascade_weight": [1.0, 0.25]})
        for step in range(6):
            for module in stage.modules.values():
                module.set_level_weights(1 + step // 3, 2)
            train_step(stage, step)
        weights = [p for module in stage.modules.values() for p in module.optimiser.weights]
        found.append({str(number): weight.parameter.detach() for number, weight in enumerate(weights)})
    assert differing(*found) == []


def test_heads_whose_batch_norm_sends_messages_are_not_captured(
    device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph would hold the sums over the replicas, which the other ranks do not launch with it."""
    sections = {"parallel": {"replicas": 2, "sync_batch_norm": True}, "precision": {"cuda_graphs": True},
                "runtime": {"device": "cuda"}}  # fmt: skip
    blocks = tiny_blocks()
    for block in blocks.values():
        for layer in list(block.modules()):
            for name, inner in list(layer.named_children()):
                if isinstance(inner, torch.nn.BatchNorm2d):
                    setattr(layer, name, torch.nn.Identity())
    config = tiny_config("dgl-cnn", "plain", 1, 3, **sections)
    plan = make_plan(config, blocks, Classification(CLASSES, IMAGE), 1)
    group: Any = object()
    build_modules(plan, 0, blocks, Numerics(CUDA, torch.float32, True), fresh=False, twins=group)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the last module has no head
    why = "works without CUDA graphs: its BatchNorm sends messages to other replicas"
    assert all(line.endswith(why) for line in lines)


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="precision.cuda_graphs = true, but this run computes on the CPU; use a GPU"):
        graphs.refuse_without_gpu(torch.device("cpu"))
