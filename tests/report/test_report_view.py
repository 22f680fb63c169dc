"""What a user reads: the live table, the log lines and the final report, at both usual widths."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.base.metric import MetricForm
from pipeline.report.console import LOG_WIDTH, output_console
from pipeline.report.view import LiveView, PlainView, open_view
from pipeline.store.records import EpochProgress, LiveModule, loss_text
from pipeline.store.run_directory import summarise

SIZES = [(4, 80, 24), (4, 120, 40), (55, 80, 24), (55, 120, 40)]
HEADER = "resnet110 on cifar10  K=4  aux-cascade  streaming  4 ranks on cuda:0-3"


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(width: int, height: int = 24, terminal: bool = False) -> Console:
    """A console that writes into memory; the fixed environment keeps the tester's own terminal out of it."""
    environ = {"TERM": "xterm-256color"}
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal, _environ=environ)


def written(target: Console) -> str:
    """Everything written so far, without colours; a line written over another one comes after it."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", target.file.getvalue()).replace("\r", "\n")


def lines_with(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize(("modules", "width", "height"), SIZES)
def test_live_table_fits_the_terminal_and_shows_the_state(sample_run, modules, width, height):
    run = sample_run(modules, 4)
    target = console(width, height, terminal=True)
    view = LiveView(target, clock=FakeClock())
    view.start(HEADER, ["cut after layer1.2"], run.blocks())
    view.epoch(run.epoch(1))
    already = len(written(target))
    view.progress(run.progress(2, 65))
    drawn = written(target)[already:]
    view.close()
    lines = drawn.strip("\n").splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < height
    for words in (
        "epoch  2/20 train",
        "batch  65/195",
        "499 img/s",
        "eta 30:41",
        "stem-layer1.0",
        "MiB",
        "err %",
    ):
        assert words in drawn
    first = next(line for line in lines if "stem-layer1.0" in line)
    losses = run.losses(0, 2)
    shown = (
        losses.values()
        if width == 120
        else (losses["independent.reconstruction"] + losses["independent.task"],)
    )
    for number in (
        *map(loss_text, shown),
        loss_text(losses["cascade.task"]),
        "34.00",
        "31.00",
        "91",
        "1.5",
        "11,264",
    ):
        assert number in first.split()
    assert loss_text(run.losses(modules - 1, 2)["final"]) in lines[-1]
    hidden = re.search(r"\.\.\. (\d+) more", drawn)
    rows = sum(bool(re.match(r" *\d+ ", line)) for line in lines)
    assert rows + (int(hidden[1]) if hidden else 0) == modules


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("modules", "width", "height"), SIZES)
def test_final_report_holds_every_loss_of_every_module(sample_run, modules, width, height, terminal):
    run = sample_run(modules, 4)
    target = console(width, height, terminal)
    summary = summarise([run.epoch(1), run.epoch(2)], settings={"run_directory": "runs/demo"})
    open_view(target).finish(summary)
    text = written(target)
    assert max(map(len, text.splitlines())) <= width
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d+ +(stem|layer)", line)]
    assert [int(row[0]) for row in rows] == list(range(modules))
    for module, row in enumerate(rows):
        for value in run.losses(module, 2).values():
            assert loss_text(value) in row
        for error in run.errors(module, 2).values():
            assert f"{error:.2f}" in row
    for rank in range(4):
        (line,) = (line.split() for line in text.splitlines() if f"cuda:{rank}" in line)
        assert line[-5:] == [f"{91 - rank:.1f}", f"{5 + rank:.1f}", "1.5", f"{(11 - rank) * 1024:,}", "3,072"]
    assert lines_with(text, "test error") == [f"test error     {run.errors(modules - 1, 2)['final']:.2f} %"]
    assert lines_with(text, "run directory") == ["run directory  runs/demo"]
    assert lines_with(text, "throughput") == ["throughput     499 images/s"]


def test_plain_epoch_is_one_aligned_line_with_units(sample_run):
    clock, target, run = FakeClock(), console(80), sample_run(4, 4)
    view = PlainView(target, clock=clock)
    view.start(HEADER, ["cut after layer1.2"], run.blocks())
    for epoch in (1, 10):
        clock.now += 60
        view.epoch(run.epoch(epoch))
    header, plan, first, tenth = written(target).splitlines()
    assert (header, plan) == (HEADER, "cut after layer1.2")
    assert first == (
        "epoch  1/20  step  195  test error 30.00 %  train loss 1.646    499 img/s  lr 0.0532 "
        "  busy 91/90/89/88 %  wait 5/6/7/8 %  eta 19:00"
    ).replace("30.00", f"{run.errors(3, 1)['final']:.2f}")
    assert len(first) <= 140
    for word in ("step", "test", "train", "img/s", "lr", "busy", "wait", "eta"):
        assert first.index(word) == tenth.index(word)


def batches_of(text: str) -> list[int]:
    """The batch of every progress line."""
    return [int(found) for found in re.findall(r"batch +(\d+)/195", text)]


def test_plain_progress_of_a_long_epoch_is_a_line_per_tenth(sample_run):
    clock, target, run = FakeClock(), console(80), sample_run(4, 4)
    view = PlainView(target, clock=clock)
    view.start(HEADER)
    for epoch in (1, 2):  # ten hours each, looked at every quarter of a second
        for batch in range(1, 196):
            for _ in range(3):
                clock.now += 36000 / 195 / 3
                view.progress(run.progress(epoch, batch))
        view.epoch(run.epoch(epoch))
    tenths = [20, 39, 59, 78, 98, 117, 137, 156, 176, 195]
    assert batches_of(written(target)) == tenths * 2
    first = lines_with(written(target), "epoch")[0]
    assert first == "epoch  1/20 train  batch  20/195    499 img/s  eta 30:41  train loss 1.646"


def test_plain_progress_of_a_short_epoch_is_a_line_per_minute(sample_run):
    clock, target, run = FakeClock(), console(80), sample_run(4, 4)
    view = PlainView(target, clock=clock)
    view.start(HEADER)
    for batch in range(1, 196):
        clock.now = float(batch)
        view.progress(run.progress(1, batch))
    assert batches_of(written(target)) == [60, 120, 180]
    view.epoch(run.epoch(1))
    clock.now += 50.0
    view.progress(run.progress(2, 150))  # within a minute of the epoch's line
    assert batches_of(written(target)) == [60, 120, 180]
    clock.now += 10.0
    view.progress(run.progress(2, 151))
    assert batches_of(written(target)) == [60, 120, 180, 151]


def test_a_log_has_a_width_of_its_own(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_console().width == LOG_WIDTH
    monkeypatch.setenv("COLUMNS", "77")
    assert output_console().width == 77
    assert output_console(given := console(33)) is given


def test_live_table_is_redrawn_at_most_four_times_a_second(sample_run):
    clock, target, run = FakeClock(), console(80, terminal=True), sample_run(4, 4)
    view = LiveView(target, clock=clock)
    view.start(HEADER)
    for batch in range(100):
        clock.now = batch / 64
        view.progress(run.progress(1, batch))
    assert written(target).count("eta 30:41") == 7  # at 0, 0.25, ... 1.5 s
    view.close()


def test_a_slow_terminal_is_drawn_less_often(sample_run):
    clock, target, run = FakeClock(), console(80, terminal=True), sample_run(4, 4)

    class SlowTerminal(io.StringIO):
        def write(self, text: str) -> int:
            clock.now += 0.1
            return super().write(text)

    target.file = SlowTerminal()
    view = LiveView(target, clock=clock)
    view.start(HEADER)
    for second in range(20):
        clock.now = max(clock.now, float(second))
        view.progress(run.progress(1, second))
    assert 1 < written(target).count("eta 30:41") <= 5
    view.close()


def test_finished_epochs_stay_above_the_live_table_in_one_line_each(sample_run):
    target, run = console(80, terminal=True), sample_run(4, 4)
    view = LiveView(target, clock=FakeClock())
    view.start(HEADER, (), run.blocks())
    for epoch in (1, 2):
        view.progress(run.progress(epoch, 195))
        view.epoch(run.epoch(epoch))
    view.close()
    curve = [line for line in written(target).splitlines() if "test error" in line]
    assert len(curve) == 2
    assert all(len(line) <= 80 and "img/s" in line for line in curve)


def test_close_restores_the_terminal_and_may_be_repeated(sample_run):
    target = console(80, terminal=True)
    never_started = LiveView(target)
    never_started.close()
    view = LiveView(target)
    view.start(HEADER)
    assert "\x1b[?25l" in target.file.getvalue()  # the cursor is hidden while the table is drawn
    view.close()
    view.close()
    assert target.file.getvalue().count("\x1b[?25h") == 1  # and shown again
    size = len(target.file.getvalue())
    view.progress(sample_run(4, 4).progress(1, 1))
    assert len(target.file.getvalue()) == size


def test_a_terminal_gets_the_live_view_and_quiet_leaves_the_report(sample_run):
    assert isinstance(open_view(console(80, terminal=True)), LiveView)
    assert isinstance(open_view(console(80)), PlainView)
    run, target = sample_run(4, 4), console(80, terminal=True)
    view = open_view(target, quiet=True)
    view.start(HEADER)
    view.progress(run.progress(1, 1))
    view.epoch(run.epoch(1))
    view.close()
    assert written(target) == ""
    view.finish(summarise([run.epoch(1)], settings={}))
    assert "test error" in written(target)


def test_what_is_not_known_is_said_so(sample_run):
    run, target = sample_run(4, 4), console(80)
    untested = replace(run.epoch(1), test_error_pct=None, train_loss=math.nan)
    broken = replace(
        untested.modules[0], losses={"independent.task": math.nan}, head_error_pct={"independent": None}
    )
    record = replace(untested, modules=(broken, *untested.modules[1:]))
    view = PlainView(target, clock=FakeClock())
    view.epoch(record)
    view.finish(summarise([record], settings={}))
    text = written(target)
    assert "test error     - %  train loss   nan" in text
    assert "test error     not measured" in text
    assert lines_with(text, "0 stem")[0].split()[3:] == ["nan", "-", "-", "-", "-", "-"]


IOU = MetricForm("mean_iou", "mean IoU", digits=3, better="higher")
LITRES = MetricForm("waste", "waste", "l", digits=1)


@pytest.mark.parametrize("metric", [IOU, LITRES])
def test_the_metric_of_a_task_is_shown_by_name_unit_and_direction(sample_run, metric):
    run = replace(sample_run(4, 4), metric=metric)
    values = [metric.number(value) for m in range(4) for value in run.errors(m, 1).values()]
    target = console(120, 40, terminal=True)
    view = LiveView(target, clock=FakeClock())
    view.start(HEADER, (), run.blocks())
    view.epoch(run.epoch(1))
    line = written(target)
    assert f"test {metric.title} {values[-1]:>5} {metric.unit}".rstrip() in line and "error" not in line
    view.progress(run.progress(2, 65))
    table = written(target)[len(line) :]
    assert f"{metric.heading} {'↑' if metric.better == 'higher' else '↓'}" in table
    assert "err" not in table and all(value in table.split() for value in values)
    drawn = len(written(target))
    view.finish(summarise([run.epoch(1)], settings={}))
    report = written(target)[drawn:]
    assert f"{metric.title}: test set, {metric.direction}" in report and "error" not in report
    (said,) = lines_with(report, "test ")
    assert said == f"test           {metric.title} {metric.text(run.epoch(1).measured)} ({metric.direction})"
    assert all(value in report.split() for value in values)


def test_a_metric_that_was_not_measured_is_a_dash_and_an_ascii_table_can_be_written(sample_run):
    run = replace(sample_run(4, 4), metric=IOU)
    record = replace(run.epoch(1), test_metrics={})
    raw = io.BytesIO()
    target = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=120, _environ={})
    view = PlainView(target, clock=FakeClock())
    view.epoch(record)
    view.finish(summarise([record], settings={}))
    target.file.flush()
    text = raw.getvalue().decode("ascii")
    assert "test mean IoU     -  train loss" in text and "test           mean IoU not measured" in text
    assert "mean IoU ^" in text


def test_unknown_levels_single_modules_and_missing_blocks_are_shown():
    target = console(80, terminal=True)
    view = LiveView(target, clock=FakeClock())
    view.start("K=1")
    only = LiveModule(0, 0, {"final": 2.5e-5, "probe.task": 12345.0}, 1.0, 0.0, 0.0, 3 * 2**20)
    view.progress(EpochProgress(1, 1, 0, 0, math.nan, math.nan, "test", (only,)))
    view.close()
    text = written(target)
    assert "eta -:--" in text and "test" in text and "probe" in text
    assert lines_with(text, "0 ")[0].split() == [
        "0",
        "-",
        "0",
        "2.5e-05",
        "1.2e+04",
        "100",
        "0",
        "0.0",
        "3.0",
    ]


def test_many_ranks_are_summed_up_as_a_range(sample_run):
    target = console(80)
    PlainView(target, clock=FakeClock()).epoch(sample_run(55, 11).epoch(1))
    assert "busy 81 to 91 %  wait 5 to 15 %" in written(target)


def test_an_ascii_log_can_be_written(sample_run):
    raw = io.BytesIO()
    target = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80, _environ={})
    PlainView(target).finish(summarise([sample_run(55, 4).epoch(1)], settings={}))
    target.file.flush()
    assert "stem-layer1.0" in raw.getvalue().decode("ascii")
