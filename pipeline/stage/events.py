"""What every rank did when, on one clock: recorded by a run or predicted by a simulation, in the same form.

    rank 0   | F C R I | wait |  B  U | F ...        events of one rank never overlap, except SEND: a message on its way
    rank 1        | F C R I | wait |  B  U |
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import ConfigError

WAIT = "wait"
"""Kind of an event in which a stage has nothing to do: it waits for a message, for data or for room in a queue."""
SEND = "send"
"""Kind of an event in which a message is on its way; the stage works on meanwhile."""
ADOPT = "A"
"""Kind of the one action that belongs to a step long after the one whose batch it names."""
NAMES = {
    "F": "forward",
    "C": "cascade head",
    "I": "independent head",
    "L": "final loss",
    "R": "cascade backward",
    "B": "backward",
    "U": "update",
    "S": "share weights",
    ADOPT: "adopt weights",
    WAIT: "wait",
    SEND: "send",
}
_FORMAT = "localpipe-trace-1"


@dataclass(frozen=True)
class Event:
    """One stretch of time on one rank.

    Attributes:
        rank: the stage.
        kind: a letter of :class:`pipeline.stage.schedule.Kind`, WAIT or SEND.
        module: local module at work; for WAIT and SEND the module whose message or turn it is.
        micro_batch: of the action; -1 for an update.
        step: the step whose batch is worked on.
        start_s, end_s: seconds on a clock that all ranks share.
    """

    rank: int
    kind: str
    module: int
    micro_batch: int
    step: int
    start_s: float
    end_s: float

    @property
    def label(self) -> str:
        """For people: ``F3.0 step 7``."""
        part = f".{self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"{self.kind}{self.module}{part} step {self.step}"


@dataclass(frozen=True)
class SteadyState:
    """How a pipeline runs once it is full.

    Attributes:
        step_s: seconds from one step to the next.
        busy: share of the time that each rank works, by rank.
        stage_s: seconds of work of each rank for one step.
    """

    step_s: float
    busy: tuple[float, ...]
    stage_s: tuple[float, ...]

    @property
    def bound_s(self) -> float:
        """No schedule can make a step shorter: the work of the busiest rank."""
        return max(self.stage_s)

    @property
    def efficiency(self) -> float:
        """Share of the bound that is reached: bound / step."""
        return self.bound_s / self.step_s


def steady_state(events: Sequence[Event], first: int, last: int) -> SteadyState:
    """Rates between the ends of steps ``first`` and ``last`` (> first), each rank in its own window; of the slowest.

    A step of a rank ends with its last action on that step's batch. Ranks before the slowest may run ahead of it, but
    only until the queues between them are full.

    Raises:
        ValueError: a rank has no event of one of the two steps.
    """
    if last <= first:
        raise ValueError(f"steps {first}..{last} are no window; the last must be larger")
    by_rank: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind not in (WAIT, SEND, ADOPT):
            by_rank[event.rank].append(event)
    step_s, busy, stage_s = [], [], []
    for rank in sorted(by_rank):
        mine = by_rank[rank]
        ends = {step: max((e.end_s for e in mine if e.step == step), default=None) for step in (first, last)}
        begin, end = ends[first], ends[last]
        if begin is None or end is None:
            raise ValueError(f"rank {rank} has no event of step {first if begin is None else last}")
        work = sum(min(e.end_s, end) - max(e.start_s, begin) for e in mine if e.start_s < end and e.end_s > begin)
        step_s.append((end - begin) / (last - first))
        busy.append(work / (end - begin) if end > begin else 0.0)  # a predicted rank may cost nothing
        stage_s.append(work / (last - first))
    return SteadyState(max(step_s), tuple(busy), tuple(stage_s))


def write_trace(events: Iterable[Event], path: Path, title: str) -> None:
    """Write a Chrome trace (chrome://tracing, ui.perfetto.dev): a process per rank, rows for work and for sends."""
    rows: list[dict[str, object]] = []
    ranks: set[int] = set()
    free: dict[int, list[float]] = defaultdict(list)  # by rank and row of messages: when its last one ended
    for event in sorted(events, key=lambda event: event.start_s):
        ranks.add(event.rank)
        rows.append(
            {
                "name": event.label if event.kind not in (WAIT, SEND) else event.kind,
                "cat": NAMES[event.kind],
                "ph": "X",
                "ts": event.start_s * 1e6,
                "dur": (event.end_s - event.start_s) * 1e6,
                "pid": event.rank,
                "tid": 1 + _row(free[event.rank], event) if event.kind == SEND else 0,
                "args": {k: v for k, v in dataclasses.asdict(event).items() if k not in ("start_s", "end_s", "rank")},
            }
        )
    for rank in sorted(ranks):
        names = [("process_name", 0, f"rank {rank}"), ("thread_name", 0, "stage")]
        names += [("thread_name", 1 + row, "messages sent") for row in range(len(free[rank]))]
        rows += [{"name": n, "ph": "M", "pid": rank, "tid": tid, "args": {"name": text}} for n, tid, text in names]
    document = {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {"format": _FORMAT, "title": title}}
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


def _row(ends: list[float], event: Event) -> int:
    """The first row that is free when ``event`` starts: slices of one row of a Chrome trace must not overlap."""
    for row, end in enumerate(ends):
        if end <= event.start_s:
            ends[row] = event.end_s
            return row
    ends.append(event.end_s)
    return len(ends) - 1


def read_trace(path: Path) -> tuple[Event, ...]:
    """The events of a trace that :func:`write_trace` wrote, in order of time.

    Raises:
        ConfigError: the file is no such trace.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["otherData"]["format"] != _FORMAT:
            raise KeyError("format")
        events = [
            Event(rank=row["pid"], start_s=row["ts"] / 1e6, end_s=(row["ts"] + row["dur"]) / 1e6, **row["args"])
            for row in document["traceEvents"]
            if row["ph"] == "X"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"trace '{path}' cannot be read ({error}); give a trace.json that --trace wrote") from None
    return tuple(sorted(events, key=lambda event: (event.start_s, event.rank)))
