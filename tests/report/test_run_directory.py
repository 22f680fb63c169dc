"""The files of a run: complete, strict JSON, never half written, never on top of another run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.base.errors import ConfigError, LocalpipeError
from pipeline.base.metric import ERROR, MetricForm
from pipeline.report.curve import plot_curve
from pipeline.store.run_directory import RunDirectory, read_metrics, summarise
from pipeline.store.run_lock import RunLock


def strict(text: str) -> object:
    """Parse JSON as a reader that knows no NaN does."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_default_directory_carries_name_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = RunDirectory.create(None, "my run/1"), RunDirectory.create(None, "my run/1")
    assert re.fullmatch(r"runs/my-run-1-\d{8}-\d{6}", first.path.as_posix())
    assert first.path.is_dir() and second.path.is_dir() and first.path != second.path


@pytest.mark.parametrize("held", ["summary.json", "metrics.jsonl"])
def test_a_directory_with_a_run_is_refused(tmp_path, held):
    (tmp_path / held).touch()
    with pytest.raises(ConfigError, match=f"{held}.*--run-dir") as caught:
        RunDirectory.create(tmp_path, "name")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_existing_empty_directory_is_used(tmp_path):
    assert RunDirectory.create(tmp_path, "name").path == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.chdir(tmp_path)
    for path in (Path("runs/x"), Path("runs"), None):
        with pytest.raises(ConfigError, match="'runs.*cannot be written .*--run-dir") as caught:
            RunDirectory.create(path, "name")
        assert "\n" not in str(caught.value)


def test_a_directory_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.run_lock.LOCK_S", 0.2)
    code = "import sys; from pathlib import Path; from pipeline.store.run_lock import RunLock;"
    code += "held = RunLock(Path(sys.argv[1])); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use by another job"):
            RunLock(tmp_path)
        other.communicate("\n")
    RunLock(tmp_path).close()


def test_a_lock_tells_whether_its_directory_is_still_there(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = RunLock(folder)
    assert not lock.lost()
    folder.rename(tmp_path / "moved")
    assert lock.lost()
    lock.renew()
    assert not lock.lost() and (tmp_path / "moved" / ".lock").exists()
    shutil.rmtree(folder)
    folder.mkdir()
    other = RunLock(folder)
    assert lock.lost()
    other.close()  # it has ended, but what is there is not ours
    with pytest.raises(LocalpipeError, match="another job has begun in its place") as caught:
        lock.renew()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    lock.close()


def test_metrics_round_trip_with_nan_as_null(tmp_path, sample_run):
    run, directory = sample_run(4, 4), RunDirectory(tmp_path)
    good = run.epoch(1)
    module = replace(good.modules[0], losses={"cascade.task": math.nan, "independent.task": -math.inf})
    bad = replace(run.epoch(2), train_loss=math.inf, test_error_pct=None, modules=(module,))
    for record in (good, bad):
        directory.append(record)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert len([strict(line) for line in text.splitlines()]) == 2
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == json.loads(json.dumps(asdict(good)))
    assert second["train_loss"] is None and second["test_error_pct"] is None
    assert second["modules"][0]["losses"] == {"cascade.task": None, "independent.task": None}


def test_reading_skips_a_torn_last_line_only(tmp_path, sample_run):
    path = tmp_path / "metrics.jsonl"
    RunDirectory(tmp_path).append(sample_run(4, 4).epoch(1))
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    assert len(read_metrics(path)) == 1
    path.write_text(whole[:50] + "\n" + whole)
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        read_metrics(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_summary({"test_error_pct": 2.5, "nan": math.nan, "path": tmp_path})
    before = (tmp_path / "summary.json").read_text()
    assert strict(before) == {"test_error_pct": 2.5, "nan": None, "path": str(tmp_path)}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        directory.write_summary({"test_error_pct": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == before


def test_the_configuration_is_written(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.write_config("name = 'é'\n").read_text(encoding="utf-8") == "name = 'é'\n"


def test_summary_reports_the_last_epoch_and_adds_up_the_ranks(sample_run):
    run = sample_run(4, 2)
    slow, better, last = run.epoch(1), run.epoch(2), run.epoch(3)
    stage = replace(last.stages[0], busy_s=0.0, wait_s=200.0, wall_s=200.0, peak_memory_bytes=1)
    records = [
        replace(slow, images_per_s=1.0),
        replace(better, test_error_pct=2.0, images_per_s=400.0),
        replace(last, test_error_pct=3.0, images_per_s=500.0, stages=(stage, last.stages[1])),
    ]
    summary = summarise(records, settings={"method": "m", "world_size": 2, "epochs": "overruled"})
    assert (summary["test_error_pct"], summary["best_test_error_pct"]) == (3.0, 2.0)
    assert (summary["epochs"], summary["steps"], summary["images_per_s"]) == (3, 585, 450.0)
    assert (summary["method"], summary["world_size"], summary["train_wall_s"]) == ("m", 2, 300.0)
    rank = summary["ranks"][0]
    assert rank["busy_fraction"] == pytest.approx((91 + 91) / 400)
    assert rank["wait_fraction"] == pytest.approx((5 + 5 + 200) / 400)
    assert rank["bytes_sent"] == 3 * last.stages[0].bytes_sent
    assert rank["peak_memory_bytes"] == slow.stages[0].peak_memory_bytes
    assert rank["modules"] == [0, 1]
    assert [head["index"] for head in summary["heads"]] == [0, 1, 2, 3]
    assert set(summary["versions"]) == {"python", "torch", "torchvision"}
    assert summarise(records[:1], settings={})["images_per_s"] == 1.0
    with pytest.raises(ConfigError, match="no epoch"):
        summarise([], settings={})


def test_curve_is_drawn_even_with_gaps(tmp_path, sample_run):
    pytest.importorskip("matplotlib")
    run, directory = sample_run(4, 4), RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    for epoch in range(1, 21):
        record = run.epoch(epoch)
        directory.append(replace(record, test_error_pct=record.test_error_pct if epoch % 5 == 0 else None))
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("metric", "label", "last"),
    [
        (ERROR, "test error (%)", "epoch 5: 9.94 %"),
        (MetricForm("mean_iou", "mean IoU", digits=3, better="higher"), "test mean IoU (higher is better)", ": 9.940"),
        (MetricForm("waste", "waste", "l", 1), "test waste (l, lower is better)", "epoch 5: 9.9 l"),
    ],
)
def test_curve_is_of_the_metric_of_the_task(tmp_path, sample_run, monkeypatch, metric, label, last):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: drawn.append(self.axes[0]))
    run = replace(sample_run(4, 4), metric=metric)
    for epoch in range(1, 6):
        RunDirectory(tmp_path).append(run.epoch(epoch))
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    (axes,) = drawn
    assert axes.get_ylabel() == label and axes.get_title(loc="left") == f"test {metric.title}, independent level"
    assert axes.get_title(loc="right").endswith(last)
    assert axes.lines[0].get_ydata().tolist() == [run.epoch(epoch).measured for epoch in range(1, 6)]


def test_curve_of_metrics_that_an_older_version_has_written(tmp_path, sample_run, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: drawn.append(self.axes[0]))
    record = asdict(sample_run(4, 4).epoch(1))
    for key in ("metric", "test_metrics", "test_text"):
        del record[key]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert drawn[0].get_ylabel() == "test error (%)" and len(drawn[0].lines) == 4


def drawn_axes(records, tmp_path, monkeypatch):
    """The axes of the curve of these records, in the order of reading."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: drawn.append(self.axes))
    for record in records:
        RunDirectory(tmp_path).append(record)
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    return drawn[0]


def test_curve_has_a_row_per_level_and_a_line_per_module(tmp_path, sample_run, monkeypatch):
    run = sample_run(55, 4)
    records = [run.epoch(epoch) for epoch in range(1, 4)]
    *panels, bar = drawn_axes(records, tmp_path, monkeypatch)
    assert [len(axes.lines) for axes in panels] == [55] * 4
    assert [axes.get_title(loc="left") for axes in panels] == [
        "test error, independent level", "training loss, independent level",
        "test error, cascade level", "training loss, cascade level",
    ]
    network, first, *_, last = panels[1].lines  # the loss is the sum of the level's two terms
    losses = records[-1].modules[0].losses
    assert first.get_ydata()[-1] == losses["independent.reconstruction"] + losses["independent.task"]
    assert network.get_ydata()[-1] == records[-1].train_loss
    lightness = [sum(line.get_color()[:3]) for line in panels[1].lines[1:]]
    assert lightness == sorted(lightness, reverse=True) and len(set(lightness)) == 54  # ordered along the depth
    assert len(bar.get_yticks()) <= 9 and "54" in bar.get_ylabel()


def test_curve_of_backpropagation_is_one_line_without_a_bar(tmp_path, sample_run, monkeypatch):
    test, loss = drawn_axes([sample_run(1, 1).epoch(epoch) for epoch in range(1, 4)], tmp_path, monkeypatch)
    assert len(test.lines) == len(loss.lines) == 1 and loss.get_title(loc="left") == "training loss"


def test_curve_without_matplotlib_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install localpipe\[plot\]"):
        plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
