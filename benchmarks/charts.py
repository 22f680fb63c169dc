"""The pictures of the benchmarks of speed; they need matplotlib (pip install "localpipe[plot]")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK = "#33373d"
GRID = "#d9dce1"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


class ChartError(Exception):
    """No chart can be drawn; one line says why and what helps."""


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError:
        raise ChartError('--chart needs matplotlib: pip install "localpipe[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), dpi=150, layout="constrained")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.set_axisbelow(True)
    return figure, axes


def bars(
    path: Path,
    title: str,
    entries: Sequence[tuple[str, str, float, float, float]],
    colours: Mapping[str, str],
    label: str,
) -> None:
    """Horizontal bars with whiskers: (name, group, value, low, high); a colour for each group.

    Raises:
        ChartError: matplotlib is missing.
    """
    figure, axes = _figure(8.0, 1.2 + 0.19 * len(entries))
    seen: set[str] = set()
    for place, (_, group, value, low, high) in enumerate(entries):
        error = [[max(0.0, value - low)], [max(0.0, high - value)]]
        shown = group if group not in seen else None
        seen.add(group)
        axes.barh(place, value, 0.72, color=colours[group], label=shown)
        axes.errorbar(value, place, xerr=error, color=INK, linewidth=0.9, capsize=1.8)
        axes.text(max(value, high) + 0.02, place, f"{value:.2f}", va="center", fontsize=7, color=INK, bbox=PAPER)
    axes.set_yticks(range(len(entries)), [name for name, *_ in entries], fontsize=7.5)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlim(0, 1.1 * max(high for *_, high in entries))
    figure.legend(loc="outside upper right", ncols=len(colours), fontsize=8, frameon=False)
    figure.savefig(path)


def lines(
    path: Path,
    title: str,
    measured: Mapping[str, Sequence[tuple[int, float]]],
    predicted: Mapping[str, Sequence[tuple[int, float]]],
    styles: Mapping[str, tuple[str, str]],
    label: str,
) -> None:
    """Curves over the number of ranks: points and solid lines are measured, dashed lines predicted.

    Args:
        styles: of every curve: colour and marker.

    Raises:
        ChartError: matplotlib is missing.
    """
    figure, axes = _figure(8.0, 4.8)
    ends = []
    for name, (colour, marker) in styles.items():
        if points := predicted.get(name):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, linestyle=(0, (4, 2)), alpha=0.8)
        if points := measured.get(name):
            axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=1.6, marker=marker, markersize=5, label=name
            )
            ends.append(points[-1])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_xlabel("ranks P; the network has P times the layers", fontsize=9, color=INK)
    axes.set_ylabel(label, fontsize=9, color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
