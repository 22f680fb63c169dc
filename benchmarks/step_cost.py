"""What one training step of local learning costs, in units of one backpropagation step of the same network.

    python benchmarks/step_cost.py [--rounds N] [--steps N] [--batch N] [--precision fp32|bf16] [--quick]
                                   [--json FILE] [--output FILE.md]
    python benchmarks/step_cost.py --recipes [--json FILE] [--output FILE.md]

ResNet-32 at 32x32 in one process with one thread. Every round measures every method once, so a ratio to
backpropagation compares neighbours in time. Seconds are CPU seconds of the process, which other processes on the
machine disturb less; the table shows wall seconds too. The units counted in operations (``step_cost``) stand beside.
``--recipes`` counts the operations of all recipes that ship with the package and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tables import at_least, document, markdown, number, provenance, show, spread, write_json
from torch import nn

from pipeline import LoaderData, build_blocks, load_config, recipe_names, step_cost, train

MODEL, CLASSES, IMAGE = "resnet32", 10, (3, 32, 32)
LOCAL = ["model.modules=16", "model.cuts=even"]
HPFF = ["model.modules=15", "model.cuts=even", "hierarchy.cascade_span=2", "patches.grid=2"]  # the cut of HPFF's K = 16
METHODS = {
    "BP": ["model.modules=1"],
    "HPFF as released, 2c2f": [*HPFF, "method.name=infopro", "method.head=2c2f", "hierarchy.variant=released"],
    "InfoPro + HPFF, 2c2f": [*HPFF, "method.name=infopro", "method.head=2c2f"],
    "InfoPro + HPFF, 1c2f": [*HPFF, "method.name=infopro", "method.head=1c2f"],
    "DGL + HPFF": [*HPFF, "method.name=dgl"],
    "PredSim + HPFF": [*HPFF, "method.name=predsim"],
    "InfoPro, 1c2f": [*LOCAL, "method.name=infopro", "method.head=1c2f"],
    "DGL": [*LOCAL, "method.name=dgl"],
    "PredSim": [*LOCAL, "method.name=predsim"],
}
SHAPES = {"stl10": (3, 96, 96)}  # of the data sets with other images than IMAGE


def assignments(method: str, batch: int, precision: str) -> list[str]:
    """The configuration of a method, as ``load_config`` takes it."""
    run = [f"model.name={MODEL}", f"data.batch_size={batch}", f"precision.compute={precision}"]
    run += ["runtime.device=cpu", "runtime.threads=1", "optim.warmup_epochs=0", "optim.schedule=constant"]
    return [*run, *METHODS[method]]


def seconds(method: str, batch: int, precision: str, steps: int) -> tuple[float, float]:
    """CPU seconds and wall seconds of one step: mean over ``steps`` steps after one to warm up."""
    clocks: dict[int, tuple[float, float]] = {}

    def started(step: int, _: object) -> None:
        clocks.setdefault(step, (time.process_time(), time.perf_counter()))

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, *IMAGE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    batches = [(images, labels)] * (steps + 2)  # the last one only marks the end of the one before
    data = LoaderData(batches, [(images[:2], labels[:2])])
    config = load_config("cifar10-resnet32-bp", assignments=[*assignments(method, batch, precision), "train.epochs=1"])
    torch.manual_seed(0)
    network = nn.Sequential(*build_blocks(MODEL, IMAGE[0], CLASSES).values())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(config, network=network, data=data, run_dir=Path(folder) / "run", quiet=True, before_action=started)
    cpu, wall = (after - before for before, after in zip(clocks[1], clocks[steps + 1], strict=True))
    return cpu / steps, wall / steps


def measure(rounds: int, steps: int, batch: int, precision: str) -> list[dict[str, Any]]:
    """All methods, interleaved; one row each."""
    samples: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, found in samples.items():
            found.append(seconds(method, batch, precision, steps))
    return [row(method, found, samples["BP"], batch, precision) for method, found in samples.items()]


def row(
    method: str, found: Sequence[tuple[float, float]], bp: Sequence[tuple[float, float]], batch: int, precision: str
) -> dict[str, Any]:
    """Ratios are medians over the rounds."""
    config = load_config("cifar10-resnet32-bp", assignments=assignments(method, batch, precision))
    cost = step_cost(config, IMAGE, CLASSES)
    cpu, wall = (
        spread([own[clock] / base[clock] for own, base in zip(found, bp, strict=True)]) for clock in (0, 1)
    )
    speed = spread([batch / own for _, own in found])
    return {
        "system": "localpipe",
        "method": method,
        "schedule": "exact",
        "ranks": 1,
        "modules": config.model.modules,
        "micro_batches": 1,
        "images_per_s": speed[0],
        "low": speed[1],
        "high": speed[2],
        "ratio_to_bp": 1.0 / wall[0],
        "bound": None,
        "efficiency": None,
        "busy": None,
        "bytes_per_step": 0,
        "cpu_s_per_step": statistics.median(own for own, _ in found),
        "bp_units_measured": cpu[0],
        "bp_units_low": cpu[1],
        "bp_units_high": cpu[2],
        "bp_units_wall": wall[0],
        "bp_units_flops": cost.bp_units,
        "bp_units_flops_plain": step_cost(config, IMAGE, CLASSES, plain=True).bp_units,
        "measured_over_flops": cpu[0] / cost.bp_units,
    }


def measured_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of times."""
    columns = ["method", "K", "CPU s/step", "BP units", "low", "high", "wall units", "FLOP units", "measured / FLOPs"]
    keys = ["cpu_s_per_step", "bp_units_measured", "bp_units_low", "bp_units_high", "bp_units_wall"]
    keys += ["bp_units_flops", "measured_over_flops"]
    return columns, [[r["method"], str(r["modules"]), *(number(r[key], ".2f") for key in keys)] for r in rows]


def recipe_rows() -> list[dict[str, Any]]:
    """Cost of every shipped recipe in operations; nothing is measured."""
    rows = []
    counted: dict[Any, tuple[Any, Any]] = {}
    for name in recipe_names():
        config = load_config(name)
        shape = SHAPES.get(config.data.name, IMAGE)
        key = (config.model, config.method, config.hierarchy, config.patches, shape)  # recipes share these
        if key not in counted:
            counted[key] = tuple(step_cost(config, shape, CLASSES, plain=plain) for plain in (False, True))
        cost, plain_order = counted[key]
        rows.append(
            {
                "recipe": name,
                "modules": len(cost.modules),
                "bp_gflops_per_image": cost.bp_flops / 1e9,
                "bp_units_flops": cost.bp_units,
                "trunk": cost.trunk,
                "heads": cost.heads,
                "largest_module": max(module.total for module in cost.modules),
                "bp_units_flops_plain": plain_order.bp_units,
            }
        )
    return rows


def recipe_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of recipes."""
    columns = ["recipe", "modules", "BP GFLOP/image", "BP units", "trunk", "heads", "largest module", "plain order"]
    keys = ["bp_gflops_per_image", "bp_units_flops", "trunk", "heads", "largest_module", "bp_units_flops_plain"]
    return columns, [[r["recipe"], str(r["modules"]), *(number(r[key], ".3f") for key in keys)] for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=at_least(1), default=1, help="measured steps of one round")
    parser.add_argument("--batch", type=at_least(2), default=128, help="images of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of BP and of the methods")
    parser.add_argument("--quick", action="store_true", help="one round at batch 16")
    parser.add_argument("--recipes", action="store_true", help="count the operations of all recipes instead")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--output", metavar="FILE.md", type=Path, help="write the table as Markdown")
    options = parser.parse_args()
    rounds, batch = (1, 16) if options.quick else (options.rounds, options.batch)
    command = "python benchmarks/step_cost.py "
    if options.recipes:
        result = document({"recipes": "all"}, recipe_rows())
        columns, cells = recipe_cells(result["rows"])
        command += "--recipes"
    else:
        settings = {"rounds": rounds, "steps": options.steps, "batch": batch, "precision": options.precision}
        result = document({**settings, "threads": 1, "model": MODEL}, measure(*settings.values()))
        columns, cells = measured_cells(result["rows"])
        command += " ".join(f"--{name} {value}" for name, value in settings.items())
    show("one training step in units of one BP step", columns, cells)
    if options.json is not None:
        write_json(options.json, result)
    if options.output is not None:
        options.output.write_text(f"{provenance(result, command)}\n\n{markdown(columns, cells)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
