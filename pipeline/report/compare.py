"""Runs beside each other: what each has reached, at what cost, and in which keys they differ.

All of it comes from the run directories (config.toml, metrics.jsonl, model.pt); one that still goes on lacks the last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import ConfigError
from pipeline.base.metric import MetricForm
from pipeline.base.toml import parse_toml
from pipeline.report.curve import measured, metric_of
from pipeline.store.run_directory import CONFIG, METRICS, SUMMARY, json_ready, read_metrics
from pipeline.store.weights_file import MODEL

NOT_COMPARED = ("partition", "checkpoint", "log", "runtime")
"""Sections in which runs may differ and be the same experiment."""


@dataclass(frozen=True)
class RunRow:
    """One run.

    Attributes:
        name: of its directory; with parents where two have the same.
        finished: whether it has a summary; else it goes on, or was stopped.
        modules, ranks: K and P.
        epochs, of: finished ones, and how many are planned.
        best, last: of the first metric of the task on the test set; None where nothing was tested.
        images_per_s: median over the epochs, without the first where there are others.
        step_s: the same of the seconds of a step.
        peak_memory_bytes: of the rank that needs most.
        parameters: of the whole network without heads; None before its weights are written.
        curve: (epoch, training seconds so far, metric) of every epoch with a test.
        config: key -> value.
    """

    name: str
    path: str
    finished: bool
    network: str
    data: str
    method: str
    modules: int
    ranks: int
    epochs: int
    of: int
    metric: MetricForm
    best: float | None
    last: float | None
    images_per_s: float
    step_s: float
    peak_memory_bytes: int
    parameters: int | None
    curve: tuple[tuple[int, float, float], ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The runs that could be read, in the order given; a line about each that could not; a line about what makes them
    hard to compare; and the keys in which they differ, with a value per run ("-": it has no such key)."""

    runs: tuple[RunRow, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    differences: dict[str, tuple[Any, ...]]

    def write_json(self, path: Path) -> None:
        """Write everything. Raises ConfigError where the disk refuses."""
        try:
            text = json.dumps(json_ready(dataclasses.asdict(self)), indent=1, allow_nan=False)
            path.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be written ({error.strerror}); choose another place") from error


def compare(runs: Sequence[Path]) -> Comparison:
    """Read run directories.

    Raises:
        ConfigError: none of them can be read; names the first reason.
    """
    rows, left_out = [], []
    for path, name in zip(runs, _names(runs), strict=True):
        try:
            rows.append(_read(path, name))
        except ConfigError as error:
            left_out.append(str(error))
    if not rows:
        raise ConfigError(left_out[0] if left_out else "no run to compare; give run directories")
    keys = dict.fromkeys(key for row in rows for key in row.config if key.partition(".")[0] not in NOT_COMPARED)
    values = {key: tuple(row.config.get(key, "-") for row in rows) for key in keys}
    differences = {key: held for key, held in values.items() if len(set(map(repr, held))) > 1}
    return Comparison(tuple(rows), tuple(left_out), tuple(_notes(rows)), differences)


def _names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other; of the same path given twice, all of it."""
    parts = [path.absolute().parts for path in runs]
    for length in range(1, max(map(len, parts), default=0)):
        names = [os.path.join(*part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in runs]


def _read(path: Path, name: str) -> RunRow:
    """One run directory.

    Raises:
        ConfigError: it is missing or damaged, or no epoch has been finished.
    """
    if not path.is_dir():
        raise ConfigError(f"run '{path}': no such directory")
    if not (path / CONFIG).is_file():
        raise ConfigError(f"run '{path}': it holds no {CONFIG}, so it is no run directory")
    if not (path / METRICS).is_file():
        raise ConfigError(f"run '{path}': no epoch is finished yet")
    epochs = read_metrics(path / METRICS)
    if not epochs:
        raise ConfigError(f"run '{path}': no epoch is finished yet")
    try:
        sections = parse_toml((path / CONFIG).read_text(encoding="utf-8"))
        config = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
        return _row(path, name, config, epochs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"run '{path}' is damaged ({type(error).__name__}: {error}); leave it out") from error


def _row(path: Path, name: str, config: dict[str, Any], epochs: list[dict[str, Any]]) -> RunRow:
    last, metric = epochs[-1], metric_of(epochs[-1])
    curve, seconds = [], 0.0
    for epoch in epochs:
        seconds += epoch["wall_s"]
        value = measured(epoch, metric)
        if value is not None:
            curve.append((epoch["epoch"], seconds, value))
    values = [value for _, _, value in curve]
    modules = len(last["modules"])
    steps = [epoch["step"] - before for epoch, before in zip(epochs, [0, *(e["step"] for e in epochs)], strict=False)]
    warm = slice(1, None) if len(epochs) > 1 else slice(None)
    return RunRow(
        name=name,
        path=str(path),
        finished=(path / SUMMARY).is_file(),
        network=config["model.name"],
        data=config["data.name"],
        method="bp" if modules == 1 else config["method.name"],
        modules=modules,
        ranks=len(last["stages"]),
        epochs=last["epoch"],
        of=last["epochs"],
        metric=metric,
        best=(min if metric.better == "lower" else max)(values, default=None),
        last=values[-1] if values else None,
        images_per_s=statistics.median(epoch["images_per_s"] for epoch in epochs[warm]),
        step_s=statistics.median(e["wall_s"] / max(n, 1) for e, n in list(zip(epochs, steps, strict=True))[warm]),
        peak_memory_bytes=max(stage["peak_memory_bytes"] for stage in last["stages"]),
        parameters=_parameters(path / MODEL),
        curve=tuple(curve),
        config=config,
    )


def _parameters(file: Path) -> int | None:
    """Trained numbers in the weights of a finished run; buffers, as of BatchNorm, are not counted."""
    if not file.is_file():
        return None
    try:
        state: Mapping[str, torch.Tensor] = torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # a file of another kind, or cut short: the run itself can be compared
        return None
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(tensor.numel() for name, tensor in state.items() if name.rpartition(".")[2] not in buffers)


def _notes(rows: Sequence[RunRow]) -> list[str]:
    """What makes the numbers hard to compare."""
    notes = []
    for what, values in (
        ("different data", [row.data for row in rows]),
        ("different metrics", [row.metric.title for row in rows]),
    ):
        if len(set(values)) > 1:
            held: dict[str, list[str]] = {}
            for row, value in zip(rows, values, strict=True):
                held.setdefault(value, []).append(row.name)
            told = ", ".join(f"{value} ({', '.join(names)})" for value, names in held.items())
            notes.append(f"{what}, so the results are not of one task: {told}")
    return notes
