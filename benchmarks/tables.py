"""What every benchmark writes: hardware, versions, date, settings and rows, as JSON, Markdown and on a screen."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipeline import ConfigError, __version__


@dataclass(frozen=True)
class Row:
    """One measured configuration of a benchmark of speed.

    Attributes:
        system: who runs it.
        method: what a local module learns from; "bp" for backpropagation.
        schedule: order of work.
        ranks, modules, micro_batches: P, K, M. A baseline has as many modules as parts that its schedule places.
        images_per_s, low, high: median, smallest and largest of all rounds.
        ratio_to_bp: median over rounds of the ratio to BP on one device in the same round; None where it was not run.
        bound: images/s if the busiest rank never waited: batch / max stage time; None where its work is not known.
        efficiency: images_per_s / bound.
        busy: by rank, share of the time in which it works.
        bytes_per_step: sent by all ranks together.
    """

    system: str
    method: str
    schedule: str
    ranks: int
    modules: int
    micro_batches: int
    images_per_s: float
    low: float
    high: float
    ratio_to_bp: float | None
    bound: float | None
    efficiency: float | None
    busy: tuple[float, ...]
    bytes_per_step: float


def processor() -> str:
    """Name of the CPU and its widest vector units, as torch sees them."""
    names: list[str] = []
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def hardware(device: str = "cpu") -> str:
    """Processor and cores that this process may use; the GPUs too for ``device`` "cuda"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{processor()}, {cores} cores"
    if device == "cuda":
        text += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return text


def document(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """One object with everything that a reader of the rows must know."""
    return {
        "hardware": hardware(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "localpipe": __version__},
        "date": datetime.date.today().isoformat(),
        "settings": dict(settings),
        "rows": [dict(row) for row in rows],
    }


def provenance(result: Mapping[str, Any], command: str) -> str:
    """The paragraph above a table: command, date, machine, versions."""
    versions = result["versions"]
    return (
        f"`{command}`, {result['date']}. {result['hardware']}, torch {versions['torch']}, "
        f"localpipe {versions['localpipe']}."
    )


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a document."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def output_options(parser: argparse.ArgumentParser, chart: str | None = None) -> None:
    """Add --json and --output, which every benchmark has, and --chart with the help text ``chart``."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--output", metavar="FILE.md", type=Path, help="write the result as a Markdown page")
    if chart is not None:
        parser.add_argument("--chart", metavar="FILE.png", type=Path, help=chart)


def check_targets(chart: Path | None = None, **files: Path | None) -> None:
    """Refuse, before anything is measured, what could not be written afterwards.

    Raises:
        ConfigError: the folder of a file does not exist; a chart without matplotlib.
    """
    for option, path in {**files, "chart": chart}.items():
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{option} {path}: there is no folder '{path.parent}'; make it first")
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--chart {chart} needs matplotlib; run: pip install localpipe[plot]")


def positive(text: str) -> float:
    """Type of an option: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def number(value: float | None, form: str) -> str:
    """A number for a cell; empty where there is none."""
    return "" if value is None else format(value, form)


def per_rank(values: Sequence[float], form: str) -> str:
    """Numbers of all ranks for a cell; of many ranks the lowest and the highest."""
    if len(values) <= 4:
        return " / ".join(format(value, form) for value in values)
    return f"{min(values):{form}} ... {max(values):{form}}"


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def show(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """The same table on the screen."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def at_least(minimum: int) -> Callable[[str], int]:
    """Type of an option: an integer of ``minimum`` or more."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is no integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small; use {minimum} or more")
        return value

    return integer
