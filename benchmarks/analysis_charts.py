"""The figures of benchmarks/analysis.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner import INK, picture
from tables import Row

BLACK = "#111111"


def draw_probe(rows: Sequence[Row], path: Path) -> None:
    """Error by block, a line per network; the first one in black."""
    with picture(path, "error % of a linear classifier on a block's output", 4.0, "outside right upper") as axes:
        _lines(axes, rows, "error")


def draw_cka(rows: Sequence[Row], path: Path) -> None:
    """Left: CKA with the same block, a line per network. Right of it a map of all pairs for each."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    with _panels(path, 1 + len(names), 3.6) as (figure, panels):
        lines, *pairs = panels
        _lines(lines, rows, "same", first_black=False)
        lines.set_ylim(0, 1)
        lines.set_title(f"CKA with the same block of {rows[0]['reference']}", loc="left", fontsize=9, color=INK)
        lines.legend(fontsize=7, frameon=False)
        for axes, name in zip(pairs, names, strict=True):
            of = [row for row in rows if row["network"] == name]
            shown = axes.imshow([row["all"] for row in of], vmin=0, vmax=1, cmap="viridis", origin="lower")
            axes.set_title(name, loc="left", fontsize=9, color=INK)
            axes.set_xlabel(f"block of {of[0]['reference']}", fontsize=8, color=INK)
            axes.set_ylabel("block", fontsize=8, color=INK)
            axes.tick_params(colors=INK, length=0, labelsize=7)
        figure.colorbar(shown, ax=pairs, shrink=0.8)


def draw_tsne(rows: Sequence[Row], path: Path) -> None:
    """A panel per network, a colour per class."""
    from matplotlib import colormaps

    with _panels(path, len(rows), 3.2) as (_, panels):
        for axes, row in zip(panels, rows, strict=True):
            x, y = zip(*row["points"], strict=True)
            axes.scatter(x, y, c=row["labels"], cmap=colormaps["tab10"], s=4, linewidths=0)
            axes.set_title(f"{row['network']} ({row['silhouette']:.2f})", loc="left", fontsize=9, color=INK)
            axes.set_xticks([])
            axes.set_yticks([])


def draw_maps(rows: Sequence[Row], pixels: Sequence[Any], path: Path) -> None:
    """A line of pictures per network and block below the images themselves."""
    import numpy as np
    from matplotlib import pyplot

    lines = list(dict.fromkeys((row["network"], row["block"]) for row in rows))
    height, width = len(lines) + 1, len(pixels)
    figure, grid = pyplot.subplots(
        height, width, figsize=(1.1 * width + 2.2, 1.12 * height), dpi=150, layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, image in zip(grid[0], pixels, strict=True):
        axes.imshow(np.array(image, dtype=np.uint8).squeeze(), cmap="gray")
    by = {(row["network"], row["block"], row["image"]): row["map"] for row in rows}
    for line, (network, block) in zip(grid[1:], lines, strict=True):
        for index, axes in enumerate(line):
            axes.imshow(by[network, block, index], cmap="inferno", vmin=0, vmax=1)
        line[0].set_ylabel(f"{network}\n{block}", fontsize=7, color=INK, rotation=0, ha="right", va="center")
    figure.savefig(path)
    pyplot.close(figure)


def _lines(axes: Any, rows: Sequence[Row], key: str, first_black: bool = True) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(row["network"] for row in rows))
    colours = list(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    chosen = [BLACK, *colours] if first_black else colours
    blocks: list[str] = []
    for name, colour in zip(names, chosen, strict=False):
        of = [row for row in rows if row["network"] == name]
        blocks = max(blocks, [row["block"] for row in of], key=len)
        axes.plot(range(len(of)), [row[key] for row in of], label=name, color=colour, marker="o", markersize=3)
    axes.set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", fontsize=7)
    axes.tick_params(colors=INK, length=0, labelsize=7)
    axes.grid(color="#d9dce1", linewidth=0.7)


@contextmanager
def _panels(path: Path, count: int, side: float) -> Iterator[tuple[Any, Sequence[Any]]]:
    """A row of ``count`` axes, ``side`` inches each; written to ``path`` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, count, figsize=(side * count + 0.8, side + 0.4), dpi=150, layout="constrained", squeeze=False
    )
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
    yield figure, grid[0]
    figure.savefig(path)
    pyplot.close(figure)
