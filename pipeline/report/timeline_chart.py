"""A picture of some steps of the pipeline; matplotlib is an optional dependency and loaded only here.

    rank 0  |F3|I3|  //wait//  |B3 |U|F4| ...      one row per rank, one colour per kind of action
              \\        /                           thin arrows: an activation to the next rank's forward,
    rank 1     |F3|C3|R3|I3|..|B3|U|               and a gradient back to the backward that uses it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.stage.events import NAMES, SEND, WAIT, Event

# Okabe and Ito's palette: it stays apart for colour-blind readers.
_COLOURS = {
    "F": "#56b4e9",
    "C": "#e69f00",
    "R": "#d55e00",
    "I": "#f0e442",
    "L": "#cc79a7",
    "B": "#009e73",
    "U": "#333333",
    "S": "#0072b2",
    "A": "#999999",
    WAIT: "#f4f4f4",
}
_DARK = ("R", "B", "U", "S")
_RANKS = 16
"""More rows are not legible."""
_FORWARD_ARROW, _GRADIENT_ARROW = "#0072b2", "#b03a00"
_ARROW = {"arrowstyle": "-|>", "lw": 0.9, "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
_BAR = 0.62
"""Height of a bar where a row is 1 high."""


def plot_timeline(
    events: Sequence[Event], png: Path, first_step: int, steps: int = 2, title: str = "", linked: bool = True
) -> None:
    """Draw the steps ``first_step`` .. ``first_step + steps - 1`` of recorded or simulated ``events`` into ``png``.

    What the ranks do meanwhile for other steps is drawn pale. Not ``linked`` (schedule `free`): every rank counts its
    own steps, so the steps are those of rank 0, no other is pale and there are no arrows.

    Raises:
        ConfigError: matplotlib is missing, or there is no event of these steps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing the timeline needs matplotlib; run: pip install localpipe[plot]") from error
    shown = range(first_step, first_step + steps)
    ranks = 1 + max((event.rank for event in events), default=-1)
    rows = min(ranks, _RANKS)
    events = [event for event in events if event.rank < rows]
    actions = [event for event in events if event.kind not in (WAIT, SEND)]
    wanted = [event for event in actions if event.step in shown and (linked or event.rank == 0)]
    if not wanted:
        there = sorted({event.step for event in actions})
        have = f"it has {there[0]} to {there[-1]}" if there else "it has none"
        raise ConfigError(f"the trace has no event of steps {shown[0]} to {shown[-1]}; {have}")
    begin, end = min(event.start_s for event in wanted), max(event.end_s for event in wanted)
    figure = Figure(figsize=(14, 1.9 + 0.62 * rows), dpi=150, layout="constrained")
    axes = figure.subplots()
    view = _View(axes, begin, end, shown, parts=max(event.micro_batch for event in actions) > 0, linked=linked)
    for event in events:
        if event.kind != SEND and event.end_s > begin and event.start_s < end:
            view.bar(event)
    if linked:
        for dependencies, colour in ((_activations(events), _FORWARD_ARROW), (_gradients(events), _GRADIENT_ARROW)):
            for dependency in dependencies:
                view.arrow(dependency, colour)
    view.brackets(wanted)
    note = f" (the first {rows} of {ranks} ranks)" if ranks > rows else ""
    heading = title or f"steps {shown[0]} to {shown[-1]}"
    axes.set_title(heading + note, loc="left", fontweight="bold", pad=8)
    view.finish(rows, [kind for kind in NAMES if any(e.kind == kind for e in events) and kind != SEND])
    figure.savefig(png)


class _View:
    """The axes, with time in milliseconds since ``begin`` (seconds) and rank 0 on top."""

    def __init__(self, axes: Any, begin: float, end: float, shown: range, parts: bool, linked: bool) -> None:
        self._axes = axes
        self._begin = begin
        self._width = 1e3 * (end - begin)
        self._shown = shown
        self._parts = parts
        self._linked = linked

    def bar(self, event: Event) -> None:
        """One event: hatched for a wait, pale for another step, its name inside where there is room."""
        start, end = max(self._ms(event.start_s), 0.0), min(self._ms(event.end_s), self._width)
        inside = event.step in self._shown or not self._linked
        waiting = event.kind == WAIT
        strength = (1.0, 0.7)[(event.step - self._shown[0]) % 2] if inside else 0.22
        self._axes.barh(
            event.rank,
            end - start,
            left=start,
            height=_BAR,
            color=_COLOURS[event.kind],
            alpha=1.0 if waiting else strength,
            hatch="////" if waiting else None,
            edgecolor="#c8c8c8" if waiting else "white",
            linewidth=0.0 if waiting else 0.6,
            zorder=1 if waiting else 2,
        )
        label = self._label(event)
        # About 190 characters of this size fit on the width of the figure.
        if inside and not waiting and end - start > len(label) * self._width / 190:
            colour = "white" if event.kind in _DARK and strength == 1.0 else "#222222"
            self._axes.text(
                (start + end) / 2, event.rank, label, ha="center", va="center", fontsize=7.5, color=colour, zorder=5
            )

    def arrow(self, dependency: _Dependency, colour: str) -> None:
        """From where the message left to the start of what needs it, on a neighbouring rank; not beyond the edges."""
        source, target = dependency.source, dependency.target
        start, end = self._ms(dependency.sent_s), self._ms(target.start_s)
        if source.step not in self._shown or start < 0 or end > self._width:
            return
        towards = 1 if target.rank > source.rank else -1
        self._axes.annotate(
            "",
            xy=(end, target.rank - towards * _BAR / 2),
            xytext=(start, source.rank + towards * _BAR / 2),
            arrowprops=_ARROW | {"color": colour},
            zorder=6,
        )

    def brackets(self, wanted: Sequence[Event]) -> None:
        """Above the first rank: which stretch belongs to which step."""
        for position, step in enumerate(self._shown):
            mine = [event for event in wanted if event.rank == 0 and event.step == step]
            if not mine:
                continue
            start, end = self._ms(min(e.start_s for e in mine)), self._ms(max(e.end_s for e in mine))
            height = -0.47 - 0.26 * (position % 2)  # steps of an asynchronous schedule overlap
            self._axes.plot([start, end], [height, height], color="#555555", linewidth=1.2, solid_capstyle="butt")
            self._axes.text(
                start, height - 0.03, f"step {step}", ha="left", va="bottom", fontsize=7.5, color="#555555"
            )

    def finish(self, rows: int, kinds: Sequence[str]) -> None:
        """Scales and legend."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        axes = self._axes
        axes.set_xlim(0, self._width)
        axes.set_ylim(rows - 0.5, -1.0)
        axes.set_yticks(range(rows), [f"rank {rank}" for rank in range(rows)])
        axes.set_xlabel("milliseconds")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        marks: list[Any] = [
            Patch(
                facecolor=_COLOURS[kind],
                hatch="////" if kind == WAIT else None,
                edgecolor="#c8c8c8" if kind == WAIT else "white",
                label=NAMES[kind] if kind == WAIT else f"{kind}  {NAMES[kind]}",
            )
            for kind in kinds
        ]
        if rows > 1 and self._linked:
            for colour, label in ((_FORWARD_ARROW, "activation"), (_GRADIENT_ARROW, "gradient, one hop")):
                marks.append(Line2D([], [], color=colour, marker=">", markersize=4, linewidth=0.9, label=label))
        axes.figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=8)

    def _ms(self, seconds: float) -> float:
        return 1e3 * (seconds - self._begin)

    def _label(self, event: Event) -> str:
        """``F3``: forward of module 3; with ``.0``, the micro-batch, where there are several."""
        micro_batch = f".{event.micro_batch}" if self._parts and event.micro_batch >= 0 else ""
        return f"{event.kind}{event.module}{micro_batch}"


@dataclass(frozen=True)
class _Dependency:
    """``target`` could not begin before a message that ``source`` had sent at ``sent_s``."""

    source: Event
    target: Event
    sent_s: float


def _activations(events: Sequence[Event]) -> list[_Dependency]:
    """From the forward of a rank's last module to the forward of the next module on the next rank."""
    sent = _Sent(events)
    forwards = {(e.module, e.micro_batch, e.step): e for e in events if e.kind == "F"}
    found = []
    for (module, micro_batch, step), source in forwards.items():
        target = forwards.get((module + 1, micro_batch, step))
        if target is not None and target.rank == source.rank + 1:
            found.append(_Dependency(source, target, sent.after(source) or source.end_s))
    return found


def _gradients(events: Sequence[Event]) -> list[_Dependency]:
    """From an action that sent a gradient to the previous rank to the backward there that uses it.

    A relay always sends; a backward does where the trace has a message that left since it began.
    """
    sent = _Sent(events)
    backwards = {(e.module, e.micro_batch, e.step): e for e in events if e.kind == "B"}
    found = []
    for source in events:
        target = backwards.get((source.module - 1, source.micro_batch, source.step))
        if source.kind not in ("R", "B") or target is None or target.rank != source.rank - 1:
            continue
        sent_s = sent.after(source)
        if source.kind == "R" or sent_s is not None:
            found.append(_Dependency(source, target, sent_s or source.end_s))
    return found


class _Sent:
    """When messages left. A recorded message leaves within its action, a simulated one at its end or later."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._starts: dict[tuple[int, int, int, int], list[float]] = defaultdict(list)
        for event in events:
            if event.kind == SEND:
                self._starts[self._key(event)].append(event.start_s)

    def after(self, action: Event) -> float | None:
        """When the first message left that was sent since ``action`` began; None: none was."""
        return min((start for start in self._starts[self._key(action)] if start >= action.start_s), default=None)

    @staticmethod
    def _key(event: Event) -> tuple[int, int, int, int]:
        return event.rank, event.module, event.micro_batch, event.step
