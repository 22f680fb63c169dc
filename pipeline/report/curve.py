"""A picture of the learning curve; matplotlib is an optional dependency and loaded only here."""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.base.errors import ConfigError
from pipeline.store.run_directory import read_metrics

# Blue and orange differ for colour-blind readers too.
_PANELS = (
    ("test_error_pct", "test error (%)", "test error", "{:.2f} %", "#1f5fa8"),
    ("train_loss", "loss of the final module (epoch mean)", "training loss", "{:.3f}", "#c8641b"),
)


def plot_curve(metrics_path: Path, png_path: Path) -> None:
    """Draw test error (percent) and training loss against the epoch into ``png_path``.

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
    for axes, (key, label, title, form, colour) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        points = [(e["epoch"], e[key]) for e in epochs if e[key] is not None and math.isfinite(e[key])]
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5)
        if not points:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
            continue
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, marker="o", markersize=4, linewidth=1.8)
        axes.set_ylim(bottom=min(0.0, min(ys) * 1.08), top=max(max(ys) * 1.12, 1e-9))
        axes.set_title(f"epoch {xs[-1]}: {form.format(ys[-1])}", loc="right", color=colour, fontsize="medium")
    figure.savefig(png_path)
