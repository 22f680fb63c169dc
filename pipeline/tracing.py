"""The trace of a run (``--trace``): a recorder on every rank, one file and one picture from rank 0."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from pipeline.assembly import Plan
from pipeline.connect import Edges
from pipeline.recorder import Recorder, by_time, clock_offset_s
from pipeline.report import plot_timeline
from pipeline.runtime import Runtime
from pipeline.timeline import write_trace


def attach(runtime: Runtime, plan: Plan, edges: Edges) -> Recorder:
    """A recorder for this rank's stage, told of its messages by the edges. Collective: clocks are compared."""
    offset = clock_offset_s(runtime.store, runtime.rank, runtime.world_size)
    recorder = Recorder(runtime.rank, runtime.device, offset)
    stage = plan.stages[runtime.rank]
    for sender, module in ((edges.activation_out, stage[-1]), (edges.gradient_out, stage[0])):
        if sender is not None:
            sender.on_taken = functools.partial(recorder.sent, module)
    return recorder


def write(runtime: Runtime, recorder: Recorder, plan: Plan, folder: Path, steps: int, draw: bool) -> None:
    """Gather the events of all ranks. Rank 0 writes trace.json and, to ``draw`` and with matplotlib, trace.png: two
    steps from the middle of the first ``steps``. Collective."""
    gathered = runtime.gather(recorder.events())
    if gathered is None:
        return
    events = by_time(event for part in gathered for event in part)
    config = plan.config
    title = f"{config.model.name}, {config.method.name}, schedule {config.schedule.kind}"
    write_trace(events, folder / "trace.json", title)
    if draw and can_draw():
        plot_timeline(events, folder / "trace.png", max(steps // 2 - 1, 0), title=title)


def can_draw() -> bool:
    """Whether matplotlib, an optional dependency, is there."""
    return importlib.util.find_spec("matplotlib") is not None
