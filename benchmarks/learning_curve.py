"""A finished run as a page for benchmarks/results: command, hardware, versions, error per epoch, and the curve.

    python benchmarks/learning_curve.py RUN_DIR benchmarks/results/NAME --command "torchrun ... launch/train.py ..."

Writes NAME.md and NAME.png (needs matplotlib: pip install "localpipe[plot]").
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from runner import hardware
from tables import Column, Table

from pipeline import plot_curve, read_metrics

EPOCHS = (
    Column("epoch", "epoch"), Column("steps", "step"), Column("learning rate", "learning_rate", ".4g"),
    Column("train loss", "train_loss", ".3f"), Column("test error %", "test_error_pct", ".2f"),
)  # fmt: skip
MODULES = (
    Column("module", "index"), Column("blocks", "blocks"), Column("error of its heads on the test set, %", "errors"),
)  # fmt: skip


def page(command: str, summary: dict[str, Any], epochs: list[dict[str, Any]], picture: str) -> str:
    """The run as Markdown."""
    modules = []
    for module in epochs[-1]["modules"]:
        errors = [f"{level} {error:.2f}" for level, error in module["head_error_pct"].items() if error is not None]
        modules.append({**module, "errors": ", ".join(errors)})
    parts = [
        f"# {summary['name']} on {summary['data']}: {summary['method']}, K = {summary['modules']}",
        f"    {command}",
        f"{datetime.date.today().isoformat()}, {hardware()}, torch {summary['versions']['torch']}, "
        f"{summary['world_size']} processes, {summary['precision']}, cascade span {summary['cascade_span']}, patches "
        f"{summary['patches_grid']}x{summary['patches_grid']}, seed {summary['seed']}.",
        f"Test error after {summary['epochs']} epochs ({summary['steps']} steps): "
        f"**{summary['test_error_pct']:.2f} %** (last epoch, one seed), {summary['images_per_s']:.0f} images/s, "
        f"{summary['train_wall_s']:.0f} s of training.",
        Table(EPOCHS, epochs).markdown,
        Table(MODULES, modules).markdown,
        f"![learning curve]({picture})",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("output", type=Path, help="path without suffix")
    parser.add_argument("--command", required=True, help="the command that made the run")
    given = parser.parse_args()
    summary = json.loads((given.run_dir / "summary.json").read_text())
    metrics, picture = given.run_dir / "metrics.jsonl", given.output.with_suffix(".png")
    plot_curve(metrics, picture)
    given.output.with_suffix(".md").write_text(page(given.command, summary, read_metrics(metrics), picture.name))


if __name__ == "__main__":
    main()
