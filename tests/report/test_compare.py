"""Runs beside each other: what is read from their directories, what is said of those that do not fit, the picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipeline import ConfigError, compare, load_config, plot_comparison, show_comparison, to_toml
from pipeline.base.metric import MetricForm
from pipeline.store.run_directory import RunDirectory

WEIGHTS = {"a.weight": torch.ones(3, 4), "bn.running_mean": torch.ones(4), "bn.num_batches_tracked": torch.tensor(1)}


@pytest.fixture
def make(tmp_path: Path, sample_run: Callable[..., Any]) -> Callable[..., Path]:
    """Write the directory of a run."""

    def write(name: str, *keys: str, modules: int = 4, epochs: int = 3, done: bool = True, **record: Any) -> Path:
        directory = RunDirectory(tmp_path / name)
        directory.path.mkdir(parents=True)
        directory.write_config(to_toml(load_config(assignments=[f"model.modules={modules}", *keys])))
        run = replace(sample_run(modules, min(modules, 2)), epochs=3, **record)
        for epoch in range(1, epochs + 1):
            directory.append(run.epoch(epoch))
        if done:
            directory.write_summary({})
            torch.save(WEIGHTS, directory.path / "model.pt")
        return directory.path

    return write


def printed(comparison: Any) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    show_comparison(comparison, console)
    return console.export_text()


def test_a_row_says_what_a_run_has_reached_and_at_what_cost(make: Callable[..., Path]) -> None:
    (row, bp) = compare([make("hpff", "method.name=dgl"), make("bp", modules=1, epochs=2, done=False)]).runs
    assert (row.name, row.method, row.modules, row.ranks, row.epochs, row.finished) == ("hpff", "dgl", 4, 2, 3, True)
    assert (bp.method, bp.modules, bp.ranks, bp.epochs, bp.of, bp.finished) == ("bp", 1, 1, 2, 3, False)
    assert row.best == row.last == row.curve[-1][2] and row.curve[-1][:2] == (3, 300.0)
    assert row.step_s == pytest.approx(100 / 195) and row.images_per_s == 499.2
    assert row.parameters == 12 and bp.parameters is None  # statistics of BatchNorm are no parameters
    assert row.peak_memory_bytes == 11 * 2**30


def test_the_keys_that_differ_are_shown_and_no_others(make: Callable[..., Path]) -> None:
    runs = [make("a", "optim.lr=0.2", "runtime.threads=3"), make("b")]
    old = runs[1] / "config.toml"
    old.write_text(old.read_text().replace('layers = "tuned"\n', ""))  # of a version that had no such key
    comparison = compare(runs)
    assert comparison.differences == {"optim.lr": (0.2, 0.1), "precision.layers": ("tuned", "-")}
    text = printed(comparison)
    assert "optim.lr" in text and "2 of 3" not in text and "note" not in text
    assert "error %" in text and "466,906" not in text


def test_what_cannot_be_read_gets_one_line_and_the_others_are_compared(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    good, empty, damaged, torn = make("good"), make("empty", epochs=0), make("damaged"), make("torn")
    (damaged / "metrics.jsonl").write_text("no\n" * 2)
    (torn / "metrics.jsonl").write_text('{"epoch": 1}\n')
    comparison = compare([good, tmp_path / "none", tmp_path, empty, damaged, torn])
    assert [row.name for row in comparison.runs] == ["good"]
    for line, words in zip(
        comparison.left_out,
        ("no such directory", "holds no config.toml", "no epoch is finished yet", "line 1 is not JSON", "is damaged"),
        strict=True,
    ):
        assert words in line and "\n" not in line
    assert printed(comparison).count("note: ") == 5
    with pytest.raises(ConfigError, match="no such directory"):
        compare([tmp_path / "none"])


def test_runs_of_other_data_or_another_task_get_a_line(make: Callable[..., Path]) -> None:
    miou = MetricForm("mean_iou", "mean IoU", digits=3, better="higher")
    runs = [make("a"), make("b", "data.name=cifar10"), make("c", metric=miou)]
    comparison = compare(runs)
    assert [note.partition(":")[0] for note in comparison.notes] == [
        "different data, so the results are not of one task", "different metrics, so the results are not of one task"
    ]
    assert "digits (a, c), cifar10 (b)" in comparison.notes[0] and "mean IoU (c)" in comparison.notes[1]
    best = comparison.runs[2]
    assert best.best == max(value for _, _, value in best.curve)  # higher is better


def test_the_picture_has_a_line_per_run_against_epochs_and_time(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    save, drawn = figure.Figure.savefig, []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path)))
    comparison = compare([make("x/run", "method.name=dgl"), make("y/run")])
    plot_comparison(comparison, tmp_path / "c.png")
    by_epoch, by_time = drawn[0].axes
    assert [len(axes.lines) for axes in (by_epoch, by_time)] == [2, 2]
    assert by_time.lines[0].get_xdata().tolist() == [100 / 60, 200 / 60, 300 / 60] and "minutes" in by_time.get_xlabel()
    assert by_epoch.get_ylabel() == "test error (%)"
    assert [line.get_label().split(" (")[0] for line in by_epoch.lines] == ["x/run", "y/run"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    comparison.write_json(tmp_path / "c.json")
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["runs"][0]["curve"] == [list(point) for point in comparison.runs[0].curve]
