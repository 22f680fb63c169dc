"""What throughput.py writes: its rows as a page, what they say in words, and the chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import bars
from tables import Row, markdown, number, per_rank, provenance, show

COLUMNS = [
    "system", "P", "K", "M", "images/s", "low", "high", "ratio", "low", "high", "expected", "bound", "efficiency",
    "busy", "MB/step", "parts",
]
EXPECTED = {
    ("BP, 2 threads", 1): 1.71,
    ("DDP", 1): 1.90,
    ("naive model parallel", 1): 0.99,
    ("torch GPipe", 2): 1.35,
    ("torch GPipe", 4): 1.57,
    ("torch GPipe", 8): 1.82,
    ("torch 1F1B", 2): 1.43,
    ("torch 1F1B", 4): 1.66,
    ("torch 1F1B", 8): 1.78,
    ("torch Interleaved1F1B", 2): 1.54,
    ("torch Interleaved1F1B", 4): 1.74,
    ("torch Interleaved1F1B", 8): 1.83,
    ("torch InterleavedZeroBubble", 2): 1.62,
    ("torch InterleavedZeroBubble", 4): 1.68,
    ("torch InterleavedZeroBubble", 8): 1.66,
    ("torch ZBVZeroBubble", 2): 1.61,
    ("torch ZBVZeroBubble", 4): 1.68,
    ("torch ZBVZeroBubble", 8): 1.73,
}
"""Ratios to one device by (system, M) in an earlier, separate measurement: ResNet-32, batch 256, two pinned cores."""
COLOURS = {"one process": "#9aa0a8", "DDP": "#5b6570", "torch pipelines": "#e08214", "localpipe": "#1f6fb2"}


@dataclass(frozen=True)
class ThroughputRow(Row):
    """A row of throughput.

    Attributes:
        ratio_low, ratio_high: smallest and largest ratio of all rounds.
        parts: blocks of every part of a baseline, of every rank of ours.
        expected: the ratio written down before the measurement, where there was one.
    """

    ratio_low: float
    ratio_high: float
    parts: tuple[int, ...]
    expected: float | None

    @property
    def ours(self) -> bool:
        """Whether it is a row of local learning."""
        return self.system == "localpipe"

    @property
    def name(self) -> str:
        """System, or method and schedule."""
        return f"{self.method}, {self.schedule}" if self.ours else self.system

    @property
    def label(self) -> str:
        """The name, with M where there are several micro-batches."""
        return self.name if self.micro_batches == 1 else f"{self.name}, M = {self.micro_batches}"

    @property
    def at_work(self) -> float:
        """Share of all cores at work: the sum of the ranks' work / (ranks x wall)."""
        return sum(self.busy) / len(self.busy) if self.busy else float("nan")


def cells(row: ThroughputRow) -> list[str]:
    """A row of the table."""
    return [
        row.name,
        str(row.ranks),
        str(row.modules) if row.ours else "",
        str(row.micro_batches),
        f"{row.images_per_s:.1f}",
        f"{row.low:.1f}",
        f"{row.high:.1f}",
        f"{row.ratio_to_bp:.2f}",
        f"{row.ratio_low:.2f}",
        f"{row.ratio_high:.2f}",
        number(row.expected, ".2f"),
        number(row.bound, ".1f"),
        number(row.efficiency, ".2f"),
        per_rank(row.busy, ".2f"),
        f"{row.bytes_per_step / 1e6:.2f}",
        "/".join(map(str, row.parts)),
    ]


def show_rows(rows: Sequence[ThroughputRow]) -> None:
    """The table on the screen."""
    show("throughput; ratio: to backpropagation on one device", COLUMNS, [cells(row) for row in rows])


def findings(rows: Sequence[ThroughputRow]) -> list[str]:
    """What the rows say, the good and the bad."""
    ours = sorted((row for row in rows if row.ours), key=lambda row: -row.ratio_to_bp)
    others = sorted((row for row in rows if not row.ours), key=lambda row: -row.ratio_to_bp)
    best, rival = ours[0], others[0]  # BP on one device, at least
    found = [
        f"The fastest system is {max(best, rival, key=lambda row: row.ratio_to_bp).label}. Fastest of ours: "
        f"{best.label}, {best.ratio_to_bp:.2f} times one device. Fastest baseline: {rival.label}, "
        f"{rival.ratio_to_bp:.2f} times."
    ]
    slower = [row for row in ours if row.ratio_to_bp < 1]
    if slower:
        found.append(
            "Backpropagation on ONE device is faster than "
            + ", ".join(f"{row.label} ({row.ratio_to_bp:.2f})" for row in slower)
            + f" on {best.ranks} ranks: their heads compute more than the pipeline gains."
        )
    else:
        found.append(f"No row of ours on {best.ranks} ranks is slower than backpropagation on one device.")
    for name in ("DDP", "BP, 2 threads"):
        rival_row = next((row for row in others if row.name == name), None)
        if rival_row is not None:
            beaten = [row for row in ours if row.ratio_to_bp < rival_row.ratio_to_bp]
            found.append(
                f"{name} ({rival_row.ratio_to_bp:.2f}) is faster than {len(beaten)} of {len(ours)} rows of ours"
                + (f"; not than {', '.join(row.label for row in ours if row not in beaten)}." if len(beaten) < len(ours)
                   else ": for this network it is the better choice.")
            )
    pipelines = [row for row in others if row.name.startswith("torch")]
    if pipelines:
        ahead = [row for row in ours if row.ratio_to_bp > pipelines[0].ratio_to_bp]
        found.append(
            f"Fastest of torch's pipelines: {pipelines[0].label}, {pipelines[0].ratio_to_bp:.2f}; faster than that: "
            + (", ".join(row.label for row in ahead) or "none of ours") + "."
        )
    plain = [row for row in ours if "hpff" not in row.method]
    kept = [("async", [row for row in ours if row.schedule == "async"])]
    kept.append(("plain methods, exact, M = 1", [r for r in plain if (r.schedule, r.micro_batches) == ("exact", 1)]))
    for what, group in kept:
        if group and all(row.busy for row in group):
            worst = min(group, key=lambda row: row.at_work)
            found.append(
                f"Cores at work, sum of the ranks' compute / (P x wall), {what}: at least {worst.at_work:.3f} "
                f"({worst.label}); the limit of its placement is {_balance(worst):.3f}, expected >= 0.93."
            )
    return found


def _balance(row: ThroughputRow) -> float:
    """Share of the cores at work if the busiest rank never waited."""
    return row.at_work / max(row.busy)


def page(result: Mapping[str, Any], rows: Sequence[ThroughputRow], command: str, picture: str | None) -> str:
    """The results as Markdown."""
    settings = result["settings"]
    text = [
        "# Throughput",
        "",
        provenance(result, command),
        "",
        f"{settings['model']} on 32x32 images, batch {settings['batch']} for all ranks together, fp32, channels last, "
        f"SGD with Nesterov momentum, the same random images in every step; {settings['ranks']} ranks, one "
        + ("core and one thread each" if settings["device"] == "cpu" else "GPU each")
        + f". {settings['rounds']} interleaved rounds; a burst is {settings['warmup']} warm-up and "
        f"{settings['steps']} timed steps. Ratio: of a burst to the neighbouring bursts of backpropagation on one "
        "device; median, lowest and highest of all rounds. The losses of all baselines equal those of one process with "
        "the same micro-batches.",
        "",
        *(f"* {line}" for line in findings(rows)),
        "",
        markdown(COLUMNS, [cells(row) for row in rows]),
        "",
        "P: ranks, K: local modules, M: micro-batches. Low and high: of all rounds. Expected: the ratio of an earlier, "
        "separate measurement of the same baselines (batch 256). Bound: batch / max stage time; efficiency: images/s / "
        "bound. Stage time and busy: ours from the recorded actions of a run, the others from the CPU time of the "
        "process, which includes its share of the messages. MB/step: sent by all ranks; ours as counted, others by "
        "tensor sizes. Parts: blocks of every part of the network (torch) or rank (ours), by time measured here: "
        "the fastest of four candidates in a short run (interleaved schedules share the cut of Interleaved1F1B, GPipe "
        "and 1F1B that of GPipe). HPFF: cascade over 2 modules, 2x2 patches. Naive model parallel is GPipe with M = 1. "
        "BatchNorm sees batch / M images, with DDP batch / P.",
        "",
    ]
    if picture is not None:
        text += [f"![ratio to one device]({picture})", ""]
    return "\n".join(text)


def chart(path: Path, result: Mapping[str, Any], rows: Sequence[ThroughputRow]) -> None:
    """Ratios to one device as bars.

    Raises:
        ChartError: matplotlib is missing.
    """
    settings = result["settings"]
    entries = []
    for row in rows:
        group = "localpipe" if row.ours else "one process" if row.ranks == 1 else "torch pipelines"
        group = "DDP" if row.system == "DDP" else group
        entries.append((row.label, group, row.ratio_to_bp, row.ratio_low, row.ratio_high))
    title = f"{settings['model']}, batch {settings['batch']}, {settings['ranks']} ranks ({settings['device']})"
    bars(path, title, entries, COLOURS, "images/s, ratio to backpropagation on one device")
