"""The picture of two steps: which events and arrows it shows. Nothing here looks at pixels."""

from __future__ import annotations

import builtins
import itertools
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.config import HierarchyConfig
from pipeline.base.errors import ConfigError
from pipeline.local.roles import plan_hierarchy
from pipeline.plan.placement import place
from pipeline.plan.simulate import ModuleCost, simulate
from pipeline.report.timeline_chart import _activations, _gradients, plot_timeline
from pipeline.stage.events import SEND, Event
from pipeline.stage.schedule import stage_schedule


def events(modules: int, ranks: int, span: int = 2, variant: str = "paper", **schedule: int) -> tuple[Event, ...]:
    plans = plan_hierarchy(
        modules, HierarchyConfig(cascade_span=span, variant=variant, independent_weight=1.0, cascade_weight=1.0)
    )
    parts, delay = schedule.get("micro_batches", 1), schedule.get("delay", 0)
    schedules = [stage_schedule(plans, owned, parts, delay) for owned in place(modules, ranks)]
    costs = [ModuleCost(0.01, 0.005, 0.005, 0.001, 0.01, 0.02, 0.001)] * modules
    return simulate(plans, schedules, costs, 8).events()


def arrows(found: tuple[Event, ...], step: int) -> set[tuple[str, str]]:
    """(source, target) of all gradient arrows of one step, as ``R1.0`` and ``B0.0``."""
    pairs = [(arrow.source, arrow.target) for arrow in _gradients(found) if arrow.source.step == step]
    return {tuple(event.label.partition(" ")[0] for event in pair) for pair in pairs}


@pytest.mark.parametrize(
    ("modules", "ranks", "options"),
    [(4, 4, {}), (4, 4, {"micro_batches": 2}), (4, 4, {"delay": 1}), (7, 3, {}), (17, 17, {}), (1, 1, {"span": 1})],
)
def test_a_picture_is_written(tmp_path: Path, modules: int, ranks: int, options: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    plot_timeline(events(modules, ranks, **options), tmp_path / "t.png", first_step=3, title="a [b] $c$")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_every_update_depends_on_one_hop() -> None:
    """Each gradient arrow goes from the next rank to the backward that uses it: no chain through several ranks."""
    found = events(5, 5)
    assert arrows(found, 3) == {("R1.0", "B0.0"), ("R2.0", "B1.0"), ("R3.0", "B2.0")}
    for arrow in _gradients(found):
        assert arrow.source.rank == arrow.target.rank + 1 and arrow.source.step == arrow.target.step
        assert arrow.source.end_s <= arrow.sent_s <= arrow.target.start_s


def test_a_backward_that_sends_its_gradient_has_an_arrow_too() -> None:
    assert ("B4.0", "B3.0") in arrows(events(5, 5, span=5), 3)
    assert not arrows(events(5, 5, span=1), 3)


def test_activations_go_from_a_rank_to_the_next_only() -> None:
    found = _activations(events(6, 3))
    assert {(arrow.source.module, arrow.target.module) for arrow in found} == {(1, 2), (3, 4)}
    assert all(a.target.rank == a.source.rank + 1 and a.target.start_s >= a.sent_s for a in found)


def test_an_arrow_starts_where_a_recorded_message_left() -> None:
    """In a recording an action ends a little after it has sent, and the neighbour may already be at work by then."""
    relay, backward = Event(1, "R", 1, 0, 3, 1.0, 2.0), Event(0, "B", 0, 0, 3, 1.7, 2.5)
    (arrow,) = _gradients((relay, backward, Event(1, SEND, 1, 0, 3, 1.5, 1.6)))
    assert arrow.sent_s == 1.5
    (arrow,) = _gradients((relay, backward))  # a trace without messages
    assert arrow.sent_s == relay.end_s


def test_many_ranks_are_cut_and_the_title_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    titles, rows = [], []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **options: titles.append(text))
    monkeypatch.setattr(Axes, "set_yticks", lambda self, ticks, labels: rows.extend(labels))
    plot_timeline(events(18, 18), tmp_path / "t.png", first_step=2)
    assert titles == ["steps 2 to 3 (the first 16 of 18 ranks)"]
    assert rows == [f"rank {rank}" for rank in range(16)]


def test_steps_that_are_not_there_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no event of steps 90 to 91; it has 0 to 7"):
        plot_timeline(events(2, 2), tmp_path / "t.png", first_step=90)
    with pytest.raises(ConfigError, match="no event of steps 0 to 1; it has none"):
        plot_timeline((), tmp_path / "t.png", first_step=0)


def test_without_matplotlib_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install localpipe\[plot\]"):
        plot_timeline(events(2, 2), tmp_path / "t.png", first_step=0)


def test_labels_in_a_row_do_not_repeat_a_module_by_accident() -> None:
    """A rank of several modules names each of them."""
    rank = [e for e in events(4, 2) if e.rank == 0 and e.kind == "F"]
    assert {a.module != b.module for a, b in itertools.pairwise(rank)} == {True}
