"""Where the time of a training step goes, operation by operation, on one CPU thread.

    python benchmarks/operations.py [--method NAME ...] [--batch N] [--steps N] [--top N] [--quick] [--output FILE.md]

The methods are those of step_cost.py. A profiler makes every step slower, the more steps it has kept: the shares count
here, and for times and ratios that tool.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from step_cost import METHODS, Case, method_cases, run_steps
from tables import at_least, check_targets, document, markdown, number, output_options, provenance, show, write_json
from torch.profiler import ProfilerActivity, profile

from pipeline import ConfigError

SHOWN = ("BP", "HPFF as released, 2c2f", "InfoPro + HPFF, 2c2f", "DGL + HPFF")
COLUMNS = ["operation", "calls", "ms", "share %"]


@dataclass(frozen=True)
class Operation:
    """All calls of one operation in a step.

    Attributes:
        ms: without the operations that it calls itself.
    """

    name: str
    calls: int
    ms: float


def operations(case: Case, steps: int) -> list[Operation]:
    """Means over ``steps`` steps after two to warm up, the longest first."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    begun: set[int] = set()

    def started(step: int, _: Any) -> None:
        if step in begun:
            return
        begun.add(step)
        if step == 2:
            profiler.start()
        elif step == 2 + steps:
            profiler.stop()

    run_steps(case, steps + 3, started)
    found = [
        Operation(event.key, event.count // steps, event.self_cpu_time_total / 1e3 / steps)
        for event in profiler.key_averages()
        if event.self_cpu_time_total > 0
    ]
    return sorted(found, key=lambda operation: -operation.ms)


def cells(found: list[Operation], top: int) -> list[list[str]]:
    """The ``top`` longest, and the rest on one line."""
    total = sum(operation.ms for operation in found)
    rest = found[top:]
    lines = [*found[:top], Operation("all others", sum(o.calls for o in rest), sum(o.ms for o in rest))]
    return [
        [
            o.name.removeprefix("aten::"),
            str(o.calls),
            number(o.ms, ".1f"),
            number(100 * o.ms / total, ".1f"),
        ]
        for o in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), nargs="+", metavar="NAME", default=SHOWN, help="what to run")
    parser.add_argument("--batch", type=at_least(2), metavar="N", default=128, help="images of a step")
    parser.add_argument("--steps", type=at_least(1), metavar="N", default=1, help="profiled steps")
    parser.add_argument("--top", type=at_least(1), metavar="N", default=16, help="operations to show")
    parser.add_argument("--quick", action="store_true", help="one step at batch 16: less than a minute")
    output_options(parser)
    given = parser.parse_args()
    check_targets(json=given.json, output=given.output)
    batch, steps = (16, 1) if given.quick else (given.batch, given.steps)
    pages, rows = [], []
    for case in method_cases(batch, "fp32"):
        if case.name not in given.method:
            continue
        found = operations(case, steps)
        rows += [{"method": case.name, **vars(operation)} for operation in found]
        title = f"{case.name}: {sum(o.ms for o in found):.0f} ms"
        show(title, COLUMNS, cells(found, given.top))
        pages.append(f"### {title}\n\n{markdown(COLUMNS, cells(found, given.top))}")
    result = document({"batch": batch, "steps": steps, "threads": 1}, rows)
    if given.json is not None:
        write_json(given.json, result)
    if given.output is not None:
        command = " ".join(["python benchmarks/operations.py", *sys.argv[1:]])
        given.output.write_text("\n\n".join([provenance(result, command), *pages]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"operations.py: {error}")
