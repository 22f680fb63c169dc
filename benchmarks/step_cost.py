"""What one training step of local learning costs, in units of one backpropagation step of the same network.

    python benchmarks/step_cost.py [--rounds N] [--steps N] [--batch N] [--precision fp32|bf16] [--quick]
                                   [--json FILE] [--output FILE.md]
    python benchmarks/step_cost.py --recipes [the same options]

One process with one thread; ResNet-32 at 32x32, or with ``--recipes`` every recipe that ships with the package. In
every round each step of a method has a step of backpropagation before it, so a ratio compares neighbours in time.
Seconds are CPU seconds of the process, which other processes on the machine disturb less; the table shows wall seconds
too. The units counted in operations (``step_cost``) stand beside.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tables import (
    Row,
    at_least,
    check_targets,
    document,
    markdown,
    number,
    output_options,
    provenance,
    show,
    spread,
    write_json,
)
from torch import nn
from torchvision.io import write_png

from pipeline import (
    Config,
    ConfigError,
    LoaderData,
    StepCost,
    build_blocks,
    load_config,
    recipe_names,
    step_cost,
    train,
)

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
RUN = ["runtime.device=cpu", "runtime.threads=1", "optim.warmup_epochs=0", "optim.schedule=constant", "train.epochs=1"]


@dataclass(frozen=True)
class Case:
    """What is measured: a configuration on images of one shape. Data and place of a recipe do not matter here."""

    name: str
    config: Config
    image: tuple[int, int, int]

    @property
    def bp(self) -> Case:
        """Backpropagation of the same network at the same batch and precision."""
        run = [f"model.name={self.config.model.name}", "model.modules=1", *RUN]
        run += [f"data.batch_size={self.batch}", f"precision.compute={self.config.precision.compute}"]
        return Case("BP", load_config("cifar10-resnet32-bp", assignments=run), self.image)

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.config.data.batch_size


def method_cases(batch: int, precision: str) -> list[Case]:
    """The methods on ResNet-32."""
    run = [f"model.name={MODEL}", f"data.batch_size={batch}", f"precision.compute={precision}", *RUN]
    return [
        Case(name, load_config("cifar10-resnet32-bp", assignments=[*run, *method]), IMAGE)
        for name, method in METHODS.items()
    ]


def recipe_cases(batch: int, precision: str, quick: bool, steps: int, folder: Path) -> list[Case]:
    """All recipes, or some, on pictures in ``folder``; larger ones make smaller batches, with about as many pixels."""
    cases = []
    for image in {IMAGE, *SHAPES.values()}:
        write_pictures(folder / str(image[1]), image, batch * steps)
    for name in recipe_names():
        image = SHAPES.get(load_config(name).data.name, IMAGE)
        images = max(2, round(batch * IMAGE[1] * IMAGE[2] / (image[1] * image[2])))
        run = [f"data.batch_size={images}", f"precision.compute={precision}", f"train.max_steps={steps}", *RUN]
        run += ["data.name=folder", f"data.root={folder / str(image[1])}", "data.augment=none"]
        if not quick or name.startswith("cifar10-resnet32-k4"):
            cases.append(Case(name, load_config(name, assignments=run), image))
    return cases


def write_pictures(root: Path, image: tuple[int, int, int], count: int) -> None:
    """An image folder of noise: ``count`` pictures to train on, one of each class to test."""
    generator = torch.Generator().manual_seed(0)
    for split, pictures in (("train", count), ("test", CLASSES)):
        for index in range(pictures):
            path = root / split / str(index % CLASSES) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.randint(256, image, generator=generator, dtype=torch.uint8), str(path))


def run_steps(case: Case, steps: int, before_action: Callable[[int, Any], None]) -> None:
    """Train ``steps`` steps in this process: on the same random batch, or on the pictures of a recipe's case."""
    if case.config.data.name == "folder":
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            train(case.config, run_dir=Path(folder) / "run", quiet=True, before_action=before_action)
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (case.batch, *case.image), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator)
    data = LoaderData([(images, labels)] * steps, [(images[:2], labels[:2])])
    torch.manual_seed(0)
    network = nn.Sequential(*build_blocks(case.config.model.name, case.image[0], CLASSES).values())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run_dir = Path(folder) / "run"
        train(case.config, network=network, data=data, run_dir=run_dir, quiet=True, before_action=before_action)


def seconds(case: Case, steps: int) -> tuple[float, float]:
    """CPU seconds and wall seconds of one step: mean over ``steps`` steps after one to warm up."""
    clocks: dict[int, tuple[float, float]] = {}

    def started(step: int, _: object) -> None:
        clocks.setdefault(step, (time.process_time(), time.perf_counter()))

    run_steps(case, steps + 2, started)  # the last step only marks the end of the one before
    cpu, wall = (after - before for before, after in zip(clocks[1], clocks[steps + 1], strict=True))
    return cpu / steps, wall / steps


def measure(cases: Sequence[Case], rounds: int, steps: int) -> list[dict[str, Any]]:
    """All cases, interleaved; one row each. Cases that differ in name only are measured once."""
    samples: dict[Any, list[tuple[tuple[float, float], tuple[float, float]]]] = {_work(case): [] for case in cases}
    for _ in range(rounds):
        for case in {_work(case): case for case in cases}.values():
            base = seconds(case.bp, steps)
            samples[_work(case)].append((base if case.name == "BP" else seconds(case, steps), base))
    units: dict[Any, tuple[StepCost, StepCost]] = {}
    rows = []
    for case in cases:
        if _work(case) not in units:
            units[_work(case)] = tuple(step_cost(case.config, case.image, CLASSES, plain) for plain in (False, True))
        rows.append(row(case, samples[_work(case)], *units[_work(case)]))
    return rows


def _work(case: Case) -> Any:
    """What decides how much a case computes."""
    config = case.config
    return config.model, config.method, config.hierarchy, config.patches, case.image, case.batch


def row(
    case: Case, found: Sequence[tuple[tuple[float, float], tuple[float, float]]], cost: StepCost, plain: StepCost
) -> dict[str, Any]:
    """One row from the (CPU, wall) seconds of the case and of BP in every round; ratios are medians over the rounds."""
    cpu, wall = (spread([own[clock] / base[clock] for own, base in found]) for clock in (0, 1))
    rate, low, high = spread([case.batch / own[1] for own, _ in found])
    method = case.config.method.name if case.config.model.modules > 1 else "bp"
    common = Row(
        system="localpipe",
        method=method if case.config.hierarchy.cascade_span == 1 else f"{method} + hpff",
        schedule="exact",
        ranks=1,
        modules=len(cost.modules),
        micro_batches=1,
        images_per_s=rate,
        low=low,
        high=high,
        ratio_to_bp=1.0 / wall[0],
        bound=None,
        efficiency=None,
        busy=(),
        bytes_per_step=0.0,
    )
    return {
        **asdict(common),
        "name": case.name,
        "batch": case.batch,
        "cpu_s_per_step": statistics.median(own[0] for own, _ in found),
        "bp_units_measured": cpu[0],
        "bp_units_low": cpu[1],
        "bp_units_high": cpu[2],
        "bp_units_wall": wall[0],
        "bp_gflops_per_image": cost.bp_flops / 1e9,
        "bp_units_flops": cost.bp_units,
        "bp_units_flops_plain": plain.bp_units,
        "trunk": cost.trunk,
        "heads": cost.heads,
        "largest_module": max(module.total for module in cost.modules),
        "measured_over_flops": cpu[0] / cost.bp_units,
    }


COLUMNS = {
    "K": "modules",
    "batch": "batch",
    "CPU s/step": "cpu_s_per_step",
    "BP units": "bp_units_measured",
    "low": "bp_units_low",
    "high": "bp_units_high",
    "wall units": "bp_units_wall",
    "FLOP units": "bp_units_flops",
    "measured / FLOPs": "measured_over_flops",
    "trunk": "trunk",
    "heads": "heads",
    "largest module": "largest_module",
    "plain order": "bp_units_flops_plain",
    "BP GFLOP/image": "bp_gflops_per_image",
}
"""Columns and keys of the table; those from "trunk" on are counted operations in BP units."""


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table as text."""
    return [
        [r["name"], *(str(r[key]) if isinstance(r[key], int) else number(r[key], ".2f") for key in COLUMNS.values())]
        for r in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=at_least(1), default=1, help="measured steps of one round")
    parser.add_argument("--batch", type=at_least(2), default=128, help="images of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of BP and of the methods")
    parser.add_argument("--quick", action="store_true", help="one round at batch 4, every fourth method: seconds")
    parser.add_argument("--recipes", action="store_true", help="measure every recipe instead")
    output_options(parser)
    options = parser.parse_args()
    check_targets(json=options.json, output=options.output)
    rounds, batch = (1, 4) if options.quick else (options.rounds, options.batch)
    settings = {"rounds": rounds, "steps": options.steps, "batch": batch, "precision": options.precision}
    with tempfile.TemporaryDirectory() as pictures:
        if options.recipes:
            cases = recipe_cases(batch, options.precision, options.quick, options.steps + 2, Path(pictures))
        else:
            cases = method_cases(batch, options.precision)[:: 4 if options.quick else 1]
        rows = measure(cases, rounds, options.steps)
    result = document({**settings, "recipes": options.recipes, "threads": 1}, rows)
    columns = ["recipe" if options.recipes else "method", *COLUMNS]
    show("one training step in units of one BP step", columns, cells(result["rows"]))
    if options.json is not None:
        write_json(options.json, result)
    if options.output is not None:
        flags = (["--recipes"] if options.recipes else []) + [f"--{name} {value}" for name, value in settings.items()]
        command = " ".join(["python benchmarks/step_cost.py", *flags])
        table = markdown(columns, cells(result["rows"]))
        options.output.write_text(f"{provenance(result, command)}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"step_cost.py: {error}")
