"""A trained network tested in one process: every early exit, and what several exits say together.

    x --> module 0 --+--> module 1 --+--> ... --> classifier       an exit: a head that classifies, or the classifier
                     |               |                |
                   exits           exits             exit
                   |_______________|  prefix of module 1: the mean of the class probabilities of these exits, where
                                      those of module i count 2^i times (DGL); "all": the plain mean of all exits

The modules are those of a run (assembly), on their own weights and heads; what the classifier alone says is what the
run has reported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.base.config import Config
from pipeline.base.errors import CheckpointError, ConfigError
from pipeline.base.flow import bare, named, passed
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.base.recipes import load_config
from pipeline.data.image_source import ImageSource
from pipeline.data.loader_source import LoaderData, LoaderSource
from pipeline.data.source import DataSpec
from pipeline.local.compilation import refuse_without_compiler
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification, Task
from pipeline.local.weights import below, networks
from pipeline.models.backbones import Blocks, build_blocks
from pipeline.models.boundaries import blank
from pipeline.models.custom import network_blocks
from pipeline.plan.assembly import Plan, build_modules, make_plan
from pipeline.ranks.runtime import choose_device, set_threads
from pipeline.report.console import output_console
from pipeline.stage.inlet import Batch
from pipeline.store.checkpoint import Checkpoint, open_checkpoint
from pipeline.store.manifest import CONFIG

EXITS = ("independent", "cascade", "final")
PREFIX, ALL = "prefix", "all"
MAY_CHANGE = ("data.", "precision.", "runtime.device", "runtime.threads")


@dataclass(frozen=True)
class ExitRow:
    """One exit, or several together.

    Attributes:
        module: the local module whose output it needs.
        blocks: first and last block of this module.
        exit: "independent", "cascade" (auxiliary heads), "final" (the classifier), "prefix" (all exits up to this
            module, those of module i weighted 2^i), "all" (the plain mean of all exits).
        error_pct: share of the test images that it gets wrong.
        parameters: of the blocks up to here, heads not counted.
        operations: share of the whole network's forward pass up to here, heads not counted.
    """

    module: int
    blocks: str
    exit: str
    error_pct: float
    parameters: int
    operations: float


@dataclass(frozen=True)
class Evaluation:
    """What was tested, and a row per exit in the order of the modules. A module that does not classify has none."""

    checkpoint: str
    step: int
    epoch: int
    network: str
    data: str
    images: int
    rows: tuple[ExitRow, ...]

    @property
    def test_error_pct(self) -> float:
        """Of the network itself."""
        return next(row.error_pct for row in self.rows if row.exit == "final")

    def write_json(self, path: Path) -> None:
        """Write everything. Raises ConfigError where the disk refuses."""
        document = {**dataclasses.asdict(self), "test_error_pct": self.test_error_pct}
        try:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be written ({error.strerror}); choose another place") from error


def evaluate(
    source: Path | str,
    assignments: Sequence[str] = (),
    *,
    network: nn.Module | None = None,
    data: LoaderData | None = None,
) -> Evaluation:
    """Test a checkpoint on its test set, in this process.

    Args:
        source: the directory of a checkpoint, or of a run, of which the newest valid checkpoint is taken.
        assignments: ``key=value`` for ``data.*``, ``precision.*``, ``runtime.device`` and ``runtime.threads``; all else
            is as in the checkpoint.
        network: the network that was trained, where it was your own; it gets the weights of the checkpoint.
        data: your own loaders, of which the test loader is used; else ``data.name`` is opened.

    Raises:
        CheckpointError: the checkpoint is incomplete, a file of it has changed, or it is of another network.
        ConfigError: started on several ranks, a key that may not change, data of other classes or another image size.
    """
    _refuse_ranks()
    _refuse_assignments(assignments)
    saved = open_checkpoint(Path(source))
    config = load_config(file=saved.path / CONFIG, assignments=assignments)
    _refuse_what_is_missing(saved, config, network, data)
    threads = torch.get_num_threads()
    try:
        set_threads(config.runtime.threads, 1)
        task = Classification(saved.classes, saved.image_shape)
        blocks = network_blocks(network, config.model.cuts, task.image_shape) if network is not None else (
            build_blocks(config.model.name, task.image_shape[0], task.classes)
        )
        device, _ = choose_device(config.runtime.device, 0, 1)
        if config.precision.compile:
            refuse_without_compiler(device)
        numerics = resolve_numerics(config.precision, device, blocks.values())
        images = LoaderSource(data, config, numerics) if data is not None else ImageSource(config, numerics)
        _refuse_other_data(images.data_spec, task, config)
        plan = make_plan(config, blocks, task, 1, images.data_spec.inputs)
        work = _operations(plan, blocks)
        modules = _restored(saved, plan, blocks, numerics)
        wrong, count = count_errors(modules, images.test())
    finally:
        torch.set_num_threads(threads)
    return Evaluation(
        checkpoint=str(saved.path),
        step=saved.step,
        epoch=saved.epoch,
        network=config.model.name,
        data=config.data.name if data is None else "loader",
        images=count,
        rows=tuple(_rows(plan, blocks, work, wrong, count)),
    )


def show_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print ``evaluation`` as a table on ``console`` (default: standard output)."""
    console = output_console(console)
    title = f"{evaluation.network}, step {evaluation.step} (epoch {evaluation.epoch}) of {evaluation.checkpoint}"
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("module", justify="right", no_wrap=True)
    table.add_column("blocks", overflow="ellipsis", min_width=8)
    table.add_column("exit", no_wrap=True)
    for heading in ("test error %", "parameters", "operations %"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = None
    for row in evaluation.rows:
        first, shown = row.module != shown, row.module
        cells = (
            str(row.module) if first else "",
            row.blocks if first else "",
            f"prefix 0-{row.module}" if row.exit == PREFIX else "all, mean" if row.exit == ALL else row.exit,
            f"{row.error_pct:.2f}",
            f"{row.parameters:,}",
            f"{100 * row.operations:.1f}",
        )
        table.add_row(*map(Text, cells), style="bold" if row.exit == "final" else None)
    console.print(table)
    note = (
        f"{evaluation.images:,} test images ({evaluation.data}); parameters and operations of the blocks up to an "
        "exit, heads not counted; prefix: exits of module i weighted 2^i"
    )
    console.print(note, markup=False, highlight=False)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_ranks() -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ConfigError(f"{ranks} processes were started, but an evaluation is one: start it without torchrun")


def _refuse_assignments(assignments: Iterable[str]) -> None:
    for assignment in assignments:
        key = assignment.partition("=")[0].strip()
        if not key.startswith(MAY_CHANGE[:2]) and key not in MAY_CHANGE[2:]:
            raise ConfigError(
                f"--set {assignment}: '{key}' is as the checkpoint was trained; "
                "only data.*, precision.*, runtime.device and runtime.threads can be set here"
            )


def _refuse_what_is_missing(
    saved: Checkpoint, config: Config, network: nn.Module | None, data: LoaderData | None
) -> None:
    """Nothing but the caller has a user's own network and loaders."""
    where = f"checkpoint '{saved.path}'"
    if (task := saved.manifest.get("task")) is not None:
        raise CheckpointError(
            f"{where} is of the task {task}; evaluations are of classifications, its metrics are in metrics.jsonl"
        )
    if saved.custom_network and network is None:
        raise CheckpointError(
            f"{where} is of a network of your own, which no name can rebuild; call pipeline.evaluate(..., network=...) "
            "in Python"
        )
    if config.data.name == "loader" and data is None:
        raise CheckpointError(
            f"{where} was trained from loaders of your own; call pipeline.evaluate(..., data=LoaderData(...)) in "
            "Python, or set data.name"
        )


def _refuse_other_data(data_spec: DataSpec, task: Task, config: Config) -> None:
    name = config.data.name
    if data_spec.classes not in (0, task.classes):
        raise ConfigError(
            f"'{name}' has {data_spec.classes} classes, the checkpoint was trained for {task.classes}; set data.name "
            "and data.root to data with the same classes"
        )
    if data_spec.image_shape != task.image_shape:
        raise ConfigError(
            f"'{name}' has images of shape {data_spec.image_shape}, the checkpoint was trained on {task.image_shape}; "
            "set data.image_size, or use other data"
        )


# --- the network ------------------------------------------------------------------------------------------------------


def _operations(plan: Plan, blocks: Blocks) -> list[int]:
    """Operations of the forward pass of one image, or the longest sequence, up to the end of every local module."""
    reference = next((p for block in blocks.values() for p in block.parameters()), torch.zeros(()))
    flow = bare({name: blank(spec, 1, reference.dtype, reference.device) for name, spec in plan.inputs.items()})
    done = []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for names in plan.cut.modules:
            for name in names:
                flow = passed(blocks[name].eval()(flow))
            done.append(counter.get_total_flops())
    return done


def _restored(saved: Checkpoint, plan: Plan, blocks: Blocks, numerics: Numerics) -> list[LocalModule]:
    """All local modules with the weights and heads of the checkpoint."""
    names = [list(names) for names in plan.cut.modules]
    if names != saved.module_names:
        raise CheckpointError(
            f"checkpoint '{saved.path}' has the local modules {saved.module_names}, this network gives {names}; pass "
            "the network that was trained"
        )
    modules = build_modules(plan, 0, blocks, numerics, fresh=False)
    for module in modules:
        state = saved.module_state(module.plan.index)
        for prefix, network in networks(module):
            try:
                network.load_state_dict(below(state, prefix))
            except RuntimeError as error:
                cause = " ".join(str(error).split())
                raise CheckpointError(
                    f"checkpoint '{saved.path}' does not fit {prefix[:-1]} of local module {module.plan.index}; pass "
                    f"the network that was trained ({cause})"
                ) from error
    return modules


# --- the test ---------------------------------------------------------------------------------------------------------


def count_errors(
    modules: Sequence[LocalModule], batches: Iterable[Batch]
) -> tuple[Counter[tuple[int, str]], int]:
    """Images that each (module, exit) gets wrong, and the number of all images."""
    wrong: Counter[tuple[int, str]] = Counter()
    images = 0
    for batch in batches:
        x = named(batch.x)
        prefix = mean = torch.zeros((), dtype=torch.float64, device=batch.labels.device)
        for module in modules:
            index = module.plan.index
            x, scores = module.evaluate(x)
            prefix = prefix / 2  # the weights of the next module are twice as large; only their ratio counts
            for level, logits in scores.items():
                wrong[index, level] += _wrong(logits, batch.labels)
                probabilities = logits.double().softmax(dim=1)
                prefix, mean = prefix + probabilities, mean + probabilities
            if scores:
                wrong[index, PREFIX] += _wrong(prefix, batch.labels)
        wrong[modules[-1].plan.index, ALL] += _wrong(mean, batch.labels)
        images += len(batch.labels)
    return wrong, images


def _wrong(scores: Tensor, labels: Tensor) -> int:
    return int((scores.argmax(dim=1) != labels).sum())


def _rows(
    plan: Plan, blocks: Blocks, work: Sequence[int], wrong: Counter[tuple[int, str]], images: int
) -> Iterable[ExitRow]:
    """Rows for people: an ensemble of one exit is left out."""
    exits = parameters = 0
    for index, names in enumerate(plan.cut.modules):
        parameters += sum(p.numel() for name in names for p in blocks[name].parameters())
        found = [name for name in EXITS if (index, name) in wrong]
        exits += len(found)
        together = [name for name in (PREFIX, ALL) if (index, name) in wrong and exits > 1]
        for name in found + together:
            yield ExitRow(
                module=index,
                blocks=plan.cut.label(index),
                exit=name,
                error_pct=100.0 * wrong[index, name] / images,
                parameters=parameters,
                operations=work[index] / work[-1],
            )
