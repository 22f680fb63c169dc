"""What all benchmarks have in common: from the command line to the screen and the files.

    Settings (a dataclass of options)  --command line-->  measure(settings) -> Report  -->  screen, JSON, page, chart

A benchmark declares its settings, a list of columns, its targets and what to measure; precision.py is a small one.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tables import Row, Table

from pipeline import ConfigError, LocalpipeError, __version__


@dataclass(frozen=True)
class Target:
    """What must come out, written down before it is measured."""

    text: str  # what is looked at
    measured: Mapping[str, float]  # what came out, by where
    least: float = -math.inf
    most: float = math.inf

    @property
    def met(self) -> bool:
        """Whether it was reached everywhere."""
        return all(self.least <= value <= self.most for value in self.measured.values())

    def __str__(self) -> str:
        bounds = [f">= {self.least:.3g}"] * (self.least > -math.inf) + [f"<= {self.most:.3g}"] * (self.most < math.inf)
        values = [f"{value:.3f} ({where})" for where, value in sorted(self.measured.items(), key=lambda item: item[1])]
        shown = ", ".join(values) if len(values) <= 6 else f"{values[0]} ... {values[-1]}"
        verdict = "Met" if self.met else "Missed"
        return f"Expected: {self.text} {' and '.join(bounds)}. Measured: {shown}. {verdict}."


@dataclass(frozen=True)
class Report:
    """What a benchmark hands back."""

    title: str
    tables: Sequence[Table]
    about: Sequence[str] = ()  # paragraphs on what was measured and how
    targets: Sequence[Target] = ()  # those without a value were not measured
    findings: Sequence[str] = ()  # what the rows say besides
    legend: str = ""  # below the first table: what its columns mean
    notes: Mapping[str, Any] = field(default_factory=dict)  # kept in the JSON file beside the settings
    rows: Sequence[Row] | None = None  # of the JSON file; default: those of the first table
    draw: Callable[[Path], None] | None = None  # writes the chart

    @property
    def points(self) -> str:
        """Targets and findings, a line each."""
        return "\n".join(f"* {point}" for point in [*(t for t in self.targets if t.measured), *self.findings])

    def document(self, settings: Any) -> dict[str, Any]:
        """One object with everything that a reader of the rows must know."""
        return {
            "hardware": hardware(getattr(settings, "device", "cpu")),
            "versions": {"torch": torch.__version__, "python": platform.python_version(), "localpipe": __version__},
            "date": datetime.date.today().isoformat(),
            "settings": {**asdict(settings), **self.notes},
            "targets": [{"target": str(target), "met": target.met} for target in self.targets if target.measured],
            "rows": self.tables[0].rows if self.rows is None else self.rows,
        }

    def page(self, document: Mapping[str, Any], command: str, picture: Path | None) -> str:
        """The result as Markdown."""
        versions = document["versions"]
        made = f"{document['hardware']}, torch {versions['torch']}, localpipe {versions['localpipe']}."
        first, *more = (table.markdown for table in self.tables)
        drawn = "" if picture is None else f"![{self.title}]({picture.name})"
        parts = [f"# {self.title}", f"`{command}`, {document['date']}. {made}", *self.about, self.points, first]
        return "\n\n".join(part for part in [*parts, self.legend, *more, drawn] if part) + "\n"


def hardware(device: str = "cpu") -> str:
    """Processor with its widest vector units as torch sees them, and cores that this process may use; the GPUs too for
    ``device`` "cuda"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line] or [platform.machine()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{names[0]} ({torch.backends.cpu.get_cpu_capability()}), {cores} cores"
    return text if device == "cpu" else f"{text}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def option(default: Any, help: str, metavar: str | None = None, *, above: float = 0, **facts: Any) -> Any:
    """A field of the settings that is an option of the command line, of the type of ``default``.

    Args:
        default: a tuple takes several values; False makes a switch.
        above: numbers must be larger.
        facts: for ``ArgumentParser.add_argument``.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "above": above, **facts})


def _add_option(parser: argparse.ArgumentParser, entry: dataclasses.Field[Any]) -> None:
    flag, default = "--" + entry.name.replace("_", "-"), entry.default
    facts = dict(entry.metadata)
    above = facts.pop("above")
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=facts["help"])
        return
    several = isinstance(default, tuple)
    kind: Any = type(default[0] if several else default)
    convert = kind if kind is str else _number(kind, above)
    parser.add_argument(flag, default=default, type=convert, nargs="+" if several else None, **facts)


def _number(kind: type[int] | type[float], above: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is no {'integer' if kind is int else 'number'}") from None
        if not above < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above {above:g}")
        return value

    return convert


def main(
    about: str | None, settings: type, measure: Callable[[Any], Report], quick: Mapping[str, Any], chart: str = ""
) -> None:
    """Run a benchmark from the command line; what cannot work ends with one line.

    Args:
        about: the docstring of the benchmark, for --help.
        settings: class of its settings, a dataclass of options.
        quick: settings that --quick replaces, so that all is run in less than a minute.
        chart: what --chart draws; "" where there is no chart.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in dataclasses.fields(settings):
        if entry.metadata:
            _add_option(parser, entry)
    parser.add_argument("--quick", action="store_true", help="a small run of everything: less than a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--output", metavar="FILE.md", type=Path, help="write the result as a Markdown page")
    if chart:
        parser.add_argument("--chart", metavar="FILE.png", type=Path, help=f"draw {chart}")
    given = vars(parser.parse_args())
    files = {name: given.pop(name, None) for name in ("json", "output", "chart")}
    given |= quick if given.pop("quick") else {}
    chosen = settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    script = Path(sys.argv[0]).name
    try:
        check_files(**files)
        report = measure(chosen)
    except LocalpipeError as error:
        sys.exit(f"{script}: {error}")
    for table in report.tables:
        table.show(report.title)
    if report.points:
        print(report.points)
    document = report.document(chosen)
    if files["json"] is not None:
        files["json"].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if files["output"] is not None:
        command = shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])
        files["output"].write_text(report.page(document, command, files["chart"]), encoding="utf-8")
    if files["chart"] is not None and report.draw is not None:
        report.draw(files["chart"])


def check_files(chart: Path | None = None, **files: Path | None) -> None:
    """Refuse, before anything is measured, what could not be written afterwards.

    Raises:
        ConfigError: the folder of a file does not exist; a chart without matplotlib.
    """
    for name, path in {**files, "chart": chart}.items():
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder '{path.parent}'; make it first")
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--chart {chart} needs matplotlib; run: pip install localpipe[plot]")
