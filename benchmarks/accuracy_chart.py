"""The chart of benchmarks/accuracy.py: error by epoch, and error by exit."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import DASHED, INK
from tables import Row

BLACK = "#111111"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Left: test error by epoch, of the largest budget that most rows have. Right: what the exits of each get wrong, by
    the share of the modules up to them; the last is the network's output."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    budget = max((row["epochs"] for row in rows), key=lambda epochs: (sum(r["epochs"] == epochs for r in rows), epochs))
    shown = [row for row in rows if row["epochs"] == budget]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4.6), dpi=150, layout="constrained", sharey=True)
    colours = itertools.cycle(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for row in shown:
        alone = row["modules"] == 1
        style = {"color": BLACK if alone else next(colours), "linewidth": 2.0 if alone else 1.3, "marker": "o",
                 "markersize": 3, "linestyle": "-" if alone or row["modules"] > 8 else DASHED}  # fmt: skip
        label = row["title"] if alone else f"{row['title']}, K = {row['k']}"
        left.plot(*_mean_curve(row), label=label, **style)
        right.plot(*_mean_exits(row), **style)
    for axes, title, label in ((left, "test error %", "epoch"), (right, "of every exit", "depth: modules / K")):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel(label, fontsize=8, color=INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, length=0, labelsize=8)
        axes.grid(color="#d9dce1", linewidth=0.7)
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _mean_curve(row: Row) -> tuple[list[int], list[float]]:
    curves = [dict(run["curve"]) for run in row["runs"]]
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    return epochs, [statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs]


def _mean_exits(row: Row) -> tuple[list[float], list[float]]:
    """Of the deepest level that an exit has."""
    found: dict[int, list[float]] = {}
    for run in row["runs"]:
        for module, error in {each["module"]: each["error"] for each in run["exits"]}.items():
            found.setdefault(module, []).append(error)
    modules = sorted(found)
    return [(module + 1) / row["modules"] for module in modules], [statistics.fmean(found[m]) for m in modules]


def draw_local_to_global(rows: Sequence[Row], path: Path) -> None:
    """Left: error against the time of a step, the area of a point is memory, a line per K, k in each point. Right:
    error against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.8), dpi=150, layout="constrained", sharey=True)
    largest = max(row["bytes"] for row in rows)
    keys = list(dict.fromkeys(_line_of(row) for row in sorted(rows, key=lambda row: row["asked"])))
    shades = colormaps["viridis"]
    local = [key for key in keys if not key.startswith("BP")]
    for key in keys:
        of = sorted((row for row in rows if _line_of(row) == key), key=lambda row: row["span"])
        place = local.index(key) / max(1, len(local) - 1) if key in local else 0.0
        colour = shades(0.85 * place) if key in local else BLACK
        left.plot([row["units"] for row in of], [row["error"] for row in of], color=colour, linewidth=0.8, alpha=0.6)
        sizes = [20 + 300 * row["bytes"] / largest for row in of]
        left.scatter([row["units"] for row in of], [row["error"] for row in of], s=sizes, color=colour, alpha=0.55,
                     linewidths=0)  # fmt: skip
        for row, size in zip(of, sizes, strict=True):
            alone = row["modules"] == 1  # its name stands above; of others k in the point
            text, away = (row["system"], 3 + size**0.5 / 2) if alone else (str(row["span"]), 0)
            left.annotate(text, (row["units"], row["error"]), (0, away), fontsize=6.5, color=INK, ha="center",
                          textcoords="offset points", va="bottom" if alone else "center")  # fmt: skip
        for index, row in enumerate(of):
            right.plot(*zip(*row["reached"], strict=True), color=colour, linewidth=1.3, marker="o", markersize=3,
                       label=key if index == 0 else None, linestyle=_dashes(key, row["span"]))  # fmt: skip
    told = "time of a step, to backpropagation on one device; area: memory; number: span k"
    left.set_xlabel(told, fontsize=8, color=INK)
    right.set_xlabel("time, in epochs of backpropagation on one device", fontsize=8, color=INK)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, length=0, labelsize=8)
        axes.grid(color="#d9dce1", linewidth=0.7)
        axes.set_axisbelow(True)
    left.set_title("test error %", loc="left", fontsize=10, color=INK)
    left.margins(0.15)
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _dashes(key: str, span: int) -> Any:
    """Pipelines of backpropagation are told apart, and cascades from what is plain."""
    return {"BP, 1F1B": DASHED, "BP, ZBV": ":"}.get(key, "-" if span == 1 else DASHED)


def _line_of(row: Row) -> str:
    return row["system"] if row["modules"] == 1 else f"{row['system'].split(' + cascade')[0]}, K = {row['asked']}"
