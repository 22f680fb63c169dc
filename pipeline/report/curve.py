"""A picture of the learning curve; matplotlib is an optional dependency and loaded only here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.base.metric import ERROR, MetricForm
from pipeline.store.run_directory import read_metrics

_TEST, _TRAIN = "#1f5fa8", "#c8641b"  # blue and orange differ for colour-blind readers too


@dataclass(frozen=True)
class _Panel:
    """One curve: its (epoch, value) points, where there is a value, and how it reads."""

    points: list[tuple[int, float]]
    title: str
    label: str
    text: Callable[[float], str]
    colour: str


def plot_curve(metrics_path: Path, png_path: Path) -> None:
    """Draw the first metric of the test (error in percent, for a classification) and the training loss against the
    epoch into ``png_path``.

    Epochs without a finite value (no test, or a diverged loss) leave out their point. Raises ConfigError when
    matplotlib is missing or the metrics hold no epoch.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError("drawing the curve needs matplotlib; run: pip install localpipe[plot]") from error
    epochs = read_metrics(metrics_path)
    if not epochs:
        raise ConfigError(f"metrics '{metrics_path}' holds no finished epoch; train at least 1 epoch")
    # A bare Figure draws without pyplot, hence without a display and without touching its global state.
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), _panels(epochs), strict=True):
        axes.set_title(panel.title, loc="left", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.set_ylabel(panel.label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5)
        if not panel.points:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
            continue
        xs, ys = zip(*panel.points, strict=True)
        axes.plot(xs, ys, color=panel.colour, marker="o", markersize=4, linewidth=1.8)
        axes.set_ylim(bottom=min(0.0, min(ys) * 1.08), top=max(max(ys) * 1.12, 1e-9))
        axes.set_title(f"epoch {xs[-1]}: {panel.text(ys[-1])}", loc="right", color=panel.colour, fontsize="medium")
    figure.savefig(png_path)


def _panels(epochs: Sequence[Mapping[str, Any]]) -> tuple[_Panel, _Panel]:
    """The test and the training."""
    form = epochs[-1].get("metric")
    metric = MetricForm(**form) if form else ERROR  # metrics of older versions do not say it, and count errors
    is_error = metric.name == ERROR.name
    measured = (e["test_error_pct"] if is_error else e.get("test_metrics", {}).get(metric.name) for e in epochs)
    facts = [metric.unit] if metric.unit else []
    facts += [] if metric == ERROR else [metric.direction]
    title = f"test {metric.title}"
    return (
        _Panel(_points(epochs, measured), title, f"{title} ({', '.join(facts)})", metric.text, _TEST),
        _Panel(
            _points(epochs, (e["train_loss"] for e in epochs)),
            "training loss",
            "loss of the final module (epoch mean)",
            "{:.3f}".format,
            _TRAIN,
        ),
    )


def _points(epochs: Sequence[Mapping[str, Any]], values: Iterable[float | None]) -> list[tuple[int, float]]:
    pairs = zip(epochs, values, strict=True)
    return [(e["epoch"], value) for e, value in pairs if value is not None and math.isfinite(value)]
