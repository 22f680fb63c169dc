"""A loss or gradient that is not finite: the module stops before its update, or leaves that update out and goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from rich.console import Console
from tiny import Batches, network, tiny_batch, tiny_config, tiny_stage, train_on
from torch import Tensor

from pipeline import LoaderData, read_metrics, train
from pipeline.base.errors import NonFiniteError
from pipeline.local.guard import Reading
from pipeline.local.local_module import LocalModule
from pipeline.local.module_state import module_state, restore_module
from pipeline.local.updates import Due, update_together
from pipeline.report.view import PlainView
from pipeline.stage.inlet import Batch
from pipeline.stage.schedule import Action, Kind
from pipeline.stage.stage import Stage

pytestmark = pytest.mark.long

STEPS = 6
BAD = 2
SCHEDULES: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, two micro-batches": {"micro_batches": 2},
    "async": {"kind": "async"},
    "async, two late, two micro-batches": {"kind": "async", "delay": 2, "micro_batches": 2},
}


def batch_of(step: int) -> Batch:
    """Batch BAD has one value that is NaN."""
    batch = tiny_batch(step)
    if step == BAD:
        batch.x[3, 1, 2, 4] = float("nan")
    return batch


def run(stage: Stage, steps: list[int], make: Callable[[int], Batch] = batch_of) -> None:
    stage.begin_epoch(0, 0)
    for step in steps:
        train_on(stage, 1, step, make(step))
    stage.end_epoch(1, STEPS)


def tensors(module: LocalModule) -> list[Tensor]:
    """Weights and running statistics of blocks and heads, without counters."""
    parts = (*module.blocks.values(), *module.levels.values())
    return [t.detach().clone() for p in parts for t in p.state_dict().values() if t.is_floating_point()]


def weights(module: LocalModule) -> list[Tensor]:
    parts = (*module.blocks.values(), *module.levels.values())
    return [p.detach().clone() for part in parts for p in part.parameters()]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def note_updates(modules: list[LocalModule], monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, list[Tensor]]]:
    """By module: the step of the last update that was done, and the weights after it."""
    done = {module.plan.index: (-1, weights(module)) for module in modules}

    def noted(due: Due) -> None:
        update_together(due)
        done.update({module.plan.index: (step, weights(module)) for module, step in due})

    monkeypatch.setattr("pipeline.stage.stage.update_together", noted)
    return done


# --- stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_batch_with_nan_stops_the_run_before_any_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2, schedule=SCHEDULES[name]))
    done = note_updates(modules, monkeypatch)
    with pytest.raises(NonFiniteError) as caught:
        run(stage, list(range(STEPS)))
    message = str(caught.value)
    assert "module 0 (stem" in message and f"batch of step {BAD}" in message
    assert "independent.task = nan" in message and "train.nonfinite=skip" in message
    assert "\n" not in message
    assert caught.value.precedence == (BAD, 0, 0)
    assert max(step for step, _ in done.values()) == BAD - 1
    for module in modules:
        assert same(weights(module), done[module.plan.index][1])


def test_an_infinite_weight_is_blamed_on_its_own_module_and_not_on_one_that_its_gradient_reached() -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2))
    train_on(stage, 1, 0, tiny_batch(0))
    with torch.no_grad():
        modules[2].parameters[0].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"module 2 \(b\), batch of step 1: loss not finite: cascade.task = nan"):
        train_on(stage, 1, 1, tiny_batch(1))


def spoil(module: LocalModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives for batch BAD from the next module is infinite."""
    receive = module.receive

    def spoiled(key: tuple[int, int], message_key: int, gradients: dict[str, Tensor]) -> None:
        if key[0] == BAD:
            gradients = {name: gradient.clone().fill_(float("inf")) for name, gradient in gradients.items()}
        receive(key, message_key, gradients)

    monkeypatch.setattr(module, "receive", spoiled)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_infinite_gradient_from_the_next_module_stops_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2, schedule=SCHEDULES[name]))
    spoil(modules[0], monkeypatch)
    done = note_updates(modules, monkeypatch)
    with pytest.raises(NonFiniteError) as caught:
        run(stage, list(range(STEPS)), tiny_batch)
    message = str(caught.value)
    assert "module 0 (stem" in message and f"batch of step {BAD}" in message
    assert "losses are finite" in message and "module 1 sent or its own backward" in message
    assert caught.value.precedence == (BAD, 1, 0)
    assert done[0][0] == BAD - 1 and same(weights(modules[0]), done[0][1])


@pytest.mark.parametrize("asked", ["in the next update", "at the end of the epoch"])
def test_where_gradients_are_read_late_the_message_names_their_step(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the gradients of an update are looked at in the next one, or before its weights are saved."""
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2))
    spoil(modules[0], monkeypatch)
    for module in modules:
        monkeypatch.setattr(module.guard, "reads_late", True)
    for step in range(BAD + 1):
        train_on(stage, 1, step, tiny_batch(step))
    with pytest.raises(NonFiniteError, match=f"batch of step {BAD}: losses are finite"):
        if asked == "in the next update":
            train_on(stage, 1, BAD + 1, tiny_batch(BAD + 1))
        else:
            modules[0].take_losses()


def test_the_place_where_it_began_comes_first() -> None:
    """Of what several ranks report about one step: losses before gradients, and of these the source."""
    found = [NonFiniteError("", 5, module, in_losses) for module in range(4) for in_losses in (False, True)]
    found.append(NonFiniteError("", 4, 3, False))
    ordered = [error.precedence for error in sorted(found, key=lambda error: error.precedence)]
    assert ordered[0] == (4, 1, -3)
    assert ordered[1:5] == [(5, 0, module) for module in range(4)]
    assert ordered[5:] == [(5, 1, -module) for module in (3, 2, 1, 0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_number_of_a_gpu_is_read() -> None:
    value = torch.tensor([1.0, float("nan")], device="cuda")
    reading = Reading(value)
    assert reading.finite(0, 1) and not reading.finite(0, 2)
    assert [finite() for finite in Reading(value).parts([1, 0, 1])] == [True, True, False]


# --- skip -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", [{}, {"name": "adamw", "lr": 0.01}, {"clip_norm": 0.05}], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_skipped_batch_leaves_no_trace(micro_batches: int, optim: dict[str, Any]) -> None:
    """Weights, optimiser, running statistics and mean losses are those of a run that never saw the batch."""
    config = tiny_config(
        "predsim", "hpff", 2, schedule={"micro_batches": micro_batches}, optim=optim, train={"nonfinite": "skip"}
    )
    stage, modules, _ = tiny_stage(config)
    run(stage, list(range(STEPS)))
    without, reference, _ = tiny_stage(config)
    run(without, [step for step in range(STEPS) if step != BAD])
    for mine, theirs in zip(modules, reference, strict=True):
        assert same(tensors(mine), tensors(theirs))
        assert (mine.losses.take_skipped(), theirs.losses.take_skipped()) == (1, 0)
        assert mine.losses.take_skipped() == 0
        losses = mine.take_losses()
        assert losses and losses == theirs.take_losses()


@pytest.mark.parametrize("name", ["async", "async, two late, two micro-batches"])
def test_a_skipped_late_batch_leaves_weights_and_statistics_finite(name: str) -> None:
    config = tiny_config("infopro", "hpff", 2, schedule=SCHEDULES[name], train={"nonfinite": "skip"})
    stage, modules, _ = tiny_stage(config)
    before = [weights(module) for module in modules]
    run(stage, list(range(STEPS)))
    for module, old in zip(modules, before, strict=True):
        assert all(tensor.isfinite().all() for tensor in tensors(module))
        assert not same(weights(module), old)
        assert module.losses.take_skipped() == 1
        assert all(abs(value) < 100 for value in module.take_losses().values())
        assert not module.losses.open and (module.stashes is None or not module.stashes.open)
        assert len(module.stashes or ()) <= 3  # copies of weights are used again


def test_a_bad_gradient_is_skipped_by_the_module_that_got_it_and_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, modules, _ = tiny_stage(tiny_config("dgl", "hpff", 2, train={"nonfinite": "skip"}))
    spoil(modules[1], monkeypatch)
    for step in range(BAD + 2):
        train_on(stage, 1, step, tiny_batch(step))
    # Module 0 gets the gradient of module 1's own cascade head only (span 2).
    assert [module.losses.take_skipped() for module in modules] == [0, 1, 0, 0, 0]
    assert all(tensor.isfinite().all() for module in modules for tensor in tensors(module))


def test_a_buffer_that_was_never_finite_is_left_alone() -> None:
    """An attention mask holds minus infinity on purpose."""
    config = tiny_config("dgl", "hpff", 2, train={"nonfinite": "skip"})
    _, modules, _ = tiny_stage(config)
    block, mask = modules[0].blocks["stem"], torch.tensor([0.0, -float("inf")])
    block.register_buffer("mask", mask.clone())
    first = modules[0]
    again = LocalModule(first.plan, first.blocks, first.levels, first.task, config, first.numerics)
    again.guard.mend_buffers()
    assert torch.equal(block.mask, mask)


@pytest.mark.parametrize("cut", [BAD, BAD + 1, BAD + 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_bad_batch_is_skipped_as_well_if_the_run_is_restarted_around_it(name: str, cut: int) -> None:
    config = tiny_config("dgl", "hpff", 2, schedule=SCHEDULES[name], train={"nonfinite": "skip"})
    stage, modules, _ = tiny_stage(config)
    run(stage, list(range(STEPS)))

    first, stopped, _ = tiny_stage(config)
    first.begin_epoch(0, 0)
    for step in range(cut):
        train_on(first, 1, step, batch_of(step))
    second, resumed, _ = tiny_stage(config)
    for old, new in zip(stopped, resumed, strict=True):
        restore_module(new, module_state(old))
    second.restored()
    second.begin_epoch(0, cut)
    for step in range(cut, STEPS):
        train_on(second, 1, step, batch_of(step))
    second.end_epoch(1, STEPS)

    for one, other in zip(modules, resumed, strict=True):
        assert same(tensors(one), tensors(other))
        assert one.losses.take_skipped() == other.losses.take_skipped() == 1
        assert one.take_losses() == other.take_losses()


# --- whole runs -------------------------------------------------------------------------------------------------------


class NanBatches(Batches):
    """Floating-point images; batch BAD holds a NaN."""

    def __iter__(self) -> Any:
        for step in range(len(self)):
            batch = batch_of(step)
            yield batch.x, batch.labels


WHOLE = [SCHEDULES["exact"], SCHEDULES["async, two late, two micro-batches"]]


def train_with_nan(rank: int, folder: str) -> list[dict[str, Any]]:
    """Two epochs with each schedule of WHOLE, skipping; the summaries."""
    more = {"train": {"epochs": 2, "nonfinite": "skip"}, "checkpoint": {"every_epochs": 0}}
    return [
        train(
            tiny_config("dgl", "hpff", 2, 4, schedule=schedule, **more),
            network=network(),
            data=LoaderData(NanBatches(), Batches()),
            run_dir=Path(folder) / str(index),
            quiet=True,
        )
        for index, schedule in enumerate(WHOLE)
    ]


def test_skipping_does_not_depend_on_the_placement_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = train_with_nan(0, str(tmp_path / "one"))
    assert capsys.readouterr().out.count("skipped") == len(WHOLE)
    results = run_ranks(train_with_nan, 3, str(tmp_path / "three"), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    for index, (one, three) in enumerate(zip(alone, results[0].value, strict=True)):
        assert one["weights_sha256"] == three["weights_sha256"]
        for folder in ("one", "three"):
            run_dir = tmp_path / folder / str(index)
            summary = json.loads((run_dir / "summary.json").read_text())
            assert [head["skipped_steps"] for head in summary["heads"]] == [2, 2, 2, 2]
            assert summary["test_loss"] is not None  # null stands for NaN
            for epoch in read_metrics(run_dir / "metrics.jsonl"):
                assert [module["skipped_steps"] for module in epoch["modules"]] == [1, 1, 1, 1]
                assert all(loss is not None for module in epoch["modules"] for loss in module["losses"].values())


def test_the_report_has_no_column_for_what_did_not_happen(tmp_path: Path) -> None:
    summary = train(
        tiny_config("dgl", "plain", 1, 2, train={"epochs": 1}),
        network=network(),
        data=LoaderData(Batches(), Batches()),
        run_dir=tmp_path,
        quiet=True,
    )
    texts = []
    for skipped in (0, 3):
        console = Console(file=io.StringIO(), width=140, _environ={})
        heads = [{**head, "skipped_steps": skipped} for head in summary["heads"]]
        PlainView(console).finish({**summary, "heads": heads})
        texts.append(console.file.getvalue())
    assert "skipped" not in texts[0] and "skipped" in texts[1]


def stop_at_nan(rank: int, folder: str, schedule: dict[str, Any], spoiled: str) -> None:
    """NaN in the data, or a block whose weights become infinite at step BAD on the rank that owns it."""
    mine = network()

    def before_action(step: int, action: Action) -> None:
        if spoiled and (step, action.kind, action.module) == (BAD, Kind.FORWARD, 1):
            with torch.no_grad():
                next(mine.get_submodule(spoiled).parameters()).fill_(float("inf"))

    train(
        tiny_config("dgl", "hpff", 2, 3, schedule=schedule, train={"epochs": 1}),
        network=mine,
        data=LoaderData(Batches() if spoiled else NanBatches(), Batches()),
        run_dir=Path(folder) / "run",
        quiet=True,
        before_action=before_action,
    )


@pytest.mark.parametrize("kind", ["exact", "async"])
@pytest.mark.parametrize(("spoiled", "module"), [("", 0), ("c", 1)])
def test_three_ranks_stop_with_one_line_that_names_where_it_began(
    tmp_path: Path, kind: str, spoiled: str, module: int
) -> None:
    """NaN reaches the other ranks, with activations and with gradients, before the first one knows of it."""
    results = run_ranks(stop_at_nan, 3, str(tmp_path), {"kind": kind}, spoiled, timeout_s=60)
    assert all(result.exit_code not in (0, None) for result in results)
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1, lines
    assert f"rank {module}, epoch 1 step {BAD}: module {module} (" in lines[0]
    assert "loss not finite" in lines[0] and f"batch of step {BAD}" in lines[0]
    assert max(result.ended_s for result in results) < 30
