"""A comparison of runs on the screen, and as one picture; matplotlib is an optional dependency and loaded only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.base.errors import ConfigError
from pipeline.base.metric import ERROR
from pipeline.base.units import mebibytes, rate
from pipeline.report.compare import Comparison, RunRow
from pipeline.report.console import arrow, output_console
from pipeline.report.curve import metric_label
from pipeline.store.records import number

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito, which differ for colour-blind readers; more runs go on with other dashes."""
DASHES = ("-", "--", ":", "-.")


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a table of the runs, the keys in which they differ, and what could not be read, on ``console`` (default:
    standard output)."""
    console = output_console(console)
    console.print(_table(comparison, console))
    if comparison.differences:
        console.print()
        console.print("Keys that differ", style="bold")
        console.print(_differences(comparison))
    for line in (*comparison.notes, *comparison.left_out):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def _table(comparison: Comparison, console: Console) -> Table:
    metrics = {row.metric for row in comparison.runs}
    (first, *others) = metrics
    unit = "" if others else f"\n{first.heading}" + ("" if first == ERROR else f" {arrow(first, console)}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right", no_wrap=True)
    for heading in ("run", "method"):
        table.add_column(heading, overflow="fold", min_width=7)
    measured = ("images\n/s", "ms\n/step", "peak\nMiB", "params\nM")
    for heading in ("K", "P", "epochs", f"best{unit}", f"last{unit}", *measured):
        table.add_column(heading, justify="right", no_wrap=True)
    for position, row in enumerate(comparison.runs, start=1):
        texts = [row.metric.text(value) if others else row.metric.number(value) for value in (row.best, row.last)]
        table.add_row(
            *(str(position), Text(row.name), Text(row.method)),
            *(str(row.modules), str(row.ranks), f"{row.epochs}{'' if row.finished else f' of {row.of}'}", *texts),
            *(rate(row.images_per_s), f"{1000 * row.step_s:.1f}", mebibytes(row.peak_memory_bytes)),
            number(None if row.parameters is None else row.parameters / 1e6, ".2f"),
        )
    return table


def _differences(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("key", no_wrap=True)
    for position in range(1, len(comparison.runs) + 1):
        table.add_column(f"# {position}", overflow="fold")
    for key, values in comparison.differences.items():
        table.add_row(key, *(Text(str(value)) for value in values))
    return table


def plot_comparison(comparison: Comparison, png_path: Path) -> None:
    """Draw the first metric of the test against the epoch and against the training time into ``png_path``: a line per
    run that has the metric of the first one.

    Raises:
        ConfigError: matplotlib is missing, or no run has been tested.
        OSError: the disk refuses.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError("drawing a comparison needs matplotlib; run: pip install localpipe[plot]") from error
    runs = [row for row in comparison.runs if row.metric == comparison.runs[0].metric and row.curve]
    if not runs:
        raise ConfigError(f"no run has an epoch with a test, so '{png_path}' is not drawn; leave --output out")
    columns = min(len(runs), 2 if max(len(row.name) for row in runs) <= 30 else 1)
    figure = Figure(figsize=(10, 4.2 + 0.22 * -(-len(runs) // columns)), dpi=150, layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    longest = max(row.curve[-1][1] for row in runs)
    units = (("hours", 3600.0), ("minutes", 60.0))
    unit, seconds = next((entry for entry in units if longest > 2 * entry[1]), ("seconds", 1.0))
    for index, row in enumerate(runs):
        epochs, times, values = zip(*row.curve, strict=True)
        _line(by_epoch, index, row, epochs, values)
        _line(by_time, index, row, [time / seconds for time in times], values)
    by_epoch.set_ylabel(metric_label(runs[0].metric))
    by_epoch.set_xlabel("epoch")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set_xlabel(f"training time ({unit}, tests not included)")
    by_time.set_xlim(left=0)
    for axes in (by_epoch, by_time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    every = [value for row in runs for _, _, value in row.curve]
    by_epoch.set_ylim(bottom=min(0.0, min(every) * 1.08), top=max(max(every) * 1.08, 1e-9))
    handles, labels = by_epoch.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    figure.savefig(png_path)


def _line(axes: Any, index: int, row: RunRow, xs: Any, ys: Any) -> None:
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    label = f"{row.name} ({row.method}, K = {row.modules}, P = {row.ranks}): {row.metric.text(row.last)}"
    dots = "o" if len(xs) <= 30 else None
    axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.8, marker=dots, markersize=3.5, label=label)
