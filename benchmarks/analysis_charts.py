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
    """Above: CKA with the same block, a line per network. Below a map of all pairs for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["network"] for row in rows))
    width = max(2, len(names))
    figure = pyplot.figure(figsize=(2.3 * width + 0.9, 5.6), dpi=150, layout="constrained")
    try:
        above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1), squeeze=False)[:, 0]
        lines = above.subplots()
        lines.spines[["top", "right"]].set_visible(False)
        pairs = below.subplots(1, len(names), squeeze=False, sharey=True)[0]
        _lines(lines, rows, "same", first_black=False)
        lines.set_ylim(0, 1)
        lines.set_title(f"CKA with the same block of {rows[0]['reference']}", loc="left", fontsize=9, color=INK)
        lines.legend(fontsize=7, frameon=False)
        for axes, name in zip(pairs, names, strict=True):
            of = [row for row in rows if row["network"] == name]
            shown = axes.imshow([row["all"] for row in of], vmin=0, vmax=1, cmap="viridis", origin="lower")
            axes.set_title(name, loc="left", fontsize=9, color=INK)
            axes.set_xlabel(f"block of {of[0]['reference']}", fontsize=8, color=INK)
            axes.set_xticks(range(0, len(of[0]["all"]), 4))
            axes.set_yticks(range(0, len(of), 4))
            axes.tick_params(colors=INK, length=0, labelsize=7)
        pairs[0].set_ylabel("block", fontsize=8, color=INK)
        below.colorbar(shown, ax=pairs, shrink=0.8).ax.tick_params(labelsize=7)
        figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
    finally:
        pyplot.close(figure)


def draw_tsne(rows: Sequence[Row], path: Path) -> None:
    """A panel per network, a colour per class."""
    from matplotlib import colormaps

    with _panels(path, len(rows), 3.2) as (_, panels):
        for axes, row in zip(panels, rows, strict=True):
            x, y = zip(*row["points"], strict=True)
            axes.scatter(x, y, c=row["labels"], cmap=colormaps["tab10"], s=4, linewidths=0)
            axes.set_title(f"{row['network']} ({row['silhouette']:.2f})", loc="left", fontsize=9, color=INK)
            axes.set_axis_off()


def draw_maps(rows: Sequence[Row], pixels: Sequence[Any], path: Path) -> None:
    """A line per image: the image, then a picture per block and network."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    columns = sorted(dict.fromkeys((row["block"], row["network"]) for row in rows), key=lambda each: each[0])
    height, width = len(pixels), len(columns) + 1
    figure, grid = pyplot.subplots(
        height, width, figsize=(0.8 * width, 0.82 * height + 0.5), dpi=150, layout="constrained", squeeze=False
    )
    by = {(row["block"], row["network"], row["image"]): row["map"] for row in rows}
    for index, (line, image) in enumerate(zip(grid, pixels, strict=True)):
        line[0].imshow(np.array(image, dtype=np.uint8).squeeze(), cmap="gray")
        for axes, place in zip(line[1:], columns, strict=True):
            axes.imshow(by[*place, index], cmap="inferno", vmin=0, vmax=1)
    for axes, (block, network) in zip(grid[0][1:], columns, strict=True):
        axes.set_title(f"{block}\n{network}", fontsize=5.5, color=INK)
    for axes in grid.flat:
        axes.set_axis_off()
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
