"""The moving average of weights is torch's AveragedModel; it is tested beside the weights, saved, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Batches, network, tiny_batch, tiny_config, tiny_stage, train_on
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline import LoaderData, evaluate, export, read_metrics, train
from pipeline.base.errors import CheckpointError
from pipeline.local.module_state import module_state
from pipeline.local.weights import averages_of, weights_of
from pipeline.report.scalars import scalars

DECAY = 0.75


@pytest.mark.parametrize("late", [0, 1])
def test_averages_are_those_of_torch_with_buffers_heads_included(late: int) -> None:
    schedule = {"kind": "async", "delay": late} if late else {}
    stage, modules, _ = tiny_stage(tiny_config("greedy", "plain", 2, 3, train={"ema": DECAY}, schedule=schedule))
    networks = [nn.ModuleDict({"blocks": nn.ModuleDict(m.blocks), "heads": nn.ModuleDict(m.levels)}) for m in modules]
    references = [AveragedModel(n, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True) for n in networks]
    stage.begin_epoch(0, 0)
    for step in range(4):
        train_on(stage, 1, step, tiny_batch(step))
        for module, reference, whole in zip(modules, references, networks, strict=True):
            if step >= (late if module.stashes is not None else 0):
                reference.update_parameters(whole)
    for module, reference in zip(modules, references, strict=True):
        found, expected = averages_of(module_state(module)), reference.module.state_dict()
        assert found.keys() == expected.keys() == weights_of(module_state(module)).keys()
        for name, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_in_the_place_of_the_weights_and_back_to_the_bit() -> None:
    stage, (module, *_), _ = tiny_stage(tiny_config("greedy", "plain", 1, 2, train={"ema": DECAY}))
    for step in range(2):
        train_on(stage, 1, step, tiny_batch(step))
    before = {name: value.clone() for name, value in module_state(module).items()}
    assert module.average is not None
    with pytest.raises(ZeroDivisionError), module.average.in_place():
        inside = weights_of(module_state(module))
        assert all(torch.equal(inside[name], value) for name, value in averages_of(before).items())
        assert any(not torch.equal(inside[name], value) for name, value in weights_of(before).items())
        raise ZeroDivisionError
    after = module_state(module)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def run(folder: Path, decay: float) -> dict[str, Any]:
    config = tiny_config("greedy", "plain", 1, 2, train={"epochs": 2, "ema": decay})
    return train(config, network=network(), data=LoaderData(Batches(), Batches()), run_dir=folder)


def test_a_run_tests_both_and_exports_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(tmp_path / "run", DECAY)
    assert "with averages" in capsys.readouterr().out
    *_, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert last["ema_metrics"].keys() == {"error_pct", "loss"} and last["ema_metrics"]["loss"] != last["test_loss"]
    assert scalars(last)["ema/error_pct"] == summary["ema_metrics"]["error_pct"]
    for ema, expected in ((True, summary["ema_metrics"]["error_pct"]), (False, summary["test_error_pct"])):
        data = LoaderData(Batches(), Batches())
        tested = evaluate(tmp_path / "run", ["runtime.device=cpu"], network=network(), data=data, ema=ema)
        assert [row.metrics["error_pct"] for row in tested.rows if row.exit == "final"] == [expected]
        export(tmp_path / "run", tmp_path / f"{ema}.pt", ema=ema)
    files = [torch.load(tmp_path / f"{ema}.pt", weights_only=True) for ema in (True, False)]
    for state in files:
        network().load_state_dict(state, strict=True)
    assert any(not torch.equal(files[0][name], value) for name, value in files[1].items())
    export(tmp_path / "run", tmp_path / "hub", fmt="hub", ema=True)
    described = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert described["ema"] and described["metrics"]["test_error_pct"] == summary["ema_metrics"]["error_pct"]


def test_a_checkpoint_without_averages_says_so(tmp_path: Path) -> None:
    run(tmp_path / "run", 0.0)
    with pytest.raises(CheckpointError, match="no moving averages of weights: train.ema = 0; train with train.ema="):
        export(tmp_path / "run", tmp_path / "file.pt", ema=True)
