"""The console that everything for people is printed on."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console

from pipeline.base.metric import MetricForm

LOG_WIDTH = 140
"""Columns of output that goes to a file or a pipe: every column of the widest report is legible in them."""


def output_console(console: Console | None = None) -> Console:
    """``console``, or by default one for standard output. A file or a pipe has no width of its own: it gets LOG_WIDTH
    columns, unless the environment sets COLUMNS."""
    if console is not None:
        return console
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of a file must not end a run
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=LOG_WIDTH)


def arrow(metric: MetricForm, console: Console) -> str:
    """Where better is."""
    up, down = ("^", "v") if console.options.ascii_only else ("↑", "↓")
    return up if metric.better == "higher" else down
