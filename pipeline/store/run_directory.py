"""The directory of one run: config.toml, metrics.jsonl (a line per epoch), summary.json and saved states.

JSON has no NaN and no infinity; such numbers are written as ``null``, so strict readers accept the files.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import ConfigError, shown
from pipeline.base.paths import is_text
from pipeline.store.atomic import temporary_of, write_atomically
from pipeline.store.records import EpochRecord

CONFIG, PLAN, METRICS, SUMMARY = "config.toml", "plan.json", "metrics.jsonl", "summary.json"


@dataclass(frozen=True)
class RunDirectory:
    """Files of one run below ``path``; the constructor touches nothing, ``create`` makes the directory.

    The writing methods raise OSError when the disk refuses.
    """

    path: Path

    @classmethod
    def create(cls, path: Path | None, name: str, resume: bool = False) -> RunDirectory:
        """Make ``path``, or ``runs/<name>-<YYYYmmdd-HHMMSS>`` below the current directory when it is None.

        With ``resume`` it may hold a run. Raises ConfigError (one line) when it does otherwise, or cannot be written.
        """
        if path is not None and not is_text(path):
            raise ConfigError(f"run directory {shown(str(path))} is not text in UTF-8; give --run-dir a name that is")
        try:
            path = _make_default(name) if path is None else path
            path.mkdir(parents=True, exist_ok=True)
            probe = temporary_of(path / "writable")
            probe.touch()
            probe.unlink()
        except OSError as error:
            place = error.filename if path is None else path
            raise ConfigError(
                f"run directory '{place}' cannot be written ({error.strerror}); choose another with --run-dir"
            ) from error
        for held in (SUMMARY, METRICS):
            if not resume and (path / held).exists():
                fix = "choose another with --run-dir or delete it"
                raise ConfigError(f"run directory '{path}' already holds a run ({held}); {fix}")
        return cls(path)

    def write_config(self, text: str) -> Path:
        """Write the resolved configuration to config.toml and return its path."""
        target = self.path / CONFIG
        write_atomically(target, lambda file: file.write(text.encode()))
        return target

    def append(self, record: EpochRecord) -> None:
        """Add one line to metrics.jsonl; it is in the file when this returns."""
        line = json.dumps(json_ready(asdict(record)), allow_nan=False)
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def begin_metrics(self, records: Sequence[EpochRecord]) -> None:
        """Let metrics.jsonl hold ``records``, those of a run that goes on. Without any, what an interrupted run has
        left there is kept as metrics.interrupted.jsonl."""
        target = self.path / METRICS
        if records:
            lines = [json.dumps(json_ready(asdict(record)), allow_nan=False) + "\n" for record in records]
            write_atomically(target, lambda file: file.write("".join(lines).encode()))
        elif target.exists():
            os.replace(target, target.with_suffix(".interrupted.jsonl"))

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write summary.json in one go (a reader sees the old file or the new one) and return its path."""
        text = json.dumps(json_ready(summary), indent=2, allow_nan=False) + "\n"
        target = self.path / SUMMARY
        write_atomically(target, lambda file: file.write(text.encode()))
        return target


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl, one dict per epoch; a last line cut short by a killed run is left out.

    Raises ConfigError when the file is missing or a complete line is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"metrics '{path}' cannot be read ({error.strerror}); give a run's {METRICS}"
        ) from error
    complete = text[: text.rfind("\n") + 1].splitlines()
    epochs = []
    for number, line in enumerate(complete, start=1):
        try:
            epochs.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"metrics '{path}' line {number} is not JSON ({error.msg}); delete the line"
            ) from error
    return epochs


def summarise(epochs: Sequence[EpochRecord], *, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of summary.json: ``settings`` and what the finished ``epochs`` add up to.

    ``settings`` gives what epochs cannot tell (world_size, modules, method, schedule, weights_sha256,
    run_directory, ...); where a name is in both, the measured value stands. ``test_error_pct`` is the
    last epoch's: ``best_test_error_pct`` was picked by looking at the test set and is no result. ``metric`` says what
    the first metric of the task is and how it reads. ``heads`` are the last epoch's modules, with the
    ``skipped_steps`` of all epochs.
    ``loader_images_per_s`` is what the loader could have given in the last epoch.
    ``images_per_s`` is the median over epochs, without the first (warm-up) when there are others. Raises
    ConfigError when no epoch finished.
    """
    if not epochs:
        raise ConfigError("no epoch was finished, so there is nothing to summarise; train at least 1 epoch")
    last = epochs[-1]
    errors = [epoch.test_error_pct for epoch in epochs if epoch.test_error_pct is not None]
    return {
        **settings,
        "test_error_pct": last.test_error_pct,
        "best_test_error_pct": min(errors, default=None),
        "test_metrics": last.test_metrics,
        "test_text": last.test_text,
        "metric": asdict(last.metric),
        "test_loss": last.test_loss,
        "ema_metrics": last.ema_metrics,
        "train_loss": last.train_loss,
        "epochs": last.epoch,
        "steps": last.step,
        "images_per_s": statistics.median(e.images_per_s for e in (epochs[1:] or epochs)),
        "loader_images_per_s": last.loader_images_per_s,
        "train_wall_s": sum(e.wall_s for e in epochs),
        "ranks": [_rank_totals(_placed_alike(epochs), position) for position in range(len(last.stages))],
        "heads": [
            {**asdict(module), "skipped_steps": sum(epoch.modules[position].skipped_steps for epoch in epochs)}
            for position, module in enumerate(last.modules)
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": _installed("torchvision"),
        },
    }


def _placed_alike(epochs: Sequence[EpochRecord]) -> list[EpochRecord]:
    """The epochs with the last one's modules on every rank: a run may go on with other ranks."""
    last = [stage.modules for stage in epochs[-1].stages]
    return [epoch for epoch in epochs if [stage.modules for stage in epoch.stages] == last]


def _rank_totals(epochs: Sequence[EpochRecord], position: int) -> dict[str, Any]:
    """Add up one rank's epochs; fractions are over its whole training wall time."""
    stages = [epoch.stages[position] for epoch in epochs]
    wall = sum(stage.wall_s for stage in stages)
    return {
        "rank": stages[-1].rank,
        "device": stages[-1].device,
        "modules": list(stages[-1].modules),
        "busy_fraction": sum(stage.busy_s for stage in stages) / wall if wall > 0 else 0.0,
        "wait_fraction": sum(stage.wait_s for stage in stages) / wall if wall > 0 else 0.0,
        "queue_depth": statistics.fmean(stage.queue_depth for stage in stages),
        "peak_memory_bytes": max(stage.peak_memory_bytes for stage in stages),
        "bytes_sent": sum(stage.bytes_sent for stage in stages),
        **{key: sum(getattr(stage, key) for stage in stages) for key in ("steps", "reused", "skipped", "held_back")},
    }


def _make_default(name: str) -> Path:
    """Make a new directory below runs/; two runs started within one second get different ones."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    stem = f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"
    attempt = 1
    while True:
        path = Path("runs") / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.is_dir():  # "runs" itself is a file: no other number will help
                raise
            attempt += 1


def json_ready(value: Any) -> Any:
    """Copy nested data with NaN and infinity as None, tuples as lists and paths as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
