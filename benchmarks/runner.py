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
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tables import Row, Table

from pipeline import ConfigError, LocalpipeError, __version__

INK = "#33373d"
DASHED = (0, (4, 2))
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


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


LegendPlace = Literal["outside right upper", "outside upper right"]


@contextmanager
def picture(path: Path, title: str, height: float, legend: LegendPlace, columns: int = 1) -> Iterator[Any]:
    """Axes of a chart, 8 by ``height`` inches; written to ``path`` at the end, with a legend at that place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.0, height), dpi=150, layout="constrained")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(color="#d9dce1", linewidth=0.7)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    yield axes
    figure.legend(loc=legend, ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path)


def option(default: Any, help: str, metavar: str | None = None, *, above: float = 0, **facts: Any) -> Any:
    """A field of the settings that is an option of the command line, of the type of ``default``: a tuple takes several
    values, False makes a switch, numbers must be larger than ``above``; ``facts`` are for ``add_argument``."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "above": above, **facts})


def _add_option(parser: argparse.ArgumentParser, entry: dataclasses.Field[Any]) -> None:
    flag = "--" + entry.name.replace("_", "-")
    default: Any = entry.default
    facts = {name: value for name, value in entry.metadata.items() if name != "above"}
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=facts["help"])
        return
    several = isinstance(default, tuple)
    kind = type(default[0] if several else default)
    parser.add_argument(flag, default=default, type=kind, nargs="+" if several else None, **facts)


def main(
    about: str | None, settings: type, measure: Callable[[Any], Report], quick: Mapping[str, Any], chart: str = ""
) -> None:
    """Run a benchmark from the command line, with the options that are fields of ``settings``; what cannot work ends
    with one line. ``about`` is its docstring, ``quick`` replaces settings, ``chart`` says what its picture shows."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = [entry for entry in dataclasses.fields(settings) if entry.metadata]
    for entry in options:
        _add_option(parser, entry)
    parser.add_argument("--quick", action="store_true", help="a small run of everything: less than a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--output", metavar="FILE.md", type=Path, help="write the result as a Markdown page")
    if chart:
        parser.add_argument("--chart", metavar="FILE.png", type=Path, help=f"draw {chart}")
    given = vars(parser.parse_args())
    for entry in options:
        value, above = given[entry.name], entry.metadata["above"]
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, bool | str | tuple) and not above < number < math.inf:
                parser.error(f"argument --{entry.name.replace('_', '-')}: {number} is not above {above}")
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
        files["json"].write_text(as_json(document) + "\n", encoding="utf-8")
    if files["output"] is not None:
        command = shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])
        files["output"].write_text(report.page(document, command, files["chart"]), encoding="utf-8")
    if files["chart"] is not None and report.draw is not None:
        report.draw(files["chart"])


def as_json(document: Any) -> str:
    """Indented, but a list of plain values on one line."""
    text = json.dumps(document, indent=2)
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: "[" + re.sub(r",\n *", ", ", found[1]) + "]", text)


def check_files(chart: Path | None = None, **files: Path | None) -> None:
    """Refuse (ConfigError), before anything is measured, what could not be written afterwards."""
    for name, path in {**files, "chart": chart}.items():
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder '{path.parent}'; make it first")
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--chart {chart} needs matplotlib; run: pip install localpipe[plot]")
