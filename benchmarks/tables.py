"""Rows of measurements, and tables of them: a list of columns, as Markdown and on a screen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as Screen

Row = dict[str, Any]


def make_row(
    images: float, steps_s: Sequence[float], work_s: Sequence[float] = (), stage_s: Sequence[float] = (), **known: Any
) -> Row:
    """One measured configuration of a benchmark of speed: a step of ``images`` took ``steps_s`` seconds in the rounds,
    of which ranks work ``work_s`` (empty: not known) and should ``stage_s`` (empty: the same). Keys, and ``known``:

        system, method     who runs it; what a local module learns from, "bp" for backpropagation
        schedule           order of work
        ranks, modules, micro_batches    P, K, M; a baseline has as many modules as parts that its schedule places
        images_per_s, low, high          median, smallest and largest of all rounds
        ratio_to_bp        median ratio to BP on one device in the same round; None where that was not run
        bound, efficiency  images/s if the busiest rank never waited; images_per_s / bound; None where not known
        busy               by rank, share of the time in which it works
        bytes_per_step     sent by all ranks together
    """
    rate, low, high = spread([images / step_s for step_s in steps_s])
    bound = images / max(stage_s or work_s) if stage_s or work_s else None
    busy = [min(1.0, seconds * rate / images) for seconds in work_s]
    row: Row = {"system": "localpipe", "method": "bp", "schedule": "exact", "ranks": 1, "modules": 1}
    row |= {"micro_batches": 1, "images_per_s": rate, "low": low, "high": high, "ratio_to_bp": None}
    row |= {"bound": bound, "efficiency": bound and rate / bound, "busy": busy, "bytes_per_step": 0.0}
    return row | known


def method_name(method: str, span: int) -> str:
    """For people and rows: with HPFF where there is a cascade."""
    return method if span == 1 else f"{method} + hpff"


def system_name(row: Row) -> str:
    """For people, without M: ``dgl, async``, ``torch 1F1B``."""
    return row["system"] if row["method"] == "bp" else f"{row['method']}, {row['schedule']}"


def label(row: Row) -> str:
    """For people: ``dgl, async``, ``torch 1F1B, M = 4``. That of a torch pipeline always has its M."""
    plain = row["micro_batches"] == 1 and not row["system"].startswith("torch")
    return system_name(row) if plain else f"{system_name(row)}, M = {row['micro_batches']}"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def medians(records: Sequence[Sequence[float]]) -> list[float]:
    """The median at every place over all records, such as by rank over all rounds."""
    return list(map(statistics.median, zip(*records, strict=True)))


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    value: str | Callable[[Row], Any]  # key of the row, or a function of the row
    form: str = ""  # of a number, as in ``format``

    def cell(self, row: Row) -> str:
        """The text for a row; empty where there is no value. Of the numbers of many ranks the lowest and highest."""
        value = row[self.value] if isinstance(self.value, str) else self.value(row)
        if value is None:
            return ""
        if not isinstance(value, list):
            return format(value, self.form)
        if len(value) <= 4:
            return " / ".join(format(number, self.form) for number in value)
        return f"{min(value):{self.form}} ... {max(value):{self.form}}"


P, K, M = Column("P", "ranks"), Column("K", "modules"), Column("M", "micro_batches")
SPEED = (Column("images/s", "images_per_s", ".1f"), Column("low", "low", ".1f"), Column("high", "high", ".1f"))
BUSY = Column("busy", "busy", ".2f")


@dataclass(frozen=True)
class Table:
    """Rows under a title, which may be empty."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""

    @property
    def cells(self) -> list[list[str]]:
        """The table as text."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    @property
    def markdown(self) -> str:
        """The title and the table."""
        lines = ["| " + " | ".join(column.title for column in self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(cells) + " |" for cells in self.cells]
        return "\n".join([f"### {self.title}\n"] * bool(self.title) + lines)

    def show(self, title: str) -> None:
        """The same on the screen; ``title`` is for a table that has none."""
        screen = Screen(title=self.title or title, title_justify="left")
        for index, column in enumerate(self.columns):
            screen.add_column(column.title, justify="left" if index == 0 else "right", no_wrap=True)
        for cells in self.cells:
            screen.add_row(*cells)
        Console(width=None if Console().is_terminal else 200).print(screen)
