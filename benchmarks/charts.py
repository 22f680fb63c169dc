"""The pictures of the benchmarks of speed; they need matplotlib (pip install "localpipe[plot]")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK = "#33373d"
GRID = "#d9dce1"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def _figure(height: float, title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.0, height), dpi=150, layout="constrained")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    return figure, axes


Bar = tuple[str, str, float, float, float]
"""Name, group, value, low, high."""


def bars(path: Path, title: str, entries: Sequence[Bar], colours: Mapping[str, str], label: str) -> None:
    """Horizontal bars with whiskers; a colour for each group."""
    figure, axes = _figure(1.2 + 0.19 * len(entries), title)
    for group, colour in colours.items():
        mine = [(place, *entry[2:]) for place, entry in enumerate(entries) if entry[1] == group]
        if not mine:
            continue
        places, values, lows, highs = zip(*mine, strict=True)
        axes.barh(places, values, 0.72, color=colour, label=group)
        axes.hlines(places, lows, highs, color=INK, linewidth=0.9)
        axes.plot([*lows, *highs], [*places, *places], "|", color=INK, markersize=4)
        for place, value, _, high in mine:
            axes.text(high + 0.02, place, f"{value:.2f}", va="center", fontsize=7, color=INK, bbox=PAPER)
    axes.set_yticks(range(len(entries)), [name for name, *_ in entries], fontsize=7.5)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_xlabel(label, fontsize=9, color=INK)
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
    """
    figure, axes = _figure(4.8, title)
    for name, (colour, marker) in styles.items():
        points, dashes = measured.get(name), predicted.get(name)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker=marker, markersize=5, label=name)
        if dashes:
            shown = None if points else name
            axes.plot(*zip(*dashes, strict=True), color=colour, linewidth=1.2, linestyle=(0, (4, 2)), label=shown)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_xlabel("ranks P; the network has P times the layers", fontsize=9, color=INK)
    axes.set_ylabel(label, fontsize=9, color=INK)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
