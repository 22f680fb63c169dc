"""Where the time of a training step goes, operation by operation, on one CPU thread.

    python benchmarks/operations.py [--method NAME ...] [--quick] [--json FILE] [--output FILE.md] ...      see --help

The methods are those of step_cost.py. A profiler makes every step slower, the more steps it has kept: the shares count
here, and for times, ratios and the operations of a step that tool: the profiler's calls are those of kernels within
operations too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runner import Report, main, option
from step_cost import METHODS, Case, method_case, run_steps
from tables import Column, Row, Table
from torch.profiler import ProfilerActivity, profile

SHOWN = ("BP", "HPFF as released, 2c2f", "InfoPro + HPFF, 2c2f", "DGL + HPFF", "PredSim + HPFF", "DGL")
COLUMNS = (
    Column("operation", lambda row: row["name"].removeprefix("aten::")), Column("calls", "calls"),
    Column("ms", "ms", ".1f"), Column("share %", "share", ".1f"),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    method: tuple[str, ...] = option(SHOWN, "what to run", "NAME", choices=list(METHODS))
    precision: str = option("fp32", "of BP and of the methods", choices=("fp32", "bf16"))
    batch: int = option(128, "images of a step", "N", above=1)
    steps: int = option(1, "profiled steps", "N")
    top: int = option(16, "operations to show", "N")
    threads: int = 1


def operations(case: Case, steps: int) -> list[Row]:
    """All calls of every operation in a step, the longest first: means over ``steps`` steps after two to warm up.
    Milliseconds are without the operations that it calls itself."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    at_step = {2: profiler.start, 2 + steps: profiler.stop}

    def started(step: int, _: Any) -> None:
        at_step.pop(step, lambda: None)()

    run_steps(case, steps + 3, started)
    found = []
    for event in profiler.key_averages():
        if (ms := event.self_cpu_time_total / 1e3 / steps) > 0:
            found.append({"method": case.name, "name": event.key, "calls": event.count // steps, "ms": ms})
    return sorted(found, key=lambda row: -row["ms"])


def summary(found: Sequence[list[Row]]) -> Table:
    """All calls of a step; and of how many tensors it has a gradient, since on a CPU every weight is updated alone."""
    rows = []
    for of_method in found:
        calls = {row["name"]: row["calls"] for row in of_method}
        every = sum(calls.values())
        rows.append({
            "method": of_method[0]["method"], "calls": every, "ms": sum(row["ms"] for row in of_method),
            "gradients": calls.get("torch::autograd::AccumulateGrad", 0),
        })  # fmt: skip
    for row in rows:
        row["ratio"] = row["calls"] / rows[0]["calls"] if rows[0]["method"] == "BP" else None
    columns = (
        Column("method", "method"), Column("ms", "ms", ".0f"), Column("calls", "calls", ",d"),
        Column("per BP's", "ratio", ".2f"), Column("gradients", "gradients", ",d"),
    )  # fmt: skip
    return Table(columns, rows, "All calls of a step")


def table(found: list[Row], top: int) -> Table:
    """The ``top`` longest, and the rest on one line."""
    rest = found[top:]
    total = sum(row["ms"] for row in found)
    others = {"name": "all others", "calls": sum(row["calls"] for row in rest), "ms": sum(row["ms"] for row in rest)}
    rows = [{**row, "share": 100 * row["ms"] / total} for row in [*found[:top], others]]
    return Table(COLUMNS, rows, f"{found[0]['method']}: {total:.0f} ms")


def measure(settings: Settings) -> Report:
    """One table for every method."""
    names = [name for name in METHODS if name in settings.method]
    found = [operations(method_case(name, settings.batch, settings.precision), settings.steps) for name in names]
    tables = [summary(found), *(table(rows, settings.top) for rows in found)]
    return Report("Operations of a training step", tables, rows=[row for rows in found for row in rows])


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"batch": 16, "steps": 1})
