"""What scaling.py writes: its rows as a page, the comparison that the rows support, and the chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import lines
from tables import Row, markdown, number, per_rank, provenance, show

COLUMNS = [
    "system", "P", "M", "images/s", "low", "high", "x one device", "optimum", "of optimum", "of bound", "busy",
    "DGL / this",
]
CURVES = {
    "dgl, exact": ("#1f6fb2", "o"),
    "dgl + hpff, async": ("#1b9e77", "s"),
    "dgl + hpff, exact": ("#66b3a1", "D"),
    "torch ZBVZeroBubble, M = 8": ("#8c6bb1", "v"),
    "torch GPipe, M = 8": ("#e08214", "^"),
    "torch GPipe, M = 4": ("#d9534f", "<"),
    "torch GPipe, M = 1": ("#7f7f7f", "x"),
}


@dataclass(frozen=True)
class ScalingRow(Row):
    """A row of scaling.

    Attributes:
        optimum: images/s of this schedule with these costs and free messages: simulated for ours, the closed form for
            GPipe and 1F1B with equal modules, else None.
        of_optimum: images_per_s / optimum.
        local_ratio: median over rounds of the speed of plain DGL (exact, M = 1) to this in the same round.
        host_load: share of the cores of this machine that the processes really used; above a half, they and not the
            schedule may limit a row. None for ours, whose processes start and end within a burst.
    """

    optimum: float | None
    of_optimum: float | None
    local_ratio: float
    host_load: float | None

    @property
    def label(self) -> str:
        """Method or system, and schedule."""
        return f"torch {self.schedule}" if self.system == "torch" else f"{self.method}, {self.schedule}"


def cells(row: ScalingRow) -> list[str]:
    """A row of the table."""
    return [
        row.label,
        str(row.ranks),
        str(row.micro_batches),
        f"{row.images_per_s:.1f}",
        f"{row.low:.1f}",
        f"{row.high:.1f}",
        number(row.ratio_to_bp, ".2f"),
        number(row.optimum, ".1f"),
        number(row.of_optimum, ".3f"),
        f"{row.efficiency:.3f}",
        per_rank(row.busy, ".2f"),
        f"{row.local_ratio:.2f}" + (" *" if row.host_load is not None and row.host_load > 0.5 else ""),
    ]


def show_rows(rows: Sequence[ScalingRow]) -> None:
    """The table on the screen."""
    show("virtual devices", COLUMNS, [cells(row) for row in rows])


def findings(rows: Sequence[ScalingRow]) -> list[str]:
    """What the rows say, the good and the bad."""
    found = []
    local = {(row.ranks, row.method, row.schedule, row.micro_batches): row for row in rows if row.system != "torch"}
    sizes = sorted({row.ranks for row in rows})
    plain = [local[ranks, "dgl", "exact", 1] for ranks in sizes]
    ends = (4, 16) if {4, 16} <= set(sizes) else (sizes[0], sizes[-1])
    first, last = (local[ranks, "dgl", "exact", 1].images_per_s for ranks in ends)
    reached = ", ".join(f"P = {row.ranks}: {row.of_optimum:.3f}" for row in plain if row.of_optimum is not None)
    found.append(
        f"Plain DGL, exact, M = 1 reaches of the simulated optimum {reached}. From P = {ends[0]} to {ends[1]} its "
        f"images/s change by {100 * (last / first - 1):+.1f} %."
    )
    cascade = [local[key] for key in sorted(local) if key[1:] == ("dgl + hpff", "exact", 1)]
    reached = ", ".join(f"P = {row.ranks}: {row.of_optimum:.3f}" for row in cascade if row.of_optimum is not None)
    found.append(f"With HPFF's cascade, exact, M = 1, it is {reached}.")
    late = [row for row in rows if row.schedule == "async"]
    worst = min(late, key=lambda row: row.efficiency)
    found.append(
        f"Async reaches at least {worst.efficiency:.3f} of 1 / max stage time ({worst.label}, P = {worst.ranks})."
    )
    for ranks in sizes:
        torch_rows = [row for row in rows if row.system == "torch" and row.ranks == ranks]
        few = [row for row in torch_rows if row.micro_batches <= ranks and row.schedule in ("GPipe", "1F1B")]
        closest = min(few, key=lambda row: row.local_ratio)
        against = ""
        if closest.optimum is not None:
            best = local[ranks, "dgl", "exact", 1].images_per_s / closest.optimum
            against = f" ({best:.2f} times what that schedule could reach at best)"
        text = (
            f"P = {ranks}: plain DGL is at least {closest.local_ratio:.2f} times as fast as GPipe and 1F1B at M <= P; "
            f"the closest is {closest.label}, M = {closest.micro_batches}{against}."
        )
        faster = [row for row in torch_rows if row.local_ratio < 1]
        if faster:
            names = ", ".join(f"{row.label} M = {row.micro_batches} ({1 / row.local_ratio:.2f}x)" for row in faster)
            text += f" Faster than plain DGL: {names}."
        found.append(text)
    return found


def large_batches(head: float, sizes: Sequence[int]) -> str:
    """From how many micro-batches on a perfect GPipe, 1F1B or zero-bubble pipeline wins, by the closed forms."""
    many = ", ".join(f"{3 * (ranks - 1) / head:.0f} for P = {ranks}" for ranks in sizes)
    zero = ", ".join(f"{(ranks - 1) / (2 * head):.0f} for P = {ranks}" for ranks in sizes)
    return (
        "A synchronous pipeline computes no heads, so with enough micro-batches it is faster than local learning. By "
        f"the closed forms, GPipe and 1F1B pass plain DGL at M > 3 (P - 1) / head: {many}; ZBV at M > (P - 1) / "
        f"(2 head): {zero}. On one device backpropagation needs no heads either: P devices give less than P times its "
        "speed."
    )


def page(result: Mapping[str, Any], rows: Sequence[ScalingRow], command: str, picture: str | None) -> str:
    """The results as Markdown."""
    settings = result["settings"]
    text = [
        "# Scaling on virtual devices",
        "",
        provenance(result, command),
        "",
        *settings["explained"],
        "",
        "## Expected and measured",
        "",
        *(f"* Expected: {text}" for text in settings["expected"]),
        *(f"* Measured: {text}" for text in findings(rows)),
        *(f"* {text}" for text in settings["limits"]),
        "",
        markdown(COLUMNS, [cells(row) for row in rows]),
        "",
        "x one device: speed to backpropagation of the whole network on one device, 1 / (sum of its costs). Optimum: "
        "the same schedule and costs with free messages, simulated (ours) or by the closed form (GPipe, 1F1B). Of "
        "bound: to 1 / max stage time. Busy: virtual compute per step / step; of many ranks the lowest and highest. "
        "*: the processes used more than half of this machine's cores, so the machine and not the schedule may limit "
        "the row.",
        "",
    ]
    if settings["simulated"]:
        predicted = [
            [entry["schedule"], str(entry["ranks"]), f"{entry['images_per_s']:.1f}", f"{entry['efficiency']:.3f}"]
            for entry in settings["simulated"]
        ]
        table = markdown(["schedule", "P", "images/s", "of bound"], predicted)
        text += ["## Simulated (ours) and by the closed form (GPipe)", "", table, ""]
    if picture is not None:
        text += [f"![images/s against the number of ranks]({picture})", ""]
    return "\n".join(text)


def chart(path: Path, result: Mapping[str, Any], rows: Sequence[ScalingRow]) -> None:
    """images/s against P, measured and predicted.

    Raises:
        ChartError: matplotlib is missing.
    """
    measured: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
    predicted: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
    for row in rows:
        name = row.label if row.system != "torch" else f"{row.label}, M = {row.micro_batches}"
        if name in measured and (row.system == "torch" or row.micro_batches == 1):
            measured[name].append((row.ranks, row.images_per_s))
    for entry in result["settings"]["simulated"]:
        if entry["schedule"] in predicted:
            predicted[entry["schedule"]].append((entry["ranks"], entry["images_per_s"]))
    lines(
        path,
        "Virtual devices: one local module per rank; dashed: simulated or closed form",
        measured,
        predicted,
        CURVES,
        "images/s through every rank",
    )
