"""Precision and memory layout on this machine: images/s of one process in fp32 and bf16, NCHW and NHWC.

    python benchmarks/precision.py [--quick] [--json FILE] [--output FILE.md] ...      see --help

Every configuration trains the default recipe for a few steps, in interleaved rounds; the table holds medians and the
ratio to fp32 NCHW, and to backpropagation in the same setting, within each round.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from operator import truediv

from networks import IMAGE
from runner import Report, main, option
from step_cost import RUN, Case, seconds
from tables import SPEED, Column, K, Table, make_row

from pipeline import load_config

METHODS = {"bp": ["model.modules=1"], "infopro + hpff": []}
SETTINGS = {
    "fp32 NCHW": ["precision.compute=fp32", "precision.channels_last=off"],
    "fp32 NHWC": ["precision.compute=fp32", "precision.channels_last=on"],
    "bf16 NCHW": ["precision.compute=bf16", "precision.channels_last=off"],
    "bf16 NHWC": ["precision.compute=bf16", "precision.channels_last=on"],
}
COLUMNS = (
    Column("method", "method"), K, Column("setting", "setting"), *SPEED,
    Column("to fp32 NCHW", "ratio_to_plain", ".2f"), Column("to BP", "ratio_to_bp", ".2f"),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    rounds: int = option(5, "interleaved rounds", "N")
    steps: int = option(4, "training steps of one measurement", "N")
    batch: int = 32
    threads: int = 1
    cuts: str = option("cost", "model.cuts; cost is counted anew for every setting", "CUTS")


def measure(settings: Settings) -> Report:
    """All methods and settings, interleaved; one row each."""
    cases = {}
    for method, chosen in METHODS.items():
        for setting, precision in SETTINGS.items():
            run = [f"data.batch_size={settings.batch}", f"model.cuts={settings.cuts}", *RUN]
            cases[method, setting] = Case(method, load_config(assignments=[*chosen, *precision, *run]), IMAGE)
    steps_s: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    for _ in range(settings.rounds):
        for key, case in cases.items():
            steps_s[key].append(seconds(case, settings.steps)[1])

    rows = [
        make_row(
            settings.batch, own, method=method, modules=cases[method, setting].config.model.modules, setting=setting,
            ratio_to_bp=statistics.median(map(truediv, steps_s["bp", setting], own)),
            ratio_to_plain=statistics.median(map(truediv, steps_s[method, "fp32 NCHW"], own)),
        )
        for (method, setting), own in steps_s.items()
    ]  # fmt: skip
    about = (
        f"One process, one thread, ResNet-32 at 32x32, batch {settings.batch}, {settings.steps} steps a run after one "
        f"to warm up, {settings.rounds} interleaved rounds. "
        "Ratios are medians over the rounds of the ratio within a round."
    )
    return Report("Precision and layout on a CPU", [Table(COLUMNS, rows)], [about])


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"rounds": 1, "steps": 1, "batch": 2, "cuts": "even"})
