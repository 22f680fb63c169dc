"""What one training step of local learning costs, in units of one backpropagation step of the same network.

    python benchmarks/step_cost.py [--recipes] [--quick] [--json FILE] [--output FILE.md] ...      see --help

One process with one thread; ResNet-32 at 32x32, or with ``--recipes`` every recipe that ships with the package. In
every round each step of a method has a step of backpropagation before it, so a ratio compares neighbours in time.
Seconds are CPU seconds of the process, which other processes on the machine disturb less; the table shows wall seconds
too. The units counted in FLOPs and the operations of a step (``step_cost``) stand beside.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from networks import CLASSES, IMAGE, network, random_images
from runner import Report, Target, main, option
from tables import Column, K, Row, Table, make_row, method_name, spread
from torchvision.io import write_png

from pipeline import Config, LoaderData, StepCost, load_config, recipe_names, step_cost, train

LOCAL = ["model.modules=16", "model.cuts=even"]
HPFF = ["model.modules=15", "model.cuts=even", "hierarchy.cascade_span=2", "patches.grid=2"]  # the cut of HPFF's K = 16
ALL_AT_ONCE = ["hierarchy.levels=together", "patches.at_once=4"]  # "auto" takes fewer where that needs much memory
_SEPARATE = {
    "BP": ["model.modules=1"],
    "HPFF as released, 2c2f": [*HPFF, "method.name=infopro", "method.head=2c2f", "hierarchy.variant=released"],
    "InfoPro + HPFF, 2c2f": [*HPFF, "method.name=infopro", "method.head=2c2f"],
    "InfoPro + HPFF, 1c2f": [*HPFF, "method.name=infopro", "method.head=1c2f"],
    "DGL + HPFF": [*HPFF, "method.name=dgl"], "PredSim + HPFF": [*HPFF, "method.name=predsim"],
    "InfoPro, 1c2f": [*LOCAL, "method.name=infopro", "method.head=1c2f"],
    "DGL": [*LOCAL, "method.name=dgl"], "PredSim": [*LOCAL, "method.name=predsim"],
}  # fmt: skip
_FORMS = {
    name: {name: own} | ({f"{name}, all at once": [*own, *ALL_AT_ONCE]} if own[: len(HPFF)] == HPFF else {})
    for name, own in _SEPARATE.items()
}
METHODS = {name: own for forms in _FORMS.values() for name, own in forms.items()}
TARGETS = {  # written before it was measured: operations to BP's, BP units in fp32, in bf16 with units in hardware
    "DGL + HPFF": (4.0, 1.5, 1.6), "InfoPro + HPFF, 2c2f": (7.0, 4.0, 4.4), "HPFF as released, 2c2f": (6.0, 3.3, 3.5),
    "PredSim + HPFF": (5.0, 2.5, 2.7), "DGL": (1.5, 1.0, 1.0),
}  # fmt: skip
OF_FLOPS = 1.2
"""Target of every method: what is measured, to what is counted in FLOPs."""
QUICK = ("BP", "DGL + HPFF", "DGL + HPFF, all at once")
SHAPES = {"stl10": (3, 96, 96)}  # of the data sets with other images than IMAGE
RUN = ["runtime.device=cpu", "runtime.threads=1", "optim.warmup_epochs=0", "optim.schedule=constant", "train.epochs=1"]
RUN += ["log.curve=false"]


@dataclass(frozen=True)
class Settings:
    rounds: int = option(5, "interleaved rounds", "N")
    steps: int = option(1, "measured steps of one round", "N")
    batch: int = option(128, "images of a step", "N", above=1)
    precision: str = option("fp32", "of BP and of the methods", choices=("fp32", "bf16"))
    recipes: bool = option(False, "measure every recipe instead")
    threads: int = 1
    quick: bool = False


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

    def with_layers(self, layers: str | tuple[str, ...]) -> Case:
        """The same with other layers tuned."""
        return replace(self, config=replace(self.config, precision=replace(self.config.precision, layers=layers)))

    @property
    def work(self) -> Any:
        """What decides how much it computes."""
        config = self.config
        return config.model, config.method, config.hierarchy, config.patches, self.image, self.batch


def method_case(name: str, batch: int, precision: str = "fp32") -> Case:
    """One of METHODS on ResNet-32."""
    run = ["model.name=resnet32", f"data.batch_size={batch}", f"precision.compute={precision}", *RUN]
    return Case(name, load_config("cifar10-resnet32-bp", assignments=[*run, *METHODS[name]]), IMAGE)


def recipe_cases(settings: Settings, folder: Path) -> list[Case]:
    """All recipes, or some, on pictures in ``folder``; larger ones make smaller batches, with about as many pixels."""
    cases, steps = [], settings.steps + 2
    for image in {IMAGE, *SHAPES.values()}:
        write_pictures(folder / str(image[1]), image, settings.batch * steps)
    for name in recipe_names():
        image = SHAPES.get(load_config(name).data.name, IMAGE)
        images = max(2, round(settings.batch * IMAGE[1] * IMAGE[2] / (image[1] * image[2])))
        run = [f"data.batch_size={images}", f"precision.compute={settings.precision}", f"train.max_steps={steps}", *RUN]
        run += ["data.name=folder", f"data.root={folder / str(image[1])}", "data.augment=none"]
        if not settings.quick or name.startswith("cifar10-resnet32-k4"):
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
    own: dict[str, Any] = {}
    if case.config.data.name != "folder":
        images, labels = random_images(case.batch, case.image)
        own["data"] = LoaderData([(images, labels)] * steps, [(images[:2], labels[:2])])
        own["network"] = network(case.config.model.name)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(case.config, **own, run_dir=Path(folder) / "run", quiet=True, before_action=before_action)


def seconds(case: Case, steps: int) -> tuple[float, float]:
    """CPU seconds and wall seconds of one step: mean over ``steps`` steps after one to warm up."""
    clocks: dict[int, tuple[float, float]] = {}

    def started(step: int, _: object) -> None:
        clocks.setdefault(step, (time.process_time(), time.perf_counter()))

    run_steps(case, steps + 2, started)  # the last step only marks the end of the one before
    cpu, wall = (after - before for before, after in zip(clocks[1], clocks[steps + 1], strict=True))
    return cpu / steps, wall / steps


COLUMNS = (
    K, Column("batch", "batch"), Column("CPU s/step", "cpu_s_per_step", ".2f"),
    Column("BP units", "bp_units", ".2f"), Column("low", "bp_units_low", ".2f"),
    Column("high", "bp_units_high", ".2f"), Column("wall units", "bp_units_wall", ".2f"),
    Column("FLOP units", "bp_units_flops", ".2f"), Column("measured / FLOPs", "measured_over_flops", ".2f"),
    Column("trunk", "trunk", ".2f"), Column("heads", "heads", ".2f"),
    Column("largest module", "largest_module", ".2f"), Column("plain order", "bp_units_flops_plain", ".2f"),
    Column("BP GFLOP/image", "bp_gflops_per_image", ".2f"),
    Column("operations per step", "operations", ",d"), Column("per BP's", "operations_ratio", ".2f"),
    Column("launches", "launches", ",d"), Column("per BP's", "launches_ratio", ".2f"),
)  # fmt: skip
LEGEND = (
    "BP units: CPU seconds of a step to those of backpropagation (wall units: wall seconds). FLOP units: counted "
    "FLOPs and their parts; plain order: with upsampling before the convolution, as published. Operations: calls of "
    "PyTorch's dispatcher, below autograd, in forward, heads, backward and update of all local modules; on the code "
    "path of a CPU. Launches: those of them that compute or copy, so neither views nor memory alone."
)


def row_of(case: Case, found: Sequence[Any], cost: StepCost, plain: StepCost) -> Row:
    """One row from the (CPU, wall) seconds of the case and of BP in every round, and the counted operations."""
    units, low, high = spread([own[0] / base[0] for own, base in found])
    wall = statistics.median(own[1] / base[1] for own, base in found)
    config = case.config
    method = method_name(config.method.name, config.hierarchy.cascade_span) if config.model.modules > 1 else "bp"
    return make_row(
        case.batch, [own[1] for own, _ in found], method=method, modules=len(cost.modules), ratio_to_bp=1.0 / wall,
        name=case.name, batch=case.batch, cpu_s_per_step=statistics.median(own[0] for own, _ in found),
        bp_units=units, bp_units_low=low, bp_units_high=high, bp_units_wall=wall,
        bp_gflops_per_image=cost.bp_flops / 1e9, bp_units_flops=cost.bp_units, bp_units_flops_plain=plain.bp_units,
        trunk=cost.trunk, heads=cost.heads, largest_module=max(module.total for module in cost.modules),
        measured_over_flops=units / cost.bp_units, operations=cost.operations, operations_ratio=cost.operations_ratio,
        launches=cost.launches, launches_ratio=cost.launches_ratio,
    )  # fmt: skip


def targets(rows: Sequence[Row], precision: str) -> Iterator[Target]:
    """Of every method, by its better form."""
    by_name = {row["name"]: row for row in rows if row["name"] != "BP"}
    for name, (calls, fp32, bf16) in TARGETS.items():
        forms = {form: by_name[form] for form in _FORMS[name] if form in by_name}
        for key, most in (("operations_ratio", calls), ("bp_units", fp32 if precision == "fp32" else bf16)):
            if forms:
                best = min(forms, key=lambda form: forms[form][key])
                yield Target(f"{key} of {name}", {best: forms[best][key]}, most=most)
    yield Target("measured / FLOPs", {name: row["measured_over_flops"] for name, row in by_name.items()}, most=OF_FLOPS)


def measure(settings: Settings) -> Report:
    """All cases, interleaved; one row each. Cases that differ in name only are measured once."""
    with tempfile.TemporaryDirectory() as pictures:
        names = QUICK if settings.quick else METHODS
        cases = [method_case(name, settings.batch, settings.precision) for name in names]
        cases = recipe_cases(settings, Path(pictures)) if settings.recipes else cases
        different = {case.work: case for case in cases}
        samples: dict[Any, list[Any]] = {work: [] for work in different}
        for _ in range(settings.rounds):
            for work, case in different.items():
                base = seconds(case.bp, settings.steps)
                samples[work].append((base if case.name == "BP" else seconds(case, settings.steps), base))
    counted = {}
    for work, case in different.items():
        counted[work] = [step_cost(same.config, case.image, CLASSES) for same in (case, case.with_layers("plain"))]
    rows = [row_of(case, samples[case.work], *counted[case.work]) for case in cases]
    columns = [Column("recipe" if settings.recipes else "method", "name"), *COLUMNS]
    aims = [] if settings.recipes else list(targets(rows, settings.precision))
    return Report("One training step in units of one BP step", [Table(columns, rows)], targets=aims, legend=LEGEND)


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"rounds": 1, "batch": 4, "quick": True})
