"""Show a run while it trains: a live table in a terminal, plain lines elsewhere, one final report in both.

Only rank 0 opens a view; the other ranks send it their records.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console, Group, OverflowMethod
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.base.metric import ERROR, MetricForm
from pipeline.base.units import mebibytes, rate
from pipeline.report.console import arrow, output_console
from pipeline.store.records import (
    EpochProgress,
    EpochRecord,
    LiveModule,
    ModuleRecord,
    duration,
    epoch_parts,
    level_of,
    loss_text,
    progress_parts,
)

_WIDE = 110  # columns of the console from which on headings are spelled out
_REPLAY = ("reused", "skipped", "held_back")


class View(ABC):
    """What rank 0 shows: start, then progress and epoch as they come, finish, and close in a ``finally``."""

    def __init__(self, console: Console, clock: Callable[[], float], interval_s: float) -> None:
        self._console = console
        self._clock = clock
        self._interval_s = interval_s
        self._started = clock()
        self._epochs_seen = 0

    def start(self, header: str, plan_lines: Sequence[str] = (), blocks: Sequence[str] = ()) -> None:
        """Begin. ``header`` is one line: network, number of modules, method, schedule, ranks, devices.

        ``plan_lines`` (the partition, for instance) are printed once, above everything else. ``blocks`` names
        the blocks of each module in order; the live table shows "-" without it until the first epoch ends.
        """
        self._started = self._clock()
        self._line(header, style="bold")
        for line in plan_lines:
            self._line(line)

    @abstractmethod
    def due(self, epoch: int, batch: int, batches: int) -> bool:
        """Whether progress would be shown now; cheap. Ask first: the other ranks' live numbers are not."""

    @abstractmethod
    def progress(self, progress: EpochProgress) -> None:
        """Take the state within an epoch, and show it if that is due."""

    def epoch(self, record: EpochRecord) -> None:
        """Print one permanent line about a finished epoch."""
        self._epochs_seen += 1
        # Measured from the start, so that the estimate includes the tests between epochs.
        per_epoch = (self._clock() - self._started) / self._epochs_seen
        self._line(self._fit(epoch_parts(record, per_epoch * (record.epochs - record.epoch))))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the final report from the result of ``summarise``; ends the live part."""
        self.close()
        heads = [ModuleRecord(**head) for head in summary["heads"]]
        metric = MetricForm(**summary["metric"])
        shown = "errors: test set" if metric == ERROR else f"{metric.title}: test set, {metric.direction}"
        losses = f"Local modules (losses: mean of epoch {summary['epochs']}; {shown})"
        modules, ranks = _module_table(heads, metric, self._console), _rank_table(summary["ranks"])
        for title, table in ((losses, modules), ("Ranks (whole run)", ranks)):
            self._console.print()
            self._line(title, style="bold")
            self._console.print(table)
        self._console.print()
        value = summary["test_error_pct"] if metric.name == ERROR.name else summary["test_metrics"].get(metric.name)
        measured = "not measured" if value is None else metric.text(value)
        facts = {"test error": measured} if metric == ERROR else {
            "test": f"{metric.title} {measured} ({metric.direction})"
        }
        if averaged := summary.get("ema_metrics"):
            facts["with averages"] = metric.text(averaged.get(metric.name))
        facts |= {
            "epochs": f"{summary['epochs']} ({summary['steps']:,} steps)",
            "training time": f"{duration(summary['train_wall_s'])} (tests not included)",
            "throughput": _throughput(summary["images_per_s"], summary.get("loader_images_per_s")),
            "run directory": str(summary.get("run_directory", "none")),
        }
        for name, value in facts.items():
            self._line(f"{name:<15}{value}")

    @abstractmethod
    def close(self) -> None:
        """Give the terminal back as it was; may be called at any time and more than once."""

    def _fit(self, parts: Sequence[str]) -> str:
        """Join ``parts``. In a log the line may be long, since one line per epoch is what tools look for."""
        return "  ".join(parts)

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class PlainView(View):
    """Lines for logs: one per epoch; within an epoch at most one per tenth of it and one per ``interval_s`` seconds.

    A night's log stays short, however long its epochs are.
    """

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        interval_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(console, clock, interval_s)
        self._quiet = quiet
        self._last_line = self._started
        self._last_tenth = (0, 0)  # epoch, tenths of it that were done

    def start(self, header: str, plan_lines: Sequence[str] = (), blocks: Sequence[str] = ()) -> None:
        if not self._quiet:
            super().start(header, plan_lines, blocks)
        self._last_line = self._clock()

    def due(self, epoch: int, batch: int, batches: int) -> bool:
        late = self._clock() - self._last_line >= self._interval_s
        return not self._quiet and late and _tenth(epoch, batch, batches) > max(self._last_tenth, (epoch, 0))

    def progress(self, progress: EpochProgress) -> None:
        if self.due(progress.epoch, progress.batch, progress.batches):
            self._last_line = self._clock()
            self._last_tenth = _tenth(progress.epoch, progress.batch, progress.batches)
            loss = progress.modules[-1].losses.get("final") if progress.modules else None
            self._line("  ".join([*progress_parts(progress), f"train loss {loss_text(loss)}"]))

    def epoch(self, record: EpochRecord) -> None:
        if not self._quiet:
            super().epoch(record)
        self._last_line = self._clock()

    def close(self) -> None:
        pass


class LiveView(View):
    """A table of all local modules, redrawn in place at most once per ``interval_s`` seconds.

    It redraws only when told something: a thread of its own would take time from the training rank.
    """

    def __init__(
        self, console: Console, *, interval_s: float = 0.25, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, clock, interval_s)
        self._next_drawing = -math.inf
        self._blocks: dict[int, str] = {}
        self._last: EpochRecord | None = None
        self._progress: EpochProgress | None = None
        self._live: Live | None = None

    def start(self, header: str, plan_lines: Sequence[str] = (), blocks: Sequence[str] = ()) -> None:
        self._blocks = dict(enumerate(blocks))
        super().start(header, plan_lines, blocks)
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, get_renderable=self._render
        )
        self._live.start()

    def due(self, epoch: int, batch: int, batches: int) -> bool:
        return self._live is not None and self._clock() >= self._next_drawing

    def progress(self, progress: EpochProgress) -> None:
        self._progress = progress
        now = self._clock()
        if self._live is not None and now >= self._next_drawing:
            self._live.refresh()
            # Drawing holds up the training on this rank: it may take 2 % of the time and no more.
            self._next_drawing = now + max(self._interval_s, 50 * (self._clock() - now))

    def epoch(self, record: EpochRecord) -> None:
        self._blocks = {module.index: module.blocks for module in record.modules}
        self._last = record
        super().epoch(record)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _fit(self, parts: Sequence[str]) -> str:
        """Leave out the last parts when they do not fit: the live table shows them as well."""
        kept = list(parts)
        while len(kept) > 1 and len("  ".join(kept)) > self._console.width:
            kept.pop()
        return "  ".join(kept)

    def _render(self) -> Group | Text:
        progress = self._progress
        if progress is None:
            return Text("waiting for the first batch")
        metric = self._last.metric if self._last is not None else ERROR
        tested = {module.index: module for module in self._last.modules} if self._last is not None else {}
        records = [
            replace(
                tested.get(m.index, ModuleRecord(m.index, m.rank, "-", {}, {})),
                rank=m.rank,
                blocks=self._blocks.get(m.index, "-"),
                losses=m.losses,
                skipped_steps=0,
            )
            for m in progress.modules
        ]
        head, *tail = progress_parts(progress)
        bar = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            bar.add_column(no_wrap=True, ratio=ratio)
        done = ProgressBar(total=max(progress.batches, 1), completed=progress.batch)
        bar.add_row(head, done, "  ".join(tail))
        # Besides its rows the live part has two gaps, the bar, three lines of headings and their rule.
        rows = max(self._console.height - 8, 3)
        return Group(Text(), bar, Text(), _module_table(records, metric, self._console, progress.modules, rows))


def open_view(console: Console | None = None, *, quiet: bool = False) -> View:
    """Return the live view if ``console`` (default: standard output) is a terminal, else plain lines.

    ``quiet`` leaves only the final report.
    """
    console = output_console(console)
    if console.is_terminal and console.is_interactive and not quiet:
        return LiveView(console)
    return PlainView(console, quiet=quiet)


def _throughput(images_per_s: float, loader: float | None) -> str:
    """``499 images/s (the loader could give 1,900)``."""
    could = "" if loader is None else f" (the loader could give {rate(loader)})"
    return f"{rate(images_per_s)} images/s{could}"


def _tenth(epoch: int, batch: int, batches: int) -> tuple[int, int]:
    """Which epoch, and how many tenths of it are done."""
    return epoch, 10 * batch // max(batches, 1)


def _module_table(
    records: Sequence[ModuleRecord],
    metric: MetricForm,
    console: Console,
    live: Sequence[LiveModule] = (),
    rows: int | None = None,
) -> Table:
    """One row per local module; beyond ``rows`` the middle ones are left out and counted. ``metric``: the one of the
    test that is shown.

    Every loss has its column, but with the columns for ``live`` a narrow console shows the sums by level.
    """
    narrow = console.width < _WIDE
    brief = narrow or bool(live)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0 if narrow else 1, 0, 0))
    # Only names may shrink. Where the encoding is ASCII, rich's ellipsis character cannot be written.
    clip: OverflowMethod = "crop" if console.options.ascii_only else "ellipsis"
    names = dict.fromkeys(name for record in records for name in record.losses)
    levels = _groups([level_of(name) for name in names])
    losses = levels if narrow and live else [(n,) for group in levels for n in names if level_of(n) in group]
    tested = _groups([level for record in records for level in record.head_error_pct])
    _numeric(table, "#")
    table.add_column("blocks", overflow=clip, min_width=12, max_width=24)
    _numeric(table, "rank")
    for keys in losses:
        kind = keys[0].partition(".")[2]
        kind = kind or ("sum" if any(len(record.losses_under(keys)) > 1 for record in records) else "loss")
        table.add_column(_heading(keys, kind, brief), justify="right", overflow=clip, min_width=7)
    kind = "err %" if metric == ERROR else f"{metric.heading} {arrow(metric, console)}"
    _numeric(table, *(_heading(keys, kind, brief) for keys in tested))
    skips = any(record.skipped_steps for record in records)
    if skips:
        _numeric(table, "steps\nskipped")
    if live:
        _numeric(table, "busy\n%", "wait\n%", "queue\ndepth", "peak\nMiB")
    half = (rows - 1) // 2 if rows is not None and len(records) > rows else len(records)
    hidden = range(half, len(records) - half)
    for position, record in enumerate(records):
        if position == hidden.start:
            table.add_row("", f"... {len(hidden)} more", style="dim")
        if position in hidden:
            continue
        cells: list[str | Text] = [str(record.index), Text(record.blocks), str(record.rank)]
        sums = [sum(values) if (values := record.losses_under(keys)) else None for keys in losses]
        cells += [loss_text(value) for value in sums]
        measured = record.measured(metric)
        heads = [[measured.get(level) for level in keys] for keys in tested]
        cells += [metric.number(next((value for value in head if value is not None), None)) for head in heads]
        cells += [f"{record.skipped_steps:,}"] if skips else []
        if live:
            now = live[position]
            cells += [f"{100 * now.busy_fraction:.0f}", f"{100 * now.wait_fraction:.0f}"]
            cells += [f"{now.queue_depth:.1f}", mebibytes(now.peak_memory_bytes)]
        diverged = any(value is not None and not math.isfinite(value) for value in sums)
        table.add_row(*cells, style="red" if diverged else None)
    return table


def _rank_table(ranks: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    _numeric(table, "rank")
    table.add_column("device")
    table.add_column("modules")
    _numeric(table, "busy\n%", "wait\n%", "queue\ndepth", "peak memory\nMiB", "sent\nMiB")
    free = any(rank[name] for rank in ranks for name in _REPLAY)
    if free:
        _numeric(table, "steps", "batches\nused again", "batches\nskipped", "held\nback")
    for rank in ranks:
        first, *others = rank["modules"]
        modules = f"{first}-{others[-1]}" if others else str(first)
        cells = [f"{100 * rank[share]:.1f}" for share in ("busy_fraction", "wait_fraction")]
        memory, sent = mebibytes(rank["peak_memory_bytes"]), mebibytes(rank["bytes_sent"])
        cells += [f"{rank['queue_depth']:.1f}", memory, sent]
        if free:
            cells += [f"{rank[name]:,}" for name in ("steps", *_REPLAY)]
        table.add_row(str(rank["rank"]), Text(rank["device"]), modules, *cells)
    return table


def _numeric(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _heading(keys: Sequence[str], kind: str, brief: bool) -> str:
    heading = "\n/".join(level_of(key) for key in keys) + "\n" + kind
    return heading.replace("independent", "indep.") if brief else heading


def _groups(levels: Sequence[str]) -> list[tuple[str, ...]]:
    """The levels by column: a module has a cascade head or, if it is the last one, the final head."""
    others = [(level,) for level in dict.fromkeys(levels) if level not in ("independent", "cascade", "final")]
    columns = [("independent",), ("cascade", "final"), *others]
    return [kept for column in columns if (kept := tuple(level for level in column if level in levels))]
