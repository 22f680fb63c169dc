"""What a run tells about itself: plain frozen data, and how it reads as one line of text.

Every record becomes JSON through ``dataclasses.asdict``; nothing here holds a tensor. The functions at the
end write the numbers, so that the live view, the log lines and the final report say them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.base.metric import ERROR, MetricForm
from pipeline.base.units import rate


@dataclass(frozen=True)
class ModuleRecord:
    """One local module after one epoch.

    ``losses`` are epoch means, named ``level.loss`` (``"independent.reconstruction"``, ``"cascade.task"``) or
    ``"final"`` for the last module. ``head_error_pct`` holds test-set errors in percent by level
    (``"independent"``, ``"cascade"``, ``"final"``), None where a head does not classify or was not tested.
    ``head_metrics`` holds other metrics of the task, by ``level.metric``.
    ``busy_s`` is the time its forward, heads, backward and update took in this epoch.
    ``blocks`` names the network blocks in the module, first to last, such as ``"stem-layer1.2"``.
    ``skipped_steps`` counts updates left out because a loss or gradient was not finite; the losses are means without
    them.
    """

    index: int
    rank: int
    blocks: str
    losses: dict[str, float]
    head_error_pct: dict[str, float | None]
    head_metrics: dict[str, float] = field(default_factory=dict)
    busy_s: float = 0.0
    skipped_steps: int = 0

    def measured(self, metric: MetricForm) -> dict[str, float | None]:
        """A metric of the task by level; None where a head does not do the task or was not tested."""
        if metric.name == ERROR.name:
            return self.head_error_pct
        return {level: self.head_metrics.get(f"{level}.{metric.name}") for level in self.head_error_pct}

    def losses_under(self, keys: Sequence[str]) -> list[float]:
        """The losses whose full name or level is one of ``keys``."""
        return [value for name, value in self.losses.items() if name in keys or level_of(name) in keys]


@dataclass(frozen=True)
class StageRecord:
    """One stage (rank) during the training part of one epoch.

    Times are in seconds: ``busy_s`` computing, ``wait_s`` waiting for a message, out of ``wall_s``.
    ``queue_depth`` is the mean number of ready messages whenever one was taken. ``bytes_sent`` counts this
    epoch only; ``peak_memory_bytes`` is the highest value so far. ``steps`` are the stage's own. With schedule `free`,
    ``reused`` of them were on a batch that it had trained on before, ``skipped`` batches passed it by, and it waited
    ``held_back`` times because every batch it had was used up.
    """

    rank: int
    device: str
    modules: tuple[int, ...]
    busy_s: float
    wait_s: float
    wall_s: float
    queue_depth: float
    peak_memory_bytes: int
    bytes_sent: int
    steps: int = 0
    reused: int = 0
    skipped: int = 0
    held_back: int = 0

    @property
    def busy_fraction(self) -> float:
        """Share of the wall time spent computing, 0 to 1; 0 before any time has passed."""
        return self.busy_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def wait_fraction(self) -> float:
        """Share of the wall time spent waiting for a message, 0 to 1; 0 before any time has passed."""
        return self.wait_s / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch of the whole pipeline; one line of metrics.jsonl.

    ``epoch`` counts from 1 to ``epochs``; ``step`` is the number of steps since the run began, a batch each.
    ``images`` were trained in ``wall_s`` seconds, testing excluded. ``train_loss`` is the final module's.
    ``loader_images_per_s`` is what the loader could have given, None where that was not measured.
    ``test_error_pct`` (percent) and ``test_loss`` are None in an epoch without a test, the error also for a task that
    counts none. ``test_metrics`` holds other metrics of the task by name. ``metric`` says what the first one is and how
    it reads, ``test_text`` is its value for people. ``ema_metrics`` holds the metrics and the loss of the test with the
    averages of all weights in their place, by name; empty without ``train.ema``.
    """

    epoch: int
    epochs: int
    step: int
    images: int
    wall_s: float
    images_per_s: float
    learning_rate: float
    train_loss: float
    test_error_pct: float | None
    test_loss: float | None
    stages: tuple[StageRecord, ...]
    modules: tuple[ModuleRecord, ...]
    test_metrics: dict[str, float] = field(default_factory=dict)
    test_text: str = ""
    metric: MetricForm = ERROR
    ema_metrics: dict[str, float] = field(default_factory=dict)
    loader_images_per_s: float | None = None

    @property
    def measured(self) -> float | None:
        """The first metric of the task; None without a test."""
        return self.test_error_pct if self.metric.name == ERROR.name else self.test_metrics.get(self.metric.name)


@dataclass(frozen=True)
class LiveModule:
    """One local module within an epoch; ``losses`` as in ModuleRecord, but means of the epoch so far.

    ``busy_fraction`` is its own share of the time, the last three values are those of its stage; fractions
    go from 0 to 1.
    """

    index: int
    rank: int
    losses: dict[str, float]
    busy_fraction: float
    wait_fraction: float
    queue_depth: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class EpochProgress:
    """Where the run stands within an epoch: ``batch`` of ``batches`` done in ``phase`` ("train" or "test").

    ``eta_s`` is the estimated time in seconds to the end of the whole run; NaN while nobody can tell.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    images_per_s: float
    eta_s: float
    phase: str
    modules: tuple[LiveModule, ...]
    loader_images_per_s: float | None = None


def epoch_parts(record: EpochRecord, eta_s: float) -> list[str]:
    """The line about a finished epoch in parts, the most important first; all epochs of a run align."""
    last_step = record.step / record.epoch * record.epochs
    metric = record.metric
    parts = [
        f"epoch {record.epoch:>{len(str(record.epochs))}}/{record.epochs}",
        f"step {record.step:>{len(f'{last_step:.0f}')}}",
        f"test {metric.title} {metric.number(record.measured):>5} {metric.unit}".rstrip(),
        *([f"ema {metric.number(record.ema_metrics.get(metric.name)):>5}"] if record.ema_metrics else []),
        f"train loss {loss_text(record.train_loss):>5}",
        _rates(record.images_per_s, record.loader_images_per_s),
        f"lr {record.learning_rate:.3g}".ljust(10),
    ]
    for name, values in (
        ("busy", [stage.busy_fraction for stage in record.stages]),
        ("wait", [stage.wait_fraction for stage in record.stages]),
    ):
        shares = "/".join(f"{100 * value:.0f}" for value in values)
        if len(values) > 8:  # more ranks than a reader takes in on one line
            shares = f"{100 * min(values):.0f} to {100 * max(values):.0f}"
        parts.append(f"{name} {shares} %")
    return [*parts, f"eta {duration(eta_s)}"]


def progress_parts(progress: EpochProgress) -> list[str]:
    """The line about a position within an epoch, in parts."""
    batches = str(progress.batches)
    return [
        f"epoch {progress.epoch:>{len(str(progress.epochs))}}/{progress.epochs} {progress.phase:<5}",
        f"batch {progress.batch:>{len(batches)}}/{batches}",
        _rates(progress.images_per_s, progress.loader_images_per_s),
        f"eta {duration(progress.eta_s)}",
    ]


def _rates(images_per_s: float, loader: float | None) -> str:
    """What is trained, and beside it what the loader could give: ``499 img/s of 1,900``."""
    return f"{rate(images_per_s):>5} img/s" + ("" if loader is None else f" of {rate(loader)}")


def level_of(name: str) -> str:
    """The level in a loss name: "cascade" in "cascade.task", "final" in "final"."""
    return name.partition(".")[0]


def number(value: float | None, spec: str) -> str:
    """Format ``value`` with ``spec``; "-" where nothing was measured."""
    return "-" if value is None else format(value, spec)


def loss_text(value: float | None) -> str:
    """At most 8 characters, and never "0.000" for a loss that is not zero."""
    if value is None or not math.isfinite(value):
        return number(value, "f")
    small_or_large = value != 0 and not 1e-3 <= abs(value) < 1e4
    return f"{value:.1e}" if small_or_large else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Write seconds as m:ss or h:mm:ss; "-:--" for NaN or infinity."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
