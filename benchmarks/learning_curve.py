"""A finished run as a page for benchmarks/results: command, hardware, versions, error per epoch, and the curve.

    python benchmarks/learning_curve.py RUN_DIR benchmarks/results/NAME --command "torchrun ... launch/train.py ..."

Writes NAME.md and NAME.png (needs matplotlib: pip install "localpipe[plot]").
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from pipeline import plot_curve, read_metrics


def page(command: str, summary: dict[str, Any], epochs: list[dict[str, Any]], picture: str) -> str:
    """The run as Markdown."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"# {summary['name']} on {summary['data']}: {summary['method']}, K = {summary['modules']}",
        "",
        f"    {command}",
        "",
        f"{datetime.date.today().isoformat()}, {platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), "
        f"{cores} cores, torch {summary['versions']['torch']}, {summary['world_size']} processes, "
        f"{summary['precision']}, cascade span {summary['cascade_span']}, patches {summary['patches_grid']}x"
        f"{summary['patches_grid']}, seed {summary['seed']}.",
        "",
        f"Test error after {summary['epochs']} epochs ({summary['steps']} steps): "
        f"**{summary['test_error_pct']:.2f} %** (last epoch, one seed), {summary['images_per_s']:.0f} images/s, "
        f"{summary['train_wall_s']:.0f} s of training.",
        "",
        "| epoch | steps | learning rate | train loss | test error % |",
        "|---|---|---|---|---|",
    ]
    for epoch in epochs:
        tested = "" if epoch["test_error_pct"] is None else f"{epoch['test_error_pct']:.2f}"
        numbers = f"{epoch['learning_rate']:.4g} | {epoch['train_loss']:.3f}"
        lines.append(f"| {epoch['epoch']} | {epoch['step']} | {numbers} | {tested} |")
    lines += ["", "| module | blocks | error of its heads on the test set, % |", "|---|---|---|"]
    for module in epochs[-1]["modules"]:
        errors = ", ".join(f"{level} {e:.2f}" for level, e in module["head_error_pct"].items() if e is not None)
        lines.append(f"| {module['index']} | {module['blocks']} | {errors} |")
    return "\n".join([*lines, "", f"![learning curve]({picture})", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("output", type=Path, help="path without suffix")
    parser.add_argument("--command", required=True, help="the command that made the run")
    arguments = parser.parse_args()
    summary = json.loads((arguments.run_dir / "summary.json").read_text())
    metrics = arguments.run_dir / "metrics.jsonl"
    picture = arguments.output.with_suffix(".png")
    plot_curve(metrics, picture)
    text = page(arguments.command, summary, read_metrics(metrics), picture.name)
    arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
