"""Samples of what ``nvidia-smi`` prints, in the form of drivers 550 to 580. They are written after public reports and
not taken from a machine on which localpipe has run."""

from __future__ import annotations

LEGEND = "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP interconnect\n"
NUMA = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")


def _table(rows: list[str], nics: int = 0) -> str:
    """With tabs and the underlined head that a terminal gets."""
    names = [f"GPU{number}" for number in range(len(rows))]
    head = "\t".join([*names, *(f"NIC{number}" for number in range(nics)), *NUMA])
    lines = [f"\t\x1b[4m{head}\x1b[0m"]
    for number, row in enumerate(rows):
        cells = [f" {cell} " if cell == "X" else cell for cell in row.split()]
        socket = "0-31,64-95\t0" if number < len(rows) / 2 else "32-63,96-127\t1"
        lines.append("\t".join([f"GPU{number}", *cells, socket, "\tN/A"]))
    lines += ["\t".join([f"NIC{number}", *["NODE"] * len(rows), " X "]) for number in range(nics)]
    return "\n".join(lines) + "\n" + LEGEND


NVSWITCH = _table([" ".join("X" if a == b else "NV18" for b in range(8)) + " PIX NODE" for a in range(8)], nics=2)
"""Eight GPUs, NVLink between all of them, two network adapters."""
TWO_SOCKETS = _table(["X PIX SYS SYS", "PIX X SYS SYS", "SYS SYS X PIX", "SYS SYS PIX X"])
"""Four GPUs on PCIe, two per socket, in the order of the sockets."""
CROSSED = _table(["X SYS NV4 SYS", "SYS X SYS NV4", "NV4 SYS X SYS", "SYS NV4 SYS X"])
"""Four GPUs, NVLink between 0 and 2 and between 1 and 3."""

QUERY_H100 = "".join(
    f"{number}, GPU-{number}{number}{number}0, NVIDIA H100 80GB HBM3, 81559, {used}, 9.0, 580.65.06\n"
    for number, used in enumerate((4, 4, 31207, 4))
)
"""Four GPUs; somebody is at work on GPU 2."""
QUERY_SHARED = "0, GPU-0000, NVIDIA GB10, [N/A], [N/A], 12.1, 580.95.05\n"
"""A GPU without memory of its own."""
