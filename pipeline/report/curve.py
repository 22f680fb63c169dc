"""A picture of the learning curve, of every local module; matplotlib is an optional dependency and loaded only here.

    test error (%)          | training loss          a row per level that the auxiliary heads have; in every row the
    of every module's head  | of every module        final module, whose output is the network's, in black
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base.errors import ConfigError
from pipeline.base.metric import ERROR, MetricForm
from pipeline.store.records import level_of, loss_text
from pipeline.store.run_directory import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

FINAL = "final"
_BLACK, _GREY = "#111111", "#777777"
_SHADES = (0.05, 0.88)
"""Of the colour map viridis, which also differs for colour-blind readers and in grey, without its lightest end."""
_WIDE_RANGE = 50.0
"""Largest over smallest loss from which on its axis is logarithmic."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class _Panel:
    """One picture: the (epoch, value) points of every local module by its index, and those of the final module, which
    are those of the network; ``last``: the last of them, for people."""

    modules: dict[int, Points]
    final: Points
    title: str
    label: str
    last: str
    loss: bool


def metric_of(epoch: Mapping[str, Any]) -> MetricForm:
    """The first metric of the task, of a line of metrics.jsonl; those of older versions do not say it, and count
    errors."""
    form = epoch.get("metric")
    return MetricForm(**form) if form else ERROR


def measured(epoch: Mapping[str, Any], metric: MetricForm) -> float | None:
    """Its value on the test set, for the network itself; None without a test."""
    value = epoch["test_error_pct"] if metric.name == ERROR.name else epoch.get("test_metrics", {}).get(metric.name)
    return None if value is None else float(value)


def metric_label(metric: MetricForm) -> str:
    """``test error (%)``; for other metrics also where better is."""
    facts = [metric.unit] if metric.unit else []
    facts += [] if metric == ERROR else [metric.direction]
    return f"test {metric.title} ({', '.join(facts)})"


def plot_curve(metrics_path: Path, png_path: Path) -> None:
    """Draw the first metric of the test (error in percent, for a classification) and the training loss of every local
    module against the epoch into ``png_path``, from light to dark along the depth.

    Epochs without a finite value (no test, or a diverged loss) leave out their point. Raises ConfigError when
    matplotlib is missing or the metrics hold no epoch.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing the curve needs matplotlib; run: pip install localpipe[plot]") from error
    epochs = read_metrics(metrics_path)
    if not epochs:
        raise ConfigError(f"metrics '{metrics_path}' holds no finished epoch; train at least 1 epoch")
    levels = _levels(epochs) or [""]
    modules = len(epochs[-1]["modules"])
    shades = colormaps["viridis_r"]
    # A bare Figure draws without pyplot, hence without a display and without touching its global state.
    figure = Figure(figsize=(10, 0.6 + 3.6 * len(levels)), dpi=150, layout="constrained")
    grid = figure.subplots(len(levels), 2, squeeze=False, sharex=True)
    for row, level in zip(grid, levels, strict=True):
        for axes, panel in zip(row, _panels(epochs, level, len(levels) > 1), strict=True):
            _draw(axes, panel, modules, shades, len(epochs) <= 30)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
        axes.set_xlim(epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5)
    if levels != [""]:
        _depth_bar(figure, grid, modules, shades)
    figure.savefig(png_path)


def _draw(axes: Axes, panel: _Panel, modules: int, shades: Colormap, dots: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, loc="left", fontweight="bold", fontsize="medium")
    axes.set_ylabel(panel.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = [points for points in (panel.final, *panel.modules.values()) if points]
    if not drawn:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_GREY)
        return
    if panel.final:
        xs, ys = zip(*panel.final, strict=True)
        axes.plot(xs, ys, color=_BLACK, marker="o" if dots else None, markersize=4, linewidth=2.0, zorder=3)
        axes.set_title(f"epoch {xs[-1]}: {panel.last}", loc="right", color=_BLACK, fontsize="small")
    for index, points in panel.modules.items():
        if points:
            xs, ys = zip(*points, strict=True)
            colour = shades(_shade(index, modules))
            axes.plot(xs, ys, color=colour, marker="o" if dots else None, markersize=2.5, linewidth=1.2)
    values = [value for points in drawn for _, value in points]
    low, high = min(values), max(values)
    if panel.loss and low > 0 and high > _WIDE_RANGE * low:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, low * 1.08), top=max(high * 1.08, 1e-9))


def _depth_bar(figure: Any, grid: Any, modules: int, shades: Colormap) -> None:
    """A bar in place of a legend, which has no room for fifty modules."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shown = modules - 1  # the final one is black
    colours = ListedColormap([shades(_shade(index, modules)) for index in range(shown)])
    norm = BoundaryNorm([index - 0.5 for index in range(shown + 1)], shown)
    every = max(1, -(-shown // 8))
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=grid, ticks=range(0, shown, every), aspect=35, fraction=0.03, pad=0.015
    )
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(f"local module (the final one, {shown}, is black)", fontsize="small")


def _shade(index: int, modules: int) -> float:
    """Where a module's colour lies in the map: light at the images, dark at the end."""
    low, high = 1.0 - _SHADES[1], 1.0 - _SHADES[0]
    return low + (high - low) * index / max(modules - 2, 1)


def _levels(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Levels of the auxiliary heads, in the order in which modules name them."""
    modules = epochs[-1]["modules"]
    return [level for level in dict.fromkeys(level_of(n) for m in modules for n in m["losses"]) if level != FINAL]


def _panels(epochs: Sequence[Mapping[str, Any]], level: str, several: bool) -> tuple[_Panel, _Panel]:
    """The test and the training of the heads of one level; level "": the final module only."""
    metric = metric_of(epochs[-1])
    of_level = f", {level} level" if several else ""
    indices = [m["index"] for m in epochs[-1]["modules"] if level and not any(map(_is_final, m["losses"]))]
    tests, losses = (
        {index: _points(epochs, (value(epoch["modules"][index], level) for epoch in epochs)) for index in indices}
        for value in (lambda module, level: _of_head(module, level, metric), _loss)
    )
    final_test = _points(epochs, (measured(epoch, metric) for epoch in epochs))
    final_loss = _points(epochs, (epoch["train_loss"] for epoch in epochs))
    terms = {name for m in epochs[-1]["modules"] for name in m["losses"] if level_of(name) == level}
    summed = f"sum of {len(terms)} terms, " if len(terms) > 1 else ""
    return (
        _Panel(
            {index: points for index, points in tests.items() if points},
            final_test,
            f"test {metric.title}{of_level}",
            metric_label(metric),
            metric.text(final_test[-1][1]) if final_test else "",
            False,
        ),
        _Panel(
            losses,
            final_loss,
            f"training loss{of_level}",
            f"loss ({summed}epoch mean)",
            loss_text(final_loss[-1][1]) if final_loss else "",
            True,
        ),
    )


def _is_final(name: str) -> bool:
    return level_of(name) == FINAL


def _of_head(module: Mapping[str, Any], level: str, metric: MetricForm) -> float | None:
    """What one auxiliary head reaches in the test."""
    if metric.name == ERROR.name:
        value = module["head_error_pct"].get(level)
    else:
        value = module.get("head_metrics", {}).get(f"{level}.{metric.name}")
    return None if value is None else float(value)


def _loss(module: Mapping[str, Any], level: str) -> float | None:
    """The sum of a level's terms; None where one is missing or not finite."""
    terms = [value for name, value in module["losses"].items() if level_of(name) == level]
    return None if not terms or None in terms else float(sum(terms))


def _points(epochs: Sequence[Mapping[str, Any]], values: Iterable[float | None]) -> Points:
    pairs = zip(epochs, values, strict=True)
    return [(e["epoch"], value) for e, value in pairs if value is not None and math.isfinite(value)]
