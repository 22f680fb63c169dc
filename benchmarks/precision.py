"""Precision and memory layout on this machine: images/s of one process in fp32 and bf16, NCHW and NHWC.

    python benchmarks/precision.py [--rounds N] [--steps N] [--quick] [--json FILE] [--output FILE.md]

Every configuration trains the default recipe for a few steps, in interleaved rounds; the table holds medians and the
ratio to fp32 NCHW, and to backpropagation in the same setting, within each round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from step_cost import IMAGE, RUN, Case, seconds
from tables import (
    Row,
    at_least,
    check_targets,
    document,
    markdown,
    output_options,
    provenance,
    show,
    spread,
    write_json,
)

from pipeline import ConfigError, load_config

SYSTEMS = {"bp": ["model.modules=1"], "infopro + hpff": []}
SETTINGS = {
    "fp32 NCHW": ["precision.compute=fp32", "precision.channels_last=off"],
    "fp32 NHWC": ["precision.compute=fp32", "precision.channels_last=on"],
    "bf16 NCHW": ["precision.compute=bf16", "precision.channels_last=off"],
    "bf16 NHWC": ["precision.compute=bf16", "precision.channels_last=on"],
}
COLUMNS = ["method", "K", "setting", "images/s", "low", "high", "to fp32 NCHW", "to BP"]


@dataclass(frozen=True)
class PrecisionRow(Row):
    """A :class:`tables.Row` of one process.

    Attributes:
        setting: precision and layout.
        ratio_to_plain: median over rounds of the ratio to fp32 NCHW of the same method.
    """

    setting: str
    ratio_to_plain: float


def case(method: str, setting: str, batch: int) -> Case:
    """The default recipe in one precision and layout, on images of its shape."""
    assignments = [*SYSTEMS[method], *SETTINGS[setting], f"data.batch_size={batch}", *RUN]
    return Case(method, load_config(assignments=assignments), IMAGE)


def measure(rounds: int, steps: int, batch: int) -> list[PrecisionRow]:
    """All methods and settings, interleaved; one row each."""
    samples: dict[tuple[str, str], list[float]] = {(method, name): [] for method in SYSTEMS for name in SETTINGS}
    for _ in range(rounds):
        for (method, name), found in samples.items():
            _, wall_s = seconds(case(method, name, batch), steps)
            found.append(batch / wall_s)
    rows = []
    for (method, name), values in samples.items():
        rate, low, high = spread(values)
        rows.append(
            PrecisionRow(
                system="localpipe",
                method=method,
                schedule="exact",
                ranks=1,
                modules=case(method, name, batch).config.model.modules,
                micro_batches=1,
                images_per_s=rate,
                low=low,
                high=high,
                ratio_to_bp=_ratio(values, samples["bp", name]),
                bound=None,
                efficiency=None,
                busy=(),
                bytes_per_step=0.0,
                setting=name,
                ratio_to_plain=_ratio(values, samples[method, "fp32 NCHW"]),
            )
        )
    return rows


def _ratio(values: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def cells(rows: Sequence[PrecisionRow]) -> list[list[str]]:
    """The table as text."""
    return [
        [
            row.method,
            str(row.modules),
            row.setting,
            *(f"{rate:.1f}" for rate in (row.images_per_s, row.low, row.high)),
            f"{row.ratio_to_plain:.2f}",
            f"{row.ratio_to_bp:.2f}",
        ]
        for row in rows
    ]


def page(result: dict[str, Any], rows: Sequence[PrecisionRow]) -> str:
    """The result as Markdown."""
    settings = result["settings"]
    command = f"python benchmarks/precision.py --rounds {settings['rounds']} --steps {settings['steps']}"
    return "\n\n".join(
        [
            "# Precision and layout on a CPU",
            provenance(result, command),
            f"One process, one thread, ResNet-32 at 32x32, batch {settings['batch']}, {settings['steps']} steps a run "
            f"after one to warm up, {settings['rounds']} interleaved rounds. "
            "Ratios are medians over the rounds of the ratio within a round.",
            markdown(COLUMNS, cells(rows)) + "\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), metavar="N", default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=at_least(1), metavar="N", default=4, help="training steps of one measurement")
    parser.add_argument("--quick", action="store_true", help="one round of one step at batch 2: seconds")
    output_options(parser)
    given = parser.parse_args()
    check_targets(json=given.json, output=given.output)
    settings = {"rounds": 1, "steps": 1, "batch": 2} if given.quick else {
        "rounds": given.rounds, "steps": given.steps, "batch": 32
    }
    rows = measure(**settings)
    result = document({**settings, "threads": 1}, [asdict(row) for row in rows])
    show("Precision and layout", COLUMNS, cells(rows))
    if given.json is not None:
        write_json(given.json, result)
    if given.output is not None:
        given.output.write_text(page(result, rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"precision.py: {error}")
