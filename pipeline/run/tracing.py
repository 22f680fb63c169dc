"""The trace of a run (``--trace``): a recorder on every rank, one file and one picture from rank 0."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from pipeline.edges.connect import Edges
from pipeline.plan.assembly import Plan
from pipeline.ranks.runtime import Runtime
from pipeline.report.timeline_chart import plot_timeline
from pipeline.stage.events import SEND, write_trace
from pipeline.stage.recorder import LIMIT, Recorder, by_time, clock_offset_s


def attach(runtime: Runtime, stage: range, edges: Edges) -> Recorder:
    """A recorder for this rank's ``stage``, told of its messages by the edges. Collective: clocks are compared."""
    rank = runtime.team.rank
    recorder = Recorder(rank, runtime.device, clock_offset_s(runtime.team))
    upstream = ((edges.gradient_out, stage[0]), (edges.weights_out, stage[0]))
    for sender, module in ((edges.activation_out, stage[-1]), *upstream):
        if sender is not None:
            sender.on_taken = functools.partial(recorder.sent, module)
    return recorder


def write(runtime: Runtime, recorder: Recorder, plan: Plan, folder: Path, steps: int, draw: bool) -> list[str]:
    """Gather the events of all ranks. Rank 0 writes trace.json and, to ``draw`` and with matplotlib, trace.png: two
    steps from the middle of the first ``steps``. Collective.

    Returns:
        What the user should know: the trace is cut short, or the picture could not be drawn. Neither ends a run.
    """
    gathered = runtime.team.gather((recorder.events(), recorder.full))
    if gathered is None:
        return []
    notes = []
    events = by_time(event for part, _ in gathered for event in part)
    last = [max((e.step for e in part if e.kind != SEND), default=0) for part, _ in gathered]
    if any(full for _, full in gathered):
        notes.append(f"trace.json ends at step {min(last)}: a rank keeps {LIMIT} actions")
    config = plan.config
    title = f"{config.model.name}, {config.method.name}, schedule {config.schedule.kind}"
    write_trace(events, folder / "trace.json", title)
    if draw and can_draw():
        first = max(min(steps // 2, *last) - 1, 0)
        try:
            plot_timeline(events, folder / "trace.png", first, title=title, linked=config.schedule.kind != "free")
        except Exception as error:  # whatever matplotlib stumbles over, the run itself is complete
            notes.append(f"trace.png could not be drawn: {type(error).__name__}: {error}")
    return notes


def can_draw() -> bool:
    """Whether matplotlib, an optional dependency, is there."""
    return importlib.util.find_spec("matplotlib") is not None


def cannot_draw() -> str:
    """What to say at the start where it is not, else nothing."""
    if can_draw():
        return ""
    return "--trace writes trace.json only; trace.png needs matplotlib: pip install localpipe[plot]"
