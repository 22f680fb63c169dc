"""What the forms of auxiliary heads take: layers tuned to a CPU against PyTorch's own, and compiled heads.

    python benchmarks/heads.py [--what layers|compile] [--quick] [--json FILE] [--output FILE.md] ...      see --help

The methods are those of step_cost.py, on one thread. In every round each form is trained for a few steps; ratios are to
the first form in the same round. A layer of which a step needs no other operations when it is plain does not run in
that method, and has no row. Seconds are CPU seconds of the heads' forward and backward, and of the whole step; those of
the first step, in which heads are compiled by other processes, are wall seconds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from networks import CLASSES
from runner import Report, main, option
from step_cost import Case, method_case, run_steps
from tables import Column, Row, Table, spread

from pipeline import step_cost

LAYERS = ("batch-norm", "pointwise", "paired", "pooling", "upsampling")
ONE_BY_ONE = ", patches one by one"
SHOWN = {
    "layers": (
        "DGL + HPFF", "InfoPro + HPFF, 2c2f", f"InfoPro + HPFF, 2c2f{ONE_BY_ONE}", "InfoPro, 1c2f"
    ),
    "compile": tuple(
        f"{method}{form}"
        for method in ("DGL + HPFF", "InfoPro + HPFF, 2c2f", "PredSim + HPFF")
        for form in ("", ", all at once")
    ),
}  # fmt: skip
HEADS = ("CASCADE", "INDEPENDENT")
COLUMNS = (
    Column("method", "method"), Column("form", "form"),
    Column("heads, CPU s", "heads_s", ".3f"), Column("step, CPU s", "step_s", ".3f"),
    Column("heads, ratio", "heads_ratio", ".2f"), Column("low", "heads_low", ".2f"),
    Column("high", "heads_high", ".2f"), Column("step, ratio", "step_ratio", ".2f"),
    Column("first step's heads, wall s", "first_s", ".1f"), Column("operations", "operations", ",d"),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    what: str = option("layers", "which forms", choices=list(SHOWN))
    method: tuple[str, ...] = option(("",), "of step_cost.py, instead of those that show most", "NAME")
    rounds: int = option(3, "interleaved rounds", "N")
    steps: int = option(1, "measured steps of one round", "N")
    batch: int = option(128, "images of a step", "N", above=1)
    precision: str = option("fp32", "of all forms", choices=("fp32", "bf16"))
    threads: int = 1


@dataclass(frozen=True)
class Took:
    """Seconds of a step, and of its heads: CPU seconds, and wall seconds of the first step's heads."""

    heads_s: float
    step_s: float
    first_s: float


def took(case: Case, steps: int) -> Took:
    """Means over ``steps`` steps after two to warm up."""
    marks: list[tuple[int, bool, float, float]] = []

    def started(step: int, action: Any) -> None:
        marks.append((step, action.kind.name in HEADS, time.process_time(), time.perf_counter()))

    run_steps(case, steps + 3, started)  # the last step only marks the end of the one before
    cpu: dict[tuple[int, bool], float] = defaultdict(float)
    first_s = 0.0
    for (step, head, cpu_s, wall_s), (_, _, cpu_end_s, end_s) in zip(marks, marks[1:], strict=False):
        cpu[step, head] += cpu_end_s - cpu_s
        first_s += (end_s - wall_s) * (head and step == 0)
    measured = range(2, steps + 2)
    heads_s, rest_s = (sum(cpu[step, head] for step in measured) / steps for head in (True, False))
    return Took(heads_s, heads_s + rest_s, first_s)


def operations(case: Case) -> int:
    """Of a step that is not compiled."""
    return step_cost(case.config, case.image, CLASSES).operations


def forms(case: Case, what: str) -> dict[str, tuple[Case, int | None]]:
    """The forms of one method, with the operations of a step; those that are not counted have None."""
    count = operations(case)
    if what == "compile":
        precision = replace(case.config.precision, compile=True)
        compiled = replace(case, config=replace(case.config, precision=precision))
        return {"eager": (case, count), "compiled": (compiled, None)}
    found: dict[str, tuple[Case, int | None]] = {"tuned": (case, count)}
    for layer in LAYERS:
        other = case.with_layers(tuple(name for name in LAYERS if name != layer))
        if (its := operations(other)) != count:
            found[f"{layer} plain"] = (other, its)
    plain = case.with_layers("plain")
    return {**found, "all plain": (plain, operations(plain))}


def case_of(name: str, settings: Settings) -> Case:
    """A method of step_cost.py, or that with one patch after another."""
    case = method_case(name.removesuffix(ONE_BY_ONE), settings.batch, settings.precision)
    if not name.endswith(ONE_BY_ONE):
        return case
    config = replace(case.config, patches=replace(case.config.patches, at_once=1))
    return replace(case, name=name, config=config)


def measure(settings: Settings) -> Report:
    """All methods and forms; the forms of a method follow each other in every round."""
    names = SHOWN[settings.what] if settings.method == ("",) else settings.method
    cases = {name: forms(case_of(name, settings), settings.what) for name in names}
    found: dict[tuple[str, str], list[Took]] = defaultdict(list)
    for _ in range(settings.rounds):
        for name, variants in cases.items():
            for form, (case, _) in variants.items():
                found[name, form].append(took(case, settings.steps))
    rows: list[Row] = []
    for name, variants in cases.items():
        first = found[name, next(iter(variants))]
        for form, (_, count) in variants.items():
            own = found[name, form]
            ratio, low, high = spread([a.heads_s / b.heads_s for a, b in zip(own, first, strict=True)])
            rows.append({
                "method": name, "form": form, "heads_s": spread([t.heads_s for t in own])[0],
                "step_s": spread([t.step_s for t in own])[0], "heads_ratio": ratio, "heads_low": low,
                "heads_high": high,
                "step_ratio": spread([a.step_s / b.step_s for a, b in zip(own, first, strict=True)])[0],
                "first_s": max(t.first_s for t in own), "operations": count,
            })  # fmt: skip
    about = (
        f"ResNet-32 at 32x32, batch {settings.batch}, {settings.precision}, one thread; {settings.steps} measured "
        f"steps a run, {settings.rounds} rounds; medians, and the ratio to the first form of the method within a round."
    )
    return Report(f"Forms of heads: {settings.what}", [Table(COLUMNS, rows)], [about])


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"rounds": 1, "batch": 4, "method": ("DGL",)})
