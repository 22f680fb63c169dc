"""A plan on the screen: which rank owns what, what a step costs there, and how fast the pipeline would be.

    modules   blocks, heads, parameters, ms of every action, memory
    ranks     modules, ms of work, busy share, memory, bytes sent in a step
    forms     of the heads' work: patches at once or not, levels together or not; time and memory of each
    totals    step time, images/s, bubble, the bound that no schedule beats, other placements
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.base.units import mebibytes, rate
from pipeline.plan.report import PlannedForm, PlannedModule, PlannedRank, PlanReport
from pipeline.report.console import output_console
from pipeline.stage.events import NAMES, SEND, WAIT

_LEVELS = {"cascade": "C", "independent": "I", "final": "L"}


def show_plan(report: PlanReport, console: Console | None = None) -> None:
    """Print ``report`` as tables on ``console`` (default: standard output)."""
    console = output_console(console)
    for number, line in enumerate(report.lines):
        console.print(line, style="bold" if number == 0 else None, markup=False, highlight=False, soft_wrap=True)
    tables = [
        ("Local modules (milliseconds for a whole batch)", _module_table(report.modules, console.width)),
        ("Ranks (one step)" if report.replicas == 1 else "Ranks of a replica (one step)", _rank_table(report.ranks)),
    ]
    if report.forms:
        tables.append(("Forms of the heads' work (* as configured)", _form_table(report.forms, console.width)))
    for title, table in tables:
        console.print()
        console.print(title, style="bold")
        console.print(table)
    console.print()
    for name, text in _totals(report):
        console.print(f"{name:<17}{text}", markup=False, highlight=False, soft_wrap=True)


def schedule_text(report: PlanReport) -> str:
    """Every rank's actions of one step, a line per rank, under a legend of one line."""
    rare = {action[0] for actions in report.schedules for action in actions} & {"S", "A"}
    letters = ", ".join(f"{k} {name}" for k, name in NAMES.items() if k not in {WAIT, SEND, "S", "A"} - rare)
    lines = [f"{letters}; F2.1 = module 2, micro-batch 1; ->k sends the gradient of key k; @-1 of the step before"]
    lines[0] += "; /n of every n-th step" if rare else ""
    width = len(str(len(report.schedules) - 1))
    lines += [f"rank {rank:>{width}}  {' '.join(actions)}" for rank, actions in enumerate(report.schedules)]
    return "\n".join(lines)


def _time_of(kind: str) -> Callable[[PlannedModule], str]:
    return lambda module: _ms(module.seconds.get(kind))


def _module_table(modules: Sequence[PlannedModule], width: int) -> Table:
    """``width``: columns of the console; on a narrow one the less important columns are left out."""
    kinds = [kind for kind in NAMES if any(kind in module.seconds for module in modules)]
    counted = all(module.bp_units is not None for module in modules)
    room = width - 16 if counted else width
    about: list[tuple[str, int, Callable[[PlannedModule], str]]] = [
        ("#", 0, lambda m: str(m.index)),
        ("rank", 0, lambda m: str(m.rank)),
        ("blocks", 0, lambda m: m.blocks),
        ("heads", 110, lambda m: " ".join(_LEVELS[level] for level in m.levels) or "-"),
        ("weights", 100, lambda m: f"{m.parameters:,}"),
        ("weights\nof heads", 120, lambda m: f"{m.head_parameters:,}"),
    ]
    for kind in kinds:
        heading = f"{NAMES[kind]} {kind}".replace("independent", "indep.").replace(" ", "\n")
        about.append((heading, 90 if kind == "U" else 0, _time_of(kind)))
    about.append(("all", 0, lambda m: _ms(m.step_s)))
    if counted:
        about.append(("BP\nunits", 84, lambda m: f"{m.bp_units:.3f}"))
        about.append(("opera-\ntions", 94, lambda m: f"{m.operations:,.0f}"))
    about += [("memory\nMiB", 90, lambda m: mebibytes(m.memory_bytes))]
    columns = [(heading, cell) for heading, least, cell in about if room >= least]
    table = _table(*(heading for heading, _ in columns), gap=2 if room >= (144 if counted else 120) else 1)
    for module in modules:
        table.add_row(*(Text(cell(module)) for _, cell in columns))
    return table


def _rank_table(ranks: Sequence[PlannedRank]) -> Table:
    averaged = any(rank.averaged_bytes for rank in ranks)
    more = ["averaged\nMiB"] if averaged else []
    headings = ("rank", "modules", "work\nms", "busy\n%", "memory\nMiB", "sent down\nMiB", "sent up\nMiB", *more)
    table = _table(*headings, gap=2)
    for rank in ranks:
        first, last = rank.modules
        table.add_row(
            str(rank.rank),
            str(first) if first == last else f"{first}-{last}",
            _ms(rank.work_s),
            f"{100 * rank.busy:.1f}",
            mebibytes(rank.memory_bytes),
            mebibytes(rank.sent_down_bytes),
            mebibytes(rank.sent_up_bytes),
            *([mebibytes(rank.averaged_bytes)] if averaged else []),
        )
    return table


def _form_table(forms: Sequence[PlannedForm], width: int) -> Table:
    """``width``: of the console."""
    everyone = width >= 100 and all(len(form.memory_bytes or ()) <= 8 for form in forms)
    columns: list[tuple[str, Callable[[PlannedForm], str]]] = [
        ("", lambda f: "*" if f.configured else ""),
        ("patches.\nat_once", lambda f: str(f.at_once)),
        ("hierarchy.\nlevels", lambda f: f.levels),
        ("patches\nat once", lambda f: "-" if f.patches is None else _patches(*f.patches)),
        ("levels\ntogether", lambda f: f"{f.together} modules" if f.together else "-"),
        ("step\nms", lambda f: _ms(f.step_s)),
        ("opera-\ntions", lambda f: "-" if f.operations is None else f"{f.operations:,}"),
        ("largest rank\nMiB", lambda f: "-" if f.memory_bytes is None else mebibytes(max(f.memory_bytes))),
    ]
    if everyone:
        columns.append(("every rank\nMiB", lambda f: " ".join(map(mebibytes, f.memory_bytes or ())) or "-"))
    table = _table(*(heading for heading, _ in columns), gap=2 if width >= 100 else 1)
    for form in forms:
        table.add_row(*(cell(form) for _, cell in columns))
    return table


def _patches(least: int, most: int, of: int) -> str:
    """``3 to 4 of 4``."""
    return f"{most} of {of}" if least == most else f"{least} to {most} of {of}"


def _totals(report: PlanReport) -> list[tuple[str, str]]:
    gain = report.alone_s / report.step_s
    units = [module.bp_units for module in report.modules if module.bp_units is not None]
    totals = [
        ("step time", f"{_ms(report.step_s)} ms, {rate(report.images_per_s)} images/s"),
        ("bound", f"{_ms(report.bound_s)} ms (work of the busiest rank); bubble {100 * report.bubble:.1f} %"),
        ("one rank alone", f"{_ms(report.alone_s)} ms; {_processes(report)} are {gain:.2f} times as fast"),
    ]
    if report.bp_operations is not None:
        calls = round(sum(module.operations or 0 for module in report.modules))
        ratio = f"{calls / report.bp_operations:.2f} times those of a BP step"
        totals.append(("FLOPs", f"{sum(units):.2f} units of one BP step of the whole network"))
        totals.append(("operations", f"{calls:,} calls for a step of one micro-batch, {ratio}"))
    for placement in report.placements:
        sizes = _sizes(placement.sizes)
        totals.append((f"by {placement.kind}", f"{_ms(placement.step_s)} ms a step with {sizes} modules per rank"))
    return totals


def _processes(report: PlanReport) -> str:
    stages = len(report.ranks)
    return f"{stages} ranks" if report.replicas == 1 else f"{report.replicas} replicas of {stages} ranks"


def _sizes(sizes: Sequence[int]) -> str:
    if len(sizes) > 16:  # more than a reader takes in on one line
        return f"{min(sizes)} to {max(sizes)}"
    return "/".join(map(str, sizes))


def _table(*headings: str, gap: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for heading in headings:
        if heading == "blocks":  # only names may shrink
            table.add_column(heading, overflow="ellipsis", min_width=8)
        else:
            table.add_column(heading, justify="left" if heading in ("heads", "modules") else "right", no_wrap=True)
    return table


def _ms(seconds: float | None) -> str:
    """Milliseconds with three digits or more; "-" where there is nothing."""
    if seconds is None:
        return "-"
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
