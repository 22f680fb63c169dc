"""What an evaluation has found, a row per exit: as a table for people, as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.base.errors import ConfigError
from pipeline.base.metric import ERROR, MetricForm
from pipeline.report.console import arrow, output_console
from pipeline.store.run_directory import json_ready

PREFIX, ALL = "prefix", "all"


@dataclass(frozen=True)
class ExitRow:
    """One exit, or several together.

    Attributes:
        module: the local module whose output it needs.
        blocks: first and last block of this module.
        exit: "independent", "cascade" (auxiliary heads), "final" (the network's own output); for a classification also
            "prefix" (all exits up to this module, those of module i weighted 2^i) and "all" (the plain mean of all
            exits).
        metrics: of the task on the test set, by name.
        parameters: of the blocks up to here, heads not counted.
        operations: share of the whole network's forward pass up to here, heads not counted.
    """

    module: int
    blocks: str
    exit: str
    metrics: dict[str, float]
    parameters: int
    operations: float

    @property
    def error_pct(self) -> float | None:
        """Share of the test images that it gets wrong; None for a task that does not count them."""
        return self.metrics.get(ERROR.name)


@dataclass(frozen=True)
class Evaluation:
    """What was tested, and a row per exit in the order of the modules; none for heads that do not do the task.

    Attributes:
        task: its name.
        metrics: how those in the rows read.
        ensembles: whether exits together can have rows: only classifications have class probabilities.
    """

    checkpoint: str
    step: int
    epoch: int
    network: str
    data: str
    images: int
    rows: tuple[ExitRow, ...]
    task: str = "Classification"
    metrics: tuple[MetricForm, ...] = (ERROR,)
    ensembles: bool = True

    @property
    def test_metrics(self) -> dict[str, float]:
        """Of the network itself, by name."""
        return next(row.metrics for row in self.rows if row.exit == "final")

    @property
    def test_error_pct(self) -> float | None:
        """Of the network itself; None for a task that does not count errors."""
        return self.test_metrics.get(ERROR.name)

    def write_json(self, path: Path) -> None:
        """Write everything; a number that is not finite becomes null. Of a classification, the error is the only metric
        and has a key of its own: ``error_pct`` of a row, ``test_error_pct``. Raises ConfigError where the disk refuses.
        """
        document = dataclasses.asdict(self)
        if self.metrics == (ERROR,):
            for name in ("task", "metrics", "ensembles"):
                del document[name]
            document["rows"] = [
                {ERROR.name if key == "metrics" else key: row.error_pct if key == "metrics" else value
                 for key, value in dataclasses.asdict(row).items()}
                for row in self.rows
            ]
            document["test_error_pct"] = self.test_error_pct
        else:
            document["test_metrics"] = self.test_metrics
        try:
            path.write_text(json.dumps(json_ready(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be written ({error.strerror}); choose another place") from error


def show_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print ``evaluation`` as a table on ``console`` (default: standard output)."""
    console = output_console(console)
    title = f"{evaluation.network}, step {evaluation.step} (epoch {evaluation.epoch}) of {evaluation.checkpoint}"
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("module", justify="right", no_wrap=True)
    table.add_column("blocks", overflow="ellipsis", min_width=8)
    table.add_column("exit", no_wrap=True)
    headings = [
        f"test {metric.heading}" + ("" if metric == ERROR else f" {arrow(metric, console)}")
        for metric in evaluation.metrics
    ]
    for heading in (*headings, "parameters", "operations %"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = None
    for row in evaluation.rows:
        first, shown = row.module != shown, row.module
        cells = (
            str(row.module) if first else "",
            row.blocks if first else "",
            f"prefix 0-{row.module}" if row.exit == PREFIX else "all, mean" if row.exit == ALL else row.exit,
            *(metric.number(row.metrics[metric.name]) for metric in evaluation.metrics),
            f"{row.parameters:,}",
            f"{100 * row.operations:.1f}",
        )
        table.add_row(*map(Text, cells), style="bold" if row.exit == "final" else None)
    console.print(table)
    console.print(_note(evaluation), markup=False, highlight=False)


def _note(evaluation: Evaluation) -> str:
    """What the table is of, and what is not in it."""
    what = "images" if evaluation.metrics == (ERROR,) else "rows"
    parts = [f"{evaluation.images:,} test {what} ({evaluation.data})"]
    parts += [f"{metric.title}: {metric.direction}" for metric in evaluation.metrics if metric != ERROR]
    parts.append("parameters and operations of the blocks up to an exit, heads not counted")
    if evaluation.ensembles:
        parts.append("prefix: exits of module i weighted 2^i")
    else:
        parts.append(f"no exits together: that needs class probabilities, which {evaluation.task} has none of")
    return "; ".join(parts)
