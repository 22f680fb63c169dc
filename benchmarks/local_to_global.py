"""From local to global in one picture: error against the time of a step against memory, by K and by the span k.

    python benchmarks/accuracy.py --rows local-to-global ... --json accuracy.json
    python benchmarks/local_to_global.py --accuracy accuracy.json --chart local-to-global.png

    error   of the runs of benchmarks/accuracy.py, at their budget
    time    of a step on P devices, by the simulator, from the costs of the local modules measured here, on one core;
            backpropagation on one device from its measured cost, its pipelines by their closed forms, in equal parts
    memory  of the fullest rank, counted (pipeline.step_memory)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from accuracy_chart import draw_local_to_global
from memory_baselines import pipelined
from rows import local_to_global, row_of
from runner import Report, Target, main, option
from tables import Column, P, Row, Table

from pipeline import ConfigError, explain, step_memory
from pipeline import measure as profile_of

MIB = 2**20
FILLING = {"1F1B": ("1F1B", 1), "ZBV": ("ZBVZeroBubble", 0)}
"""Pipelines of backpropagation: torch's name, and f, where a step on P ranks takes M + f (P - 1) micro-batches' time;
without any bubble is the least that a zero-bubble schedule can take."""
IMAGE, CLASSES = (3, 32, 32), 10


@dataclass(frozen=True)
class Settings:
    accuracy: str = option("accuracy.json", "result of benchmarks/accuracy.py", "FILE.json")
    ranks: int = option(4, "virtual devices", "P", above=1)
    micro_batches: int = option(4, "of the pipelines of backpropagation", "M")
    epochs: int = option(0, "which budget of the file; 0: the one that most rows have", "N", above=-1)
    steps: int = option(3, "steps of every module that are measured", "N")
    batch: int = option(0, "images of a measured step; 0: as in training. Times are scaled", "N", above=-1)


def measure(settings: Settings) -> Report:
    """Time and memory of every row that has an error."""
    trained = read_accuracy(Path(settings.accuracy), settings.epochs)
    batch = trained["settings"]["batch"]
    rows = [row for each in trained["rows"] for row in cost_of(each, settings, batch, trained["settings"]["network"])]
    bp = next((row["step_s"] for row in rows if row["system"] == "BP"), None)
    if bp is None:
        raise ConfigError(f"--accuracy {settings.accuracy}: no row is backpropagation; add its row to the runs")
    for row in rows:
        row["units"] = row["step_s"] / bp
        row["reached"] = [[epoch * row["units"], error] for epoch, error in row["curve"]]
    targets, said = [], []
    for system in (name for row in rows if (name := row["system"]).startswith("BP")):
        found = list(gains(rows, system))
        text = f"time of the fastest local setting to an error, to that of {system}"
        targets.append(Target(text, {f"{error} %": gain for error, gain in found[:1]}, most=1.0))
        said.append(f"The same by error: {told(found) or 'none is reached by both'} ({system}).")
    about = (
        f"Errors after {rows[0]['epochs']} epochs of {rows[0]['images']:,} images ({Path(settings.accuracy).name}). "
        f"Step: batch {batch} on {settings.ranks} virtual devices (K of them where K is smaller), to a step of "
        f"backpropagation on one; pipelines of backpropagation with M = {settings.micro_batches}, ZBV without any "
        "bubble, which no real one reaches. Memory: of the fullest rank. k: modules that a gradient reaches."
    )
    return Report("From local to global", [Table(COLUMNS, rows)], [about], targets, said,
                  draw=lambda path: draw_local_to_global(rows, path))  # fmt: skip


COLUMNS = (
    Column("system", "system"), Column("K", "asked"), Column("k", "span"), P, Column("error %", "error", ".2f"),
    Column("step, to BP's", "units", ".2f"), Column("memory MiB", lambda row: row["bytes"] / MIB, ",.0f"),
)  # fmt: skip


def read_accuracy(path: Path, epochs: int) -> dict[str, Any]:
    """The settings and the rows of one budget, one network and data set, that are on the way from local to global.

    Raises:
        ConfigError: no such file, or nothing of that budget.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["rows"]
        budget = epochs or max((r["epochs"] for r in rows), key=lambda e: (sum(r["epochs"] == e for r in rows), e))
        group = next(row["group"] for row in rows)
        wanted = local_to_global(group)
        chosen = [row for row in rows if row["epochs"] == budget and row["name"] in wanted]
        settings = {"batch": found["settings"]["batch"], "network": found["settings"]["network"]}
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise ConfigError(f"--accuracy {path}: no result of benchmarks/accuracy.py ({type(error).__name__})") from error
    if not chosen:
        raise ConfigError(f"--epochs {epochs}: {path} has no row of that budget")
    return {"settings": settings, "rows": chosen}


def cost_of(trained: Mapping[str, Any], settings: Settings, batch: int, network: str) -> Iterator[Row]:
    """A row with step time and memory; of backpropagation its pipelines too."""
    measured = settings.batch or batch
    keys = [f"data.batch_size={measured}", "partition.kind=measured", "train.epochs=2", "optim.warmup_epochs=1",
            f"partition.steps={settings.steps}", "runtime.device=cpu"]  # fmt: skip
    config = row_of(trained["name"]).config([*keys, *([f"model.name={network}"] if network else [])])
    modules = trained["modules"]
    ranks = min(settings.ranks, modules)
    profile = profile_of(replace(config, runtime=replace(config.runtime, threads=1)), ranks)
    step_s = explain(config, ranks, profile).step_s * batch / measured
    full = replace(config, data=replace(config.data, batch_size=batch))
    peak = max(rank.peak for rank in step_memory(full, IMAGE, CLASSES, ranks))
    plain = modules == 1
    row = {
        "name": trained["name"], "system": "BP" if plain else trained["title"], "modules": modules,
        "asked": trained["k"], "ranks": ranks,
        "span": 1 if plain else config.hierarchy.cascade_span, "error": trained["error"], "epochs": trained["epochs"],
        "images": trained["images"], "curve": mean_curve(trained), "step_s": step_s, "bytes": peak,
    }  # fmt: skip
    yield row
    if plain:
        places, parts = settings.ranks, settings.micro_batches
        for name, (schedule, filling) in FILLING.items():
            found = pipelined(schedule, parts, places, config.model.name, (batch, *IMAGE), CLASSES)
            yield {**row, "system": f"BP, {name}", "ranks": places, "bytes": found,
                   "step_s": step_s / places * (parts + filling * (places - 1)) / parts}  # fmt: skip


def mean_curve(trained: Mapping[str, Any]) -> list[list[float]]:
    """(epoch, error), mean over the seeds that have that epoch tested."""
    curves = [dict(map(tuple, run["curve"])) for run in trained["runs"]]
    epochs = sorted(set.intersection(*map(set, curves)))
    return [[epoch, sum(curve[epoch] for curve in curves) / len(curves)] for epoch in epochs]


def first_time(row: Row, error: float) -> float:
    """In epochs of backpropagation on one device until ``error`` is measured; infinite if it never is."""
    return min((time for time, found in row["reached"] if found <= error), default=math.inf)


def gains(rows: Sequence[Row], system: str) -> Iterator[tuple[int, float]]:
    """(error, time of the fastest local setting to that of ``system``), for whole errors that both reach."""
    local = [row for row in rows if not row["system"].startswith("BP")]
    other = next(row for row in rows if row["system"] == system)
    errors = [error for row in rows for _, error in row["reached"]]
    for error in range(math.ceil(min(errors)), math.ceil(max(errors)) + 1):
        ours, theirs = min((first_time(row, error) for row in local), default=math.inf), first_time(other, error)
        if ours < math.inf and theirs < math.inf:
            yield error, ours / theirs


def told(found: Sequence[tuple[int, float]]) -> str:
    """For people: ``56 - 71 %: 0.82, 72 - 80 %: 0.41``."""
    spans = [(gain, [error for error, _ in same]) for gain, same in groupby(found, key=lambda item: item[1])]
    return ", ".join(f"{errors[0]} - {errors[-1]} %: {gain:.2f}" for gain, errors in spans)


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"steps": 1, "batch": 8}, chart="error, time and memory in one picture")
